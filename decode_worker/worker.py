"""The decode role: grants blocks, fetches KV into them, streams tokens; colocated, it prefills for itself."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..core.errors import DeadlineExceeded, Draining, EngineFailed, SplitserveError, Superseded
from ..core.events import Event
from ..core.request import Request
from ..engine.outputs import Reservation, StepOutput, TokenOutput
from ..kv_transfer.codecs import codec_history
from ..kv_transfer.fetching import Received
from ..kv_transfer.grants import Grant
from ..kv_transfer.peer import TRANSPORTS
from ..kv_transfer.ranks import Endpoint, ReceiverGroup
from ..kv_transfer.receiver import KvReceiver
from ..proto import worker_pb2
from ..proto.convert import failure_to_proto, logprob_to_proto, reason_to_proto
from ..worker.edge import sequence_id
from ..worker.fence import Fence
from ..worker.host import WorkerHost
from ..worker.options import WorkerOptions
from ..worker.role import Holder, RoleHooks
from ..worker.session import Session

logger = logging.getLogger(__name__)

RouterSession = Session[worker_pb2.DecodeSessionRequest, worker_pb2.DecodeSessionResponse]
SERVICES = ("splitserve.v1.DecodeWorker",)


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One attempt from its receipt to its last token."""

    request_id: str  # the router's
    request: Request  # the engine's: its id names the attempt
    session: RouterSession
    deadline: asyncio.TimerHandle
    received_s: float
    ready_s: float  # local: received; split: committed
    transfer: asyncio.Task[None] | None = None
    adopted: bool = False  # the transfer is over: whatever ends the run frees its blocks
    started_s: float | None = None  # first step
    first_token_s: float | None = None
    preemptions: int = 0
    num_cached_tokens: int = 0
    is_local: bool = False


