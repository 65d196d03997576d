"""Hand-over between workers of several tensor-parallel ranks: one address a rank, and a commit that needs all of them.

Each pair of ranks that have heads in common moves them under a grant of its own, by `ranges.py`; what is here ties
those shares together, so that a request's KV is whole or nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ..core.errors import ConfigError, KvCorrupted, SplitserveError, TransferFailed
from ..core.kv_geometry import KvDtype
from ..core.request import Request
from .codecs import WireFormat
from .grants import Grant, KvSource
from .ranges import KvLayout, sources_of
from .receiver import KvReceiver, Received
from .sender import KvSender

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a prefill worker's KV is: one address and boot id for each of its ranks."""

    addresses: tuple[str, ...]
    boot_ids: tuple[str, ...]
    dtype: KvDtype | None = None

    def __post_init__(self) -> None:
        if len(self.addresses) != len(self.boot_ids) or not self.addresses:
            raise ConfigError(f"{len(self.addresses)} addresses and {len(self.boot_ids)} boot ids: one each per rank")

    def source(self, rank: int) -> KvSource:
        return KvSource(
            address=self.addresses[rank],
            boot_id=self.boot_ids[rank],
            dtype=self.dtype,
            num_ranks=len(self.addresses),
            rank=rank,
        )


def share_id(request_id: str, decode_rank: int) -> str:
    """Name of one target rank's share of a request, which is what a source rank offers."""
    return f"{request_id}~{decode_rank}"


@dataclass(slots=True, kw_only=True)
class _Shares:
    open: set[str]  # share ids that the sender still holds
    failed: bool = False
    ids: tuple[str, ...] = field(default=())


class RankSender:
    """One source rank: offers each request to every target rank that needs heads of it.

    Args:
        make_sender: makes the KvSender with the `release` and `report` that it is given.
        release: called once per request, when no target rank needs its KV any longer.
        report: called once per request whose hand-over failed, before `release`.
    """

    def __init__(
        self,
        make_sender: Callable[[Callable[[str], None], Callable[[str, SplitserveError], None]], KvSender],
        *,
        release: Callable[[str], None],
        report: Callable[[str, SplitserveError], None],
    ) -> None:
        self._sender = make_sender(self._share_released, self._share_failed)
        self._release = release
        self._report = report
        self._requests: dict[str, _Shares] = {}

    def offer(
        self,
        request_id: str,
        grants: Sequence[Grant],
        token_ids: Sequence[int],
        block_table: Callable[[str], Sequence[int]],
    ) -> None:
        """Take responsibility for this rank's KV of a request. `grants`: those that name this rank.

        Raises: StaleMessage, GeometryMismatch: a grant is not for this rank; nothing is offered then.
        """
        ids = tuple(grant.request_id for grant in grants)
        offered: list[str] = []
        try:
            for grant in grants:
                self._sender.offer(grant, token_ids, lambda _: block_table(request_id))
                offered.append(grant.request_id)
        except SplitserveError as error:
            for share in offered:
                self._sender.fail(share, error)
            raise
        self._requests[request_id] = _Shares(open=set(ids), ids=ids)

    def kv_written(self, request_id: str, layer_start: int, layer_end: int, token_start: int, token_end: int) -> None:
        """Any thread."""
        if (shares := self._requests.get(request_id)) is not None:
            for share in shares.ids:
                self._sender.kv_written(share, layer_start, layer_end, token_start, token_end)

    def finish(self, request_id: str, first_token_id: int, *, final: bool) -> None:
        if (shares := self._requests.get(request_id)) is not None:
            for share in shares.ids:
                self._sender.finish(share, first_token_id, final=final)

    def fail(self, request_id: str, error: SplitserveError) -> None:
        """Give up every share. Idempotent."""
        if (shares := self._requests.get(request_id)) is not None:
            for share in shares.ids:
                self._sender.fail(share, error)

    async def close(self) -> None:
        await self._sender.close()

    def _share_released(self, share: str) -> None:
        request_id = share.rpartition("~")[0]
        shares = self._requests.get(request_id)
        if shares is None:
            return
        shares.open.discard(share)
        if not shares.open:
            del self._requests[request_id]
            self._release(request_id)

    def _share_failed(self, share: str, error: SplitserveError) -> None:
        request_id = share.rpartition("~")[0]
        shares = self._requests.get(request_id)
        if shares is None or shares.failed:
            return
        shares.failed = True
        self._report(request_id, error)
        self.fail(request_id, TransferFailed(f"another rank's share of {request_id} failed: {error}"))


