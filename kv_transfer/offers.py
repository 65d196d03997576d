"""Offered requests, each from its offer to its one end: streams that come and go, leases, commits."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from ..core.errors import KvCorrupted, LeaseExpired, SplitserveError, StaleMessage, TransferFailed
from ..core.metrics import WorkerMetrics
from ..proto import kv_transfer_pb2 as pb
from .grants import Grant
from .outgoing import Outgoing

MAX_ENDED = 4096


class Offers:
    """Lives on the event loop, but for `of_request`.

    Args:
        boot_id: of the prefill worker.
        release, report, lease_s, resume_s: see `KvSender`.
    """

    def __init__(
        self,
        boot_id: str,
        *,
        release: Callable[[str], None],
        report: Callable[[str, SplitserveError], None] | None,
        metrics: WorkerMetrics | None,
        lease_s: float,
        resume_s: float,
    ) -> None:
        self._boot_id = boot_id
        self._release = release
        self._report = report
        self._metrics = metrics
        self._lease_s = lease_s
        self._resume_s = min(resume_s, lease_s)
        self._loop = asyncio.get_running_loop()
        self._by_request: dict[str, Outgoing] = {}
        self._by_grant: dict[str, Outgoing] = {}
        self._ended: OrderedDict[str, tuple[Grant, SplitserveError | None]] = OrderedDict()  # bounded

    def add(self, out: Outgoing) -> None:
        """It ends an older attempt. Raises: StaleMessage: that one is not older."""
        grant = out.grant
        older = self._by_request.get(grant.request_id)
        if older is not None:
            if older.grant.attempt >= grant.attempt:
                raise self.stale(f"{grant} is not newer than attempt {older.grant.attempt}, which is still here")
            self.end(older, StaleMessage(f"attempt {grant.attempt} replaced attempt {older.grant.attempt}"))
        self._by_request[grant.request_id] = self._by_grant[grant.grant_id] = out
        self._start_lease(out, "no decode worker came to fetch it")  # a Fetch that is parked may not get as far

    def of_request(self, request_id: str) -> Outgoing | None:
        """Any thread: the live one."""
        return self._by_request.get(request_id)

    def all(self) -> list[Outgoing]:
        """Those that are live."""
        return list(self._by_request.values())

    def of_grant(self, grant: Grant) -> Outgoing | None:
        """The live one of a grant that matches in every field; None if there is none (any more, or yet).

        Raises: StaleMessage: another boot, attempt or epoch. The error that the request ended with.
        """
        if grant.prefill_boot_id != self._boot_id:
            raise self.stale(f"{grant} is for boot {grant.prefill_boot_id}, this is {self._boot_id}")
        out = self._by_grant.get(grant.grant_id)
        offered, error = (out.grant, None) if out is not None else self._ended.get(grant.grant_id, (grant, None))
        if offered != grant:
            raise self.stale(f"{grant} does not match the live one: {offered}")
        if error is not None:
            raise error
        return out

    def is_over(self, grant: Grant) -> bool:
        """It was here, and has ended."""
        return grant.grant_id in self._ended

    def lease_left_s(self, request_id: str) -> float | None:
        """Until its KV is freed if nobody comes for it; None while somebody fetches it."""
        out = self._by_request.get(request_id)
        if out is None or out.lease is None or out.lease.cancelled():
            return None
        return max(0.0, out.lease.when() - self._loop.time())

    # -- streams --

    def begin(self, out: Outgoing, stream: object, request: pb.FetchRequest) -> None:
        """The newest stream wins; it goes on behind what the receiver kept of those before.

        Raises: StaleMessage: the receiver claims more than was sent.
        """
        if request.num_kept > len(out.sent):
            raise self.stale(f"{out.grant}: {request.num_kept} frames were kept of {len(out.sent)}")
        kept, again = out.sent[: request.num_kept], out.sent[request.num_kept :]
        if request.round and self._metrics is not None:
            self._metrics.transfer_resumes.inc()
            self._metrics.transfer_resent_bytes.inc(sum(frame.num_bytes for frame in again))
        out.sent = kept
        out.stream, out.digest = stream, None
        out.changed.set()
        if out.lease is not None:
            out.lease.cancel()

    def suspend(self, out: Outgoing) -> None:
        """Its stream broke: the receiver may come back for the rest."""
        out.stream = None
        gone = TransferFailed(f"{out.grant}: the decode worker closed the transfer or went away")
        if out.lease is not None:
            out.lease.cancel()
        out.lease = self._loop.call_later(self._resume_s, lambda: self.end(out, gone, report=True))

    def sent(self, out: Outgoing) -> None:
        """END is out: what is left to wait for is the commit."""
        if out.finished:
            self.end(out, None)
        else:
            self._start_lease(out, "it was sent but not committed")

    def commit(self, out: Outgoing, commit: pb.Commit) -> None:
        """What the receiver says of a transfer. Raises: StaleMessage, KvCorrupted."""
        if commit.abandoned:
            gone = TransferFailed(f"{out.grant}: the decode worker gave the transfer up")
            self.end(out, gone, report=True)
            return
        if out.digest is None:
            raise self.stale(f"{out.grant} was committed before it was sent")
        if out.digest != commit.digest:
            raise KvCorrupted(f"{out.grant}: the receiver's digest differs from what was sent")
        if self._metrics is not None:
            self._metrics.transfers.inc()
        self.end(out, None)

    # -- the end --

    def end(self, out: Outgoing, error: SplitserveError | None, *, report: bool = False) -> None:
        """The one way out of an offered request; safe to call again."""
        grant = out.grant
        if self._by_grant.get(grant.grant_id) is not out:
            return
        del self._by_grant[grant.grant_id], self._by_request[grant.request_id]
        self._ended[grant.grant_id] = (grant, error)
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        if out.lease is not None:
            out.lease.cancel()
        out.error, out.stream = error, None
        out.changed.set()
        if error is not None:
            if self._metrics is not None:
                self._metrics.transfer_failures.inc()
            if report and self._report is not None and not out.released:
                self._report(grant.request_id, error)
        self.release(out)

    def release(self, out: Outgoing) -> None:
        """Its KV is needed no longer. Idempotent."""
        if not out.released:
            out.released = True
            self._release(out.grant.request_id)

    def stale(self, message: str) -> StaleMessage:
        """Counted."""
        if self._metrics is not None:
            self._metrics.stale_messages.inc()
        return StaleMessage(message)

    def _start_lease(self, out: Outgoing, why: str) -> None:
        def expire() -> None:
            text = f"{out.grant}: {why} within {self._lease_s:g} s, its KV was freed; prefill it again"
            self.end(out, LeaseExpired(text), report=True)

        out.lease = self._loop.call_later(self._lease_s, expire)