class DecodeWorker:
    """Engine plus incoming transfers. Lives on the event loop."""

    def __init__(self, options: WorkerOptions, host: WorkerHost | None = None) -> None:
        self._runs: dict[str, _Run] = {}
        self._fence = Fence()
        self._transfers: set[asyncio.Task[None]] = set()
        self.host = host or WorkerHost(options)
        self.receiver = KvReceiver(
            self.host.engine.pool,
            self.host.identity,
            transports=options.transports,
            codec=options.kv_codec,
            metrics=self.host.metrics,
            layout=self.host.layout,
            granter=self.host.granter,
            tls=options.tls,
            pause=self.host.quiet.wait,
        )
        self._ranks = ReceiverGroup(self.receiver, self.host.layout, self.host.rank_links)
        self.host.take_role(
            RoleHooks(
                services=SERVICES,
                on_step=self._on_step,
                hand_over=self.hand_over,
                close=self.close,
                holders=self._holders,
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
            )

    async def close(self) -> None:
        """Free what is left; the host goes on."""
        for run in list(self._runs.values()):
            self._end(run)
        if self._transfers:
            await asyncio.wait(self._transfers)
        await self.receiver.close()

    async def stop(self) -> None:
        await self.host.stop()

    # -- what the router asks for; `request` carries the attempt's sequence id in place of `request_id` --

    def grant(self, session: RouterSession, request_id: str, request: Request, source: Endpoint) -> None:
        """Reserve blocks and open the fetch, or answer with RunFailed. Older attempts are revoked."""
        if not self._is_new(session, request_id, request):
            return
        request = replace(request, prompt_logprobs=None)  # the prefill worker's business
        try:
            self._refuse_early(request)
            wire = self.receiver.choose_wire(source.source(0), request.num_tokens)
            history = codec_history(wire, self.host.engine.geometry.dtype)
            reservation = self.host.engine.reserve(request, history)
        except SplitserveError as error:
            self.refuse(session, request_id, request.attempt, error)
            return
        try:
            grants = self._ranks.grants(request, source, wire, reservation.num_cached_tokens)
        except SplitserveError as error:  # its ranks and ours cannot share the heads
            self.host.release(request.request_id)
            self.refuse(session, request_id, request.attempt, error)
            return
        run = self._begin(session, request_id, request)
        self._record(run, Event.GRANTED)
        told, *shares = [replace(grant, request_id=request_id).to_proto() for own in grants for grant in own]
        told.shares.extend(shares)
        session.send(worker_pb2.DecodeSessionResponse(grant=told))
        run.transfer = asyncio.create_task(self._receive(run, grants, source, reservation))
        self._transfers.add(run.transfer)
        run.transfer.add_done_callback(lambda task: self._transfer_ended(run, task))

    def run_local(self, session: RouterSession, request_id: str, request: Request) -> None:
        """Prefill and decode here, or answer with RunFailed. Older attempts are revoked."""
        if not self._is_new(session, request_id, request):
            return
        try:
            self._refuse_early(request)
            self.host.engine.add(request)
        except SplitserveError as error:
            self.refuse(session, request_id, request.attempt, error)
            return
        run = self._begin(session, request_id, request)
        run.is_local = True
        self._record(run, Event.PREFILL_QUEUED)
        self.host.wake()

    def cancel(self, session: RouterSession, request_id: str, attempt: int) -> None:
        """Free what this and older attempts hold; another router that had one is told."""
        self._fence.claim(request_id, attempt)
        live = self._fence.live(request_id)
        if live is not None and live.attempt <= attempt:
            run = self._runs[sequence_id(request_id, live.attempt)]
            self._record(run, Event.CANCELLED)
            if run.session is not session:
                self.refuse(run.session, request_id, live.attempt, Superseded("another router took the request over"))
            self._end(run)

    def session_ended(self, session: RouterSession) -> None:
        """The router is gone: free all that it had here."""
        for run in [run for run in self._runs.values() if run.session is session]:
            self._record(run, Event.CANCELLED)
            self._end(run)

    def hand_over(self, error: Draining) -> None:
        """The routers are to take everything elsewhere, from the tokens that they have."""
        for run in list(self._runs.values()):
            self._fail(run, error)

    def refuse(self, session: RouterSession, request_id: str, attempt: int, error: SplitserveError) -> None:
        """Answer one attempt with RunFailed."""
        self.host.recorder.event(request_id, Event.FAILED, attempt=attempt, code=error.code)
        failed = worker_pb2.RunFailed(request_id=request_id, attempt=attempt, failure=failure_to_proto(error))
        session.send(worker_pb2.DecodeSessionResponse(failed=failed))

    def _is_new(self, session: RouterSession, request_id: str, request: Request) -> bool:
        """Whether the attempt may begin; the older one is revoked for it."""
        try:
            repeated = self._fence.is_repeated(request_id, request.attempt, session)
        except Superseded as error:
            self.refuse(session, request_id, request.attempt, error)
            return False
        if repeated:
            self.host.metrics.stale_messages.inc()
            return False
        self.cancel(session, request_id, request.attempt - 1)
        return True

    def _refuse_early(self, request: Request) -> None:
        self.host.refuse_if_out_of_service()
        if request.timeout_s <= 0:
            raise DeadlineExceeded("the deadline passed before the request reached a decode worker")

    def _begin(self, session: RouterSession, request_id: str, request: Request) -> _Run:
        run = _Run(
            request_id=request_id,
            request=request,
            session=session,
            deadline=asyncio.get_running_loop().call_later(request.timeout_s, self._expired, request.request_id),
            received_s=(now := time.monotonic()),
            ready_s=now,
        )
        self._runs[request.request_id] = run
        self._fence.began(request_id, request.attempt, session)
        self.host.run_started()
        return run

    # -- incoming KV --

    async def _receive(
        self, run: _Run, grants: Sequence[Sequence[Grant]], source: Endpoint, reservation: Reservation
    ) -> None:
        """Fetch, verify, join the running batch, commit. Holds the reservation until the link is quiet."""
        request = run.request
        token_ids = request.prompt_token_ids + request.output_token_ids
        try:
            arrived = await self._ranks.receive(
                grants,
                source,
                token_ids,
                reservation.block_ids,
                on_end=lambda: self.host.engine.expect_reserved(request.request_id),
            )
            received = arrived.whole
            self._record(run, Event.TRANSFER_STARTED, received.started_at_s)
            self._record(run, Event.TRANSFER_FINISHED)
            run.adopted, run.transfer = True, None  # nothing writes to the blocks any more
            if not received.finished:
                self.host.engine.start_reserved(request.request_id, received.first_token_id)
                run.ready_s = time.monotonic()
                self._record(run, Event.DECODE_QUEUED)
                self.host.wake()
            self._transfer_done(run, received)
            if received.finished:  # the first token was final: the router has it from the prefill worker
                self._end(run)
            await self.host.quiet.wait()
            await self._ranks.commit(grants, source, arrived)
        except SplitserveError as error:
            self._fail(run, error)
        except Exception:
            logger.exception("receiving KV of request %s failed", run.request_id)
            self._fail(run, EngineFailed("the decode worker failed while it received KV; see its log"))

    def _transfer_ended(self, run: _Run, task: asyncio.Task[None]) -> None:
        """The link is quiet now. Not the task's own last act: one that is cancelled before it began does nothing."""
        self._transfers.discard(task)
        if not run.adopted:
            self._release(run)

    def _transfer_done(self, run: _Run, received: Received) -> None:
        metrics = self.host.metrics
        metrics.transfer_seconds.observe(received.transfer_s)
        metrics.transfer_exposed_seconds.observe(received.transfer_exposed_s)
        run.session.send(
            worker_pb2.DecodeSessionResponse(
                transfer_done=worker_pb2.TransferDone(
                    request_id=run.request_id,
                    attempt=run.request.attempt,
                    transport=TRANSPORTS[received.transport],
                    num_bytes=received.num_bytes,
                    transfer_s=received.transfer_s,
                    transfer_exposed_s=received.transfer_exposed_s,
                    first_token_id=received.first_token_id,
                    index=len(run.request.output_token_ids),
                )
            )
        )

    # -- what the engine did --

    def _on_step(self, output: StepOutput) -> None:
        for sequence in output.started:
            if (run := self._runs.get(sequence)) is not None and run.started_s is None:
                run.started_s = output.record.at_s
                self._record(run, Event.PREFILL_STARTED if run.is_local else Event.DECODE_STARTED, run.started_s)
        for sequence in output.preempted:
            if (run := self._runs.get(sequence)) is not None:
                run.preemptions += 1
                self._record(run, Event.PREEMPTED)
        for sequence in output.resumed:
            if (run := self._runs.get(sequence)) is not None:
                self._record(run, Event.RESUMED)
        by_session: defaultdict[RouterSession, list[worker_pb2.SequenceTokens]] = defaultdict(list)
        # The newest sequence first: it has waited longest for this token, through its transfer, and a router takes
        # milliseconds to hand out the tokens of a large batch.
        for token in reversed(output.tokens):
            if (run := self._runs.get(token.request_id)) is not None:
                by_session[run.session].append(self._sequence_tokens(run, token))
        for session, sequences in by_session.items():
            session.send(worker_pb2.DecodeSessionResponse(tokens=worker_pb2.StepTokens(sequences=sequences)))
        for sequence, error in output.failed:
            if (run := self._runs.get(sequence)) is not None:
                self._fail(run, error)

    def _sequence_tokens(self, run: _Run, token: TokenOutput) -> worker_pb2.SequenceTokens:
        if run.first_token_s is None:
            run.first_token_s = time.monotonic()
            run.num_cached_tokens = token.num_cached_tokens
            if run.is_local:
                self._record(run, Event.FIRST_TOKEN, run.first_token_s)
        message = worker_pb2.SequenceTokens(
            request_id=run.request_id,
            attempt=run.request.attempt,
            index=token.index,
            token_ids=(token.token_id,),
            finish_reason=reason_to_proto(token.finish_reason),
            logprobs=() if token.logprob is None else (logprob_to_proto(token.logprob),),
            prompt_logprobs=map(logprob_to_proto, token.prompt_logprobs),
        )
        if token.finish_reason is not None:
            started_s = run.started_s if run.started_s is not None else run.first_token_s
            message.report.queue_s = max(0.0, started_s - run.ready_s)
            message.report.prefill_s = run.first_token_s - started_s if run.is_local else 0.0
            message.report.preemptions = run.preemptions
            message.report.num_cached_tokens = run.num_cached_tokens
            self._record(run, Event.FINISHED)
            self._end(run)
        return message

    # -- ends --

    def _expired(self, sequence: str) -> None:
        if (run := self._runs.get(sequence)) is not None:
            self._fail(run, DeadlineExceeded("the deadline passed in the decode worker"))

    def _fail(self, run: _Run, error: SplitserveError) -> None:
        if self._runs.get(run.request.request_id) is run:
            self.refuse(run.session, run.request_id, run.request.attempt, error)
            self._end(run)

    def _end(self, run: _Run) -> None:
        """Forget the run and free its blocks; while KV may still arrive, the transfer frees them when it is quiet."""
        del self._runs[run.request.request_id]
        self._fence.ended(run.request_id, run.request.attempt)
        run.deadline.cancel()
        if run.transfer is None:
            self._release(run)
        elif run.transfer is not asyncio.current_task():
            run.transfer.cancel()
        self.host.run_ended()

    def _release(self, run: _Run) -> None:
        self.host.release(run.request.request_id)
        for session in self.host.sessions:
            session.status_changed()

    def _record(self, run: _Run, event: Event, at_s: float | None = None) -> None:
        self.host.recorder.event(run.request_id, event, attempt=run.request.attempt, at_s=at_s)
