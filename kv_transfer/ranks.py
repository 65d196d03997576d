"""Hand-over between workers of several tensor-parallel ranks: one address a rank, and a commit that needs all of them.

Each pair of ranks that have heads in common moves them under a grant of its own, by `ranges.py`; what is here ties
those shares together, so that a request's KV is whole or nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from ..core.errors import ConfigError, KvCorrupted, SplitserveError
from ..core.kv_geometry import KvDtype
from ..core.request import Request
from .codecs import WireFormat
from .fetching import Received
from .grants import Grant, KvSource
from .ranges import KvLayout, sources_of
from .receiver import KvReceiver

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
        on_end: Callable[[], None] = lambda: None,
    ) -> list[Received]:
        """Pull all shares at once; when this returns or raises, nothing writes to the blocks any more.

        `on_end` is called when the end of the last share came.
        """
        num_open = len(grants)

        def ended() -> None:
            nonlocal num_open
            num_open -= 1
            if num_open == 0:
                on_end()

        return await _all_or_none(
            [
                self._receiver.receive(grant, source.addresses[grant.prefill_rank], token_ids, block_ids, ended)
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
        on_end: Callable[[], None] = lambda: None,
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

    def grants(self, request: Request, source: Endpoint, wire: WireFormat, num_cached_tokens: int) -> list[list[Grant]]:
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
        on_end: Callable[[], None] = lambda: None,
    ) -> Arrived:
        """Pull and verify every rank's share; when this returns or raises, nothing writes to the blocks any more.

        Raises: what the first rank that failed raised.
        """
        hints = [on_end, *(lambda: None for _ in self._ranks[1:])]  # the ranks end within a millisecond or so
        shares = await _all_or_none(
            [
                self._share(number, own, source, token_ids, block_ids, hint)
                for number, (own, hint) in enumerate(zip(grants, hints, strict=True))
            ]
        )
        parts = [part for share in shares for part in share]
        if len({(part.first_token_id, part.finished) for part in parts}) != 1:
            raise KvCorrupted(f"the prefill ranks of {grants[0][0]} disagree about its first token")
        return Arrived(shares=shares)

    async def _share(
        self,
        number: int,
        grants: Sequence[Grant],
        source: Endpoint,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        on_end: Callable[[], None],
    ) -> list[Received]:
        """One rank's. What fails at another rank counts here, where the epochs of grants are."""
        try:
            return await self._ranks[number].receive(grants, source, token_ids, block_ids, on_end)
        except SplitserveError:
            if number:  # our own receiver has seen to its own
                for grant in grants:
                    self._receiver.failed(source.addresses[grant.prefill_rank])
            raise

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
    if len(coroutines) == 1:  # no task, no turn of the event loop: a prompt is computed while its transfer opens
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
