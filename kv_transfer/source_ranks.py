"""The source ranks of a hand-over: each offers its own heads, and a request's KV stays until no rank needs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.errors import GeometryMismatch, SplitserveError, TransferFailed
from .grants import Grant
from .ranges import KvLayout
from .sender import KvSender


@dataclass(slots=True, kw_only=True)
class _Shares:
    open: set[str]  # share ids that the sender still holds
    failed: bool = False
    ids: tuple[str, ...] = field(default=())


class RankSender:
    """One source rank: offers each request to every target rank that needs heads of it.

    A request whose grants come while it is computed is expected first: what is written of it is remembered until then.

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
        self._lock = threading.Lock()  # of what the device's thread and an offer exchange
        self._early: dict[str, list[tuple[tuple[int, int, int, int], float]]] = {}  # of expected ones: written, since

    def expect(self, request_id: str) -> None:
        """Its grants will be offered, or it is forgotten. Idempotent; any thread."""
        with self._lock:
            if request_id not in self._requests:
                self._early.setdefault(request_id, [])

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
        with self._lock:  # parts are told in order
            self._requests[request_id] = _Shares(open=set(ids), ids=ids)
            for written, at_s in self._early.pop(request_id, ()):
                self._tell(ids, written, at_s)

    def kv_written(self, request_id: str, layer_start: int, layer_end: int, token_start: int, token_end: int) -> None:
        """Any thread."""
        written = (layer_start, layer_end, token_start, token_end)
        with self._lock:
            if (early := self._early.get(request_id)) is not None:
                early.append((written, time.monotonic()))
                return
            shares = self._requests.get(request_id)
        if shares is not None:
            self._tell(shares.ids, written)

    def _tell(self, shares: Sequence[str], written: tuple[int, int, int, int], at_s: float | None = None) -> None:
        for share in shares:
            self._sender.kv_written(share, *written, at_s)

    def finish(self, request_id: str, first_token_id: int, *, final: bool, at_s: float | None = None) -> None:
        if (shares := self._requests.get(request_id)) is not None:
            for share in shares.ids:
                self._sender.finish(share, first_token_id, final=final, at_s=at_s)

    def forget(self, request_id: str) -> None:
        """Keep nothing of a request that was released, or never offered."""
        with self._lock:
            self._early.pop(request_id, None)

    def fail(self, request_id: str, error: SplitserveError) -> None:
        """Give up every share. Idempotent."""
        if (shares := self._requests.get(request_id)) is not None:
            for share in shares.ids:
                self._sender.fail(share, error)

    def lease_left_s(self, request_id: str) -> float | None:
        """Until the first of its shares is freed if nobody comes for it; None while all are fetched."""
        shares = self._requests.get(request_id)
        left_s = [self._sender.lease_left_s(share) for share in shares.open] if shares is not None else []
        return min((each for each in left_s if each is not None), default=None)

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

    def expect(self, request_id: str) -> None: ...

    def offer(
        self,
        request_id: str,
        grants: Sequence[Grant],
        token_ids: Sequence[int],
        block_table: Callable[[str], Sequence[int]],
    ) -> None: ...

    def finish(self, request_id: str, first_token_id: int, *, final: bool, at_s: float | None = None) -> None: ...

    def fail(self, request_id: str, error: SplitserveError) -> None: ...

    def forget(self, request_id: str) -> None:
        """No rank needs the request's KV any longer."""
        ...


class SenderGroup:
    """All source ranks of a prefill worker: a request's KV stays until the last of them needs it no longer.

    Args: release: called once per offered or expected request, when its KV is needed no longer.
    """

    def __init__(self, layout: KvLayout, *, release: Callable[[str], None]) -> None:
        self._layout = layout
        self._release = release
        self._ranks: list[SourceRank] = []
        self._open: dict[str, set[int]] = {}  # request id -> ranks that still hold it
        self._expected: dict[str, tuple[int, float] | None] = {}  # request id -> its first token, once there, and when

    def add(self, rank: SourceRank) -> None:
        """The next rank, from 0. It calls `released` and `failed` with that number."""
        self._ranks.append(rank)

    def expect(self, request_id: str) -> None:
        """Take responsibility for a request's KV, before its prefill starts; its grants are yet to be offered."""
        self._expected[request_id] = None
        for rank in self._ranks:
            rank.expect(request_id)

    def offer(
        self,
        request_id: str,
        grants: Sequence[Grant],
        token_ids: Sequence[int],
        block_table: Callable[[str], Sequence[int]],
    ) -> None:
        """Take responsibility for a request's KV, before its prefill starts or when it was expected.

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
        if (first := self._expected.pop(request_id, None)) is not None:
            self.finish(request_id, first[0], final=False, at_s=first[1])

    def finish(self, request_id: str, first_token_id: int, *, final: bool, at_s: float) -> None:
        """Prefill is done, since `at_s`. `final`: the answer is complete with its first token, nobody needs the KV."""
        if request_id in self._expected:
            self._expected[request_id] = first_token_id, at_s
            if final:
                self._give_up(request_id)
        for rank in sorted(self._open.get(request_id, ())):
            self._ranks[rank].finish(request_id, first_token_id, final=final, at_s=at_s)

    def fail(self, request_id: str, error: SplitserveError) -> None:
        """Give up a request on every rank. Idempotent."""
        self._give_up(request_id)
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
            self._forget(request_id)

    def failed(self, rank: int, request_id: str) -> None:
        """A rank's share failed, so the others' are of no use."""
        self.fail(request_id, TransferFailed(f"the share of rank {rank} of {request_id} failed"))

    def _give_up(self, request_id: str) -> None:
        """An expected request: nobody fetches it any more."""
        if request_id in self._expected:
            del self._expected[request_id]
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        for each in self._ranks:
            each.forget(request_id)
        self._release(request_id)