class RankReceiver:
    """One target rank: pulls its heads from every source rank that sends it some."""

    def __init__(self, receiver: KvReceiver, layout: KvLayout, rank: int) -> None:
        self._receiver = receiver
        self._layout = layout
        self._rank = rank

    def grants(self, request: Request, source: Endpoint, wire: WireFormat, num_cached_tokens: int) -> list[Grant]:
        """One grant for each source rank that this rank needs to hear from.

        Raises: GeometryMismatch: the two workers' ranks cannot divide the heads.
        """
        share = replace(request, request_id=share_id(request.request_id, self._rank))
        layout = KvLayout(geometry=self._layout.geometry, num_ranks=len(source.addresses))
        return [
            self._receiver.make_grant(share, source.source(rank), wire, num_cached_tokens)
            for rank in sources_of(layout, self._layout, self._rank)
        ]

    async def receive(
        self, grants: Sequence[Grant], source: Endpoint, token_ids: Sequence[int], block_ids: Sequence[int]
    ) -> list[Received]:
        """Pull all shares at once; when this returns or raises, nothing writes to the blocks any more."""
        return await _all_or_none(
            [
                self._receiver.receive(grant, source.addresses[grant.prefill_rank], token_ids, block_ids)
                for grant in grants
            ]
        )

    async def commit(self, grants: Sequence[Grant], source: Endpoint, received: Sequence[Received]) -> None:
        await asyncio.gather(
            *(
                self._receiver.commit(grant, source.addresses[grant.prefill_rank], share)
                for grant, share in zip(grants, received, strict=True)
            )
        )


class TargetRank(Protocol):
    """A target rank as the decode worker sees it: in this process, or behind whatever leads to another one."""

    async def receive(
        self, grants: Sequence[Grant], source: Endpoint, token_ids: Sequence[int], block_ids: Sequence[int]
    ) -> list[Received]: ...

    async def commit(self, grants: Sequence[Grant], source: Endpoint, received: Sequence[Received]) -> None: ...


async def hand_over(
    ranks: Sequence[TargetRank],
    grants: Sequence[Sequence[Grant]],
    source: Endpoint,
    token_ids: Sequence[int],
    block_ids: Sequence[int],
) -> Received:
    """Receive a request's KV on every rank, and commit only when every rank has verified its own.

    Returns the sum of the shares. Raises: what the first rank that failed raised, when all are quiet.
    """
    shares = await _all_or_none(
        [rank.receive(own, source, token_ids, block_ids) for rank, own in zip(ranks, grants, strict=True)]
    )
    parts = [part for share in shares for part in share]
    if len({(part.first_token_id, part.finished) for part in parts}) != 1:
        raise KvCorrupted(f"the prefill ranks of {grants[0][0]} disagree about its first token")
    await asyncio.gather(
        *(rank.commit(own, source, share) for rank, own, share in zip(ranks, grants, shares, strict=True))
    )
    return replace(
        parts[0],
        num_bytes=sum(part.num_bytes for part in parts),
        transfer_s=max(part.transfer_s for part in parts),
        transfer_exposed_s=max(part.transfer_exposed_s for part in parts),
        started_at_s=min(part.started_at_s for part in parts),
    )


async def _all_or_none(coroutines: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results of all, or the first error once the others, cancelled, are quiet."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
