"""The prefill role: computes prompts, hands out first tokens, keeps KV until its receiver has it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ..core.errors import Cancelled, DeadlineExceeded, Draining, SplitserveError, Superseded
from ..core.events import Event
from ..core.request import Request
from ..engine.outputs import StepOutput, TokenOutput
from ..kv_transfer.grants import Grant
from ..kv_transfer.sender import KvSender
from ..kv_transfer.source_ranks import RankSender, SenderGroup
from ..proto import worker_pb2
from ..proto.convert import failure_to_proto, logprob_to_proto, reason_to_proto
from ..worker.edge import sequence_id
from ..worker.fence import Fence
from ..worker.host import WorkerHost
from ..worker.options import WorkerOptions
from ..worker.role import Holder, RoleHooks
from ..worker.session import Session

RouterSession = Session[worker_pb2.PrefillSessionRequest, worker_pb2.PrefillSessionResponse]
SERVICES = ("splitserve.v1.PrefillWorker", "splitserve.v1.KvTransfer")


@dataclass(slots=True, kw_only=True)
class _Run:
    """One attempt from its receipt until its KV is released."""

    request_id: str  # the router's
    request: Request  # the engine's: its id names the attempt
    session: RouterSession
    granted: bool  # the grants are here
    received_s: float
    deadline: asyncio.TimerHandle
    started_s: float | None = None


class PrefillWorker:
    """Engine plus outgoing transfers. Lives on the event loop.

    A run ends when its sender says `released`: the KV was committed, or the attempt failed or was cancelled, by its
    deadline at the latest.
    """

    def __init__(self, options: WorkerOptions, host: WorkerHost | None = None) -> None:
        self._runs: dict[str, _Run] = {}
        self._fence = Fence()
        self.host = host = host or WorkerHost(options)

        def make_sender(release: Callable[[str], None], report: Callable[[str, SplitserveError], None]) -> KvSender:
            sender = KvSender(
                host.engine.pool,
                host.identity,
                release=release,
                report=report,
                metrics=host.metrics,
                layout=host.layout,
                host=options.host,
                lease_s=options.lease_s,
            )
            sender.register(host.mount)
            return sender

        self.sender = SenderGroup(host.layout, release=self._released)
        self._own_rank = own_rank = RankSender(
            make_sender,
            release=partial(self.sender.released, 0),
            report=lambda sequence, _: self.sender.failed(0, sequence),
        )
        self.sender.add(own_rank)
        for rank, link in enumerate(host.rank_links, 1):
            link.on_released = partial(self.sender.released, rank)
            link.on_failed = partial(self.sender.failed, rank)
            self.sender.add(link)
        host.take_role(
            RoleHooks(
                services=SERVICES,
                on_step=self._on_step,
                hand_over=self.hand_over,
                close=own_rank.close,
                holders=self._holders,
                kv_written=own_rank.kv_written,
            )
        )

    def _holders(self) -> Iterator[Holder]:
        now = time.monotonic()
        for sequence, run in self._runs.items():
            yield Holder(
                sequence_id=sequence,
                request_id=run.request_id,
                attempt=run.request.attempt,
                router_id=run.session.router_id,
                age_s=now - run.received_s,
                lease_left_s=self._own_rank.lease_left_s(sequence),
            )

    async def stop(self) -> None:
        await self.host.stop()

    # -- what the router asks for --

    def run(self, session: RouterSession, request_id: str, request: Request, grants: Sequence[Grant] | None) -> None:
        """Accept one attempt, or answer it with RunFailed. Older attempts of the request are revoked.

        Args:
            request: carries the attempt's sequence id in place of `request_id`.
            grants: one for each pair of ranks that KV moves between, named by `share_id` of the sequence id; None:
                they follow, and until then its KV stays here.
        """
        try:
            if self._fence.is_repeated(request_id, request.attempt, session):
                self.host.metrics.stale_messages.inc()
                return
            self.cancel(session, request_id, request.attempt - 1)
            self.host.refuse_if_out_of_service()
            if request.timeout_s <= 0:
                raise DeadlineExceeded("the deadline passed before the prompt reached a prefill worker")
            # The sender learns of it first: the engine may report KV as soon as it has the request.
            if grants is None:
                self.sender.expect(request.request_id)
            else:
                self._offer(request, grants)
        except SplitserveError as error:
            self.refuse(session, request_id, request.attempt, error)
            return
        run = _Run(
            request_id=request_id,
            request=request,
            session=session,
            granted=grants is not None,
            received_s=time.monotonic(),
            deadline=asyncio.get_running_loop().call_later(request.timeout_s, self._expired, request.request_id),
        )
        self._runs[request.request_id] = run
        self._fence.began(request_id, request.attempt, session)
        self.host.run_started()
        self._record(run, Event.PREFILL_QUEUED)
        try:
            self.host.engine.add(request, prefill_only=True)
        except SplitserveError as error:
            self._fail(run, error)
            return
        self.host.wake()

    def grant(self, session: RouterSession, sequence: str, grants: Sequence[Grant]) -> None:
        """Where the KV of a run goes that came without; its receiver may be waiting for it already."""
        run = self._runs.get(sequence)
        if run is None or run.session is not session or run.granted:
            self.host.metrics.stale_messages.inc()
            return
        try:
            self._offer(run.request, grants)
            run.granted = True
        except SplitserveError as error:
            self._fail(run, error)

    def _offer(self, request: Request, grants: Sequence[Grant]) -> None:
        token_ids = request.prompt_token_ids + request.output_token_ids
        self.sender.offer(request.request_id, grants, token_ids, self.host.engine.block_table)

    def cancel(self, session: RouterSession, request_id: str, attempt: int) -> None:
        """Free what this and older attempts hold; another router that had one is told."""
        self._fence.claim(request_id, attempt)
        live = self._fence.live(request_id)
        if live is not None and live.attempt <= attempt:
            run = self._runs[sequence_id(request_id, live.attempt)]
            if run.session is not session:
                self.refuse(run.session, request_id, live.attempt, Superseded("another router took the request over"))
            self._cancel(run, "the router cancelled the request")

    def session_ended(self, session: RouterSession) -> None:
        """The router is gone: nobody would read what it asked for."""
        for run in [run for run in self._runs.values() if run.session is session]:
            self._cancel(run, "the router's session ended")

    def hand_over(self, error: Draining) -> None:
        """The routers are to take everything elsewhere."""
        for run in list(self._runs.values()):
            self._fail(run, error)

    def refuse(self, session: RouterSession, request_id: str, attempt: int, error: SplitserveError) -> None:
        """Answer one attempt with RunFailed."""
        self.host.recorder.event(request_id, Event.FAILED, attempt=attempt, code=error.code)
        failed = worker_pb2.RunFailed(request_id=request_id, attempt=attempt, failure=failure_to_proto(error))
        session.send(worker_pb2.PrefillSessionResponse(failed=failed))

    # -- what the engine did --

    def _on_step(self, output: StepOutput) -> None:
        for sequence in output.started:
            if (run := self._runs.get(sequence)) is not None and run.started_s is None:
                run.started_s = output.record.at_s
                self._record(run, Event.PREFILL_STARTED, output.record.at_s)
        for token in output.tokens:
            if (run := self._runs.get(token.request_id)) is not None:
                self._first_token(run, token)
        for sequence, error in output.failed:
            if (run := self._runs.get(sequence)) is not None:
                self._fail(run, error)

    def _first_token(self, run: _Run, token: TokenOutput) -> None:
        now = time.monotonic()
        started_s = run.started_s if run.started_s is not None else now
        run.session.send(
            worker_pb2.PrefillSessionResponse(
                first_token=worker_pb2.FirstToken(
                    request_id=run.request_id,
                    attempt=run.request.attempt,
                    index=token.index,
                    token_id=token.token_id,
                    finish_reason=reason_to_proto(token.finish_reason),
                    prefill_queue_s=started_s - run.received_s,
                    prefill_s=now - started_s,
                    num_cached_tokens=token.num_cached_tokens,
                    logprob=None if token.logprob is None else logprob_to_proto(token.logprob),
                    prompt_logprobs=map(logprob_to_proto, token.prompt_logprobs),
                    ungranted=token.finish_reason is not None and not run.granted,
                )
            )
        )
        self._record(run, Event.FIRST_TOKEN, now)
        self.sender.finish(token.request_id, token.token_id, final=token.finish_reason is not None, at_s=now)

    # -- ends: each goes through the sender, which tells the receiver and then calls `_released` --

    def _expired(self, sequence: str) -> None:
        if (run := self._runs.get(sequence)) is not None:
            self._fail(run, DeadlineExceeded("the deadline passed in the prefill worker"))

    def _fail(self, run: _Run, error: SplitserveError) -> None:
        self.refuse(run.session, run.request_id, run.request.attempt, error)
        self.sender.fail(run.request.request_id, error)

    def _cancel(self, run: _Run, reason: str) -> None:
        self._record(run, Event.CANCELLED)
        self.sender.fail(run.request.request_id, Cancelled(reason))

    def _released(self, sequence: str) -> None:
        """The sender needs this KV no longer: exactly once per offered attempt."""
        self.host.release(sequence)
        run = self._runs.pop(sequence, None)
        if run is not None:
            self._fence.ended(run.request_id, run.request.attempt)
            run.deadline.cancel()
            self.host.run_ended()

    def _record(self, run: _Run, event: Event, at_s: float | None = None) -> None:
        self.host.recorder.event(run.request_id, event, attempt=run.request.attempt, at_s=at_s)
