"""Hand-over between workers of several tensor-parallel ranks: one address a rank, and a commit that needs all of them.

Each pair of ranks that have heads in common moves them under a grant of its own, by `ranges.py`; what is here ties
those shares together, so that a request's KV is whole or nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ..core.errors import ConfigError, GeometryMismatch, KvCorrupted, SplitserveError, TransferFailed
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

    def forget(self, request_id: str) -> None:
        """Nothing is kept of a released request."""

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


class SourceRank(Protocol):
    """A source rank as the prefill worker sees it: in this process, or behind whatever leads to another one."""

    def offer(
        self,
        request_id: str,
        grants: Sequence[Grant],
        token_ids: Sequence[int],
        block_table: Callable[[str], Sequence[int]],
    ) -> None: ...

    def finish(self, request_id: str, first_token_id: int, *, final: bool) -> None: ...

    def fail(self, request_id: str, error: SplitserveError) -> None: ...

    def forget(self, request_id: str) -> None:
        """No rank needs the request's KV any longer."""
        ...


class SenderGroup:
    """All source ranks of a prefill worker: a request's KV stays until the last of them needs it no longer.

    Args: release: called once per offered request, when its KV is needed no longer.
    """

    def __init__(self, layout: KvLayout, *, release: Callable[[str], None]) -> None:
        self._layout = layout
        self._release = release
        self._ranks: list[SourceRank] = []
        self._open: dict[str, set[int]] = {}  # request id -> ranks that still hold it

    def add(self, rank: SourceRank) -> None:
        """The next rank, from 0. It calls `released` and `failed` with that number."""
        self._ranks.append(rank)

    def offer(
        self,
        request_id: str,
        grants: Sequence[Grant],
        token_ids: Sequence[int],
        block_table: Callable[[str], Sequence[int]],
    ) -> None:
        """Take responsibility for a request's KV, before its prefill starts.

        Raises: StaleMessage, GeometryMismatch: a grant is not for this worker; nothing is offered then.
        """
        by_rank: dict[int, list[Grant]] = {}
        for grant in grants:
            if grant.prefill_ranks != self._layout.num_ranks or grant.prefill_rank >= self._layout.num_ranks:
                raise GeometryMismatch(
                    f"{grant} is for rank {grant.prefill_rank} of {grant.prefill_ranks}, this worker has "
                    f"{self._layout.num_ranks}"
                )
            by_rank.setdefault(grant.prefill_rank, []).append(grant)
        self._open[request_id] = set(by_rank)
        for rank in sorted(by_rank):
            try:
                self._ranks[rank].offer(request_id, by_rank[rank], token_ids, block_table)
            except SplitserveError as error:
                del self._open[request_id]
                for offered in sorted(by_rank):
                    if offered < rank:
                        self._ranks[offered].fail(request_id, error)
                raise

    def finish(self, request_id: str, first_token_id: int, *, final: bool) -> None:
        """Prefill is done. `final`: the answer is complete with its first token, so nobody needs the KV."""
        for rank in sorted(self._open.get(request_id, ())):
            self._ranks[rank].finish(request_id, first_token_id, final=final)

    def fail(self, request_id: str, error: SplitserveError) -> None:
        """Give up a request on every rank. Idempotent."""
        for rank in sorted(self._open.get(request_id, ())):
            self._ranks[rank].fail(request_id, error)

    def released(self, rank: int, request_id: str) -> None:
        """A rank needs the request's KV no longer."""
        holding = self._open.get(request_id)
        if holding is None:
            return
        holding.discard(rank)
        if not holding:
            del self._open[request_id]
            for each in self._ranks:
                each.forget(request_id)
            self._release(request_id)

    def failed(self, rank: int, request_id: str) -> None:
        """A rank's share failed, so the others' are of no use."""
        self.fail(request_id, TransferFailed(f"the share of rank {rank} of {request_id} failed"))


class RankReceiver:
    """One target rank: pulls its heads from every source rank that sends it some."""

    def __init__(self, receiver: KvReceiver) -> None:
        self._receiver = receiver

    async def receive(
        self,
        grants: Sequence[Grant],
        source: Endpoint,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        on_covered: Callable[[], None] = lambda: None,
    ) -> list[Received]:
        """Pull all shares at once; when this returns or raises, nothing writes to the blocks any more.

        `on_covered` is called when the last share was announced whole.
        """
        num_open = len(grants)

        def covered() -> None:
            nonlocal num_open
            num_open -= 1
            if num_open == 0:
                on_covered()

        return await _all_or_none(
            [
                self._receiver.receive(grant, source.addresses[grant.prefill_rank], token_ids, block_ids, covered)
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
        self,
        grants: Sequence[Grant],
        source: Endpoint,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        on_covered: Callable[[], None] = lambda: None,
    ) -> list[Received]: ...

    async def commit(self, grants: Sequence[Grant], source: Endpoint, received: Sequence[Received]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A request's KV on every rank, verified, not committed."""

    shares: list[list[Received]]  # by target rank

    @property
    def whole(self) -> Received:
        """The sum of the shares."""
        parts = [part for share in self.shares for part in share]
        return replace(
            parts[0],
            num_bytes=sum(part.num_bytes for part in parts),
            transfer_s=max(part.transfer_s for part in parts),
            transfer_exposed_s=max(part.transfer_exposed_s for part in parts),
            started_at_s=min(part.started_at_s for part in parts),
        )


class ReceiverGroup:
    """All target ranks of a decode worker: a request's KV is taken from every source rank, or not at all.

    Args: receiver: rank 0's, which also makes the grants of the others; an epoch is the worker's.
    """

    def __init__(self, receiver: KvReceiver, layout: KvLayout, others: Sequence[TargetRank] = ()) -> None:
        self._receiver = receiver
        self._layout = layout
        self._ranks: list[TargetRank] = [RankReceiver(receiver), *others]

    def grants(
        self, request: Request, source: Endpoint, wire: WireFormat, num_cached_tokens: int
    ) -> list[list[Grant]]:
        """By target rank, one grant for each source rank that it needs to hear from.

        Raises: GeometryMismatch: the two workers' ranks cannot divide the heads.
        """
        layout = KvLayout(geometry=self._layout.geometry, num_ranks=len(source.addresses))
        return [
            [
                self._receiver.make_grant(
                    replace(request, request_id=share_id(request.request_id, rank)),
                    source.source(sender),
                    wire,
                    num_cached_tokens,
                    rank,
                )
                for sender in sources_of(layout, self._layout, rank)
            ]
            for rank in range(self._layout.num_ranks)
        ]

    async def receive(
        self,
        grants: Sequence[Sequence[Grant]],
        source: Endpoint,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        on_covered: Callable[[], None] = lambda: None,
    ) -> Arrived:
        """Pull and verify every rank's share; when this returns or raises, nothing writes to the blocks any more.

        Raises: what the first rank that failed raised.
        """
        hints = [on_covered, *(lambda: None for _ in self._ranks[1:])]  # the ranks end within a millisecond or so
        shares = await _all_or_none(
            [
                rank.receive(own, source, token_ids, block_ids, hint)
                for rank, own, hint in zip(self._ranks, grants, hints, strict=True)
            ]
        )
        parts = [part for share in shares for part in share]
        if len({(part.first_token_id, part.finished) for part in parts}) != 1:
            raise KvCorrupted(f"the prefill ranks of {grants[0][0]} disagree about its first token")
        return Arrived(shares=shares)

    async def commit(self, grants: Sequence[Sequence[Grant]], source: Endpoint, arrived: Arrived) -> None:
        """Tell every source rank that it may free its copy. Best effort, as KvReceiver.commit is."""
        await asyncio.gather(
            *(
                rank.commit(own, source, share)
                for rank, own, share in zip(self._ranks, grants, arrived.shares, strict=True)
            )
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
