"""One session per worker, whatever its dialect: kept alive, checked, and given up when it goes silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import grpc
import grpc.aio

from ..core.errors import Draining, ProtocolMismatch, SplitserveError, WorkerDied, WorkerLost
from ..proto import kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from ..proto.convert import PROTOCOL_VERSION, check_protocol, failure_from_proto
from ..proto.rpc import from_rpc_error
from ..proto.tls import PeerRole, Tls, open_channel
from ..scheduling.attempts import NewTokens
from ..scheduling.links import Place
from ..scheduling.pairing import Group
from ..scheduling.prefix_feed import PrefixChanges

logger = logging.getLogger(__name__)

SILENCE_S = 3.0  # a worker reports at least once a second; silent for this long it hangs, or its host does
HEARD_S = 0.1  # messages closer together than that do not move the watchdog: a timer each would cost more than they do
MIN_RECONNECT_S, MAX_RECONNECT_S = 0.1, 1.0

WorkerKind = Literal["prefill", "decode"]  # the two dialects; colocated workers speak decode
State = Literal["connecting", "ready", "draining", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillReport:
    """What a prefill worker measured, with the first token."""

    queue_s: float
    prefill_s: float
    num_cached_tokens: int
    ungranted: bool = False  # the answer is complete, and its KV was freed before the grant came


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """What a decode worker measured of one committed transfer."""

    transport: str
    num_bytes: int
    transfer_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeReport:
    """What a decode worker knows about an attempt at its end."""

    queue_s: float
    prefill_s: float  # local runs
    preemptions: int
    num_cached_tokens: int  # local runs


class WorkerEvents(Protocol):
    """What workers tell; called on the event loop, must not block."""

    def workers_changed(self) -> None: ...
    def granted(self, worker: WorkerLink, grant: kv_transfer_pb2.Grant) -> None: ...
    def first_token(self, worker: WorkerLink, tokens: NewTokens, report: PrefillReport) -> None: ...
    def transferred(self, worker: WorkerLink, tokens: NewTokens, report: TransferReport) -> None: ...
    def decoded(self, worker: WorkerLink, tokens: NewTokens, report: DecodeReport | None) -> None: ...
    def failed(self, worker: WorkerLink, request_id: str, attempt: int, error: SplitserveError) -> None: ...
    def lost(self, worker: WorkerLink, error: WorkerLost | Draining) -> None: ...
    def prefixes_changed(self, worker: WorkerLink, changes: PrefixChanges) -> bool: ...


class WorkerLink:
    """One worker as the router sees it, and the session with it. `PrefillLink` and `DecodeLink` speak its two dialects.

    Args:
        address: host:port of the worker's session service.
        tls: of this router; None: plain text.
        judge: tells, from the worker's introduction, why it cannot be used ("" if it can).
    """

    role: WorkerKind
    _service: str

    def __init__(
        self,
        address: str,
        router_id: str,
        events: WorkerEvents,
        judge: Callable[[WorkerLink], str],
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self.reason = "not connected yet"
        self.info: worker_pb2.WorkerInfo | None = None  # None while there is no session
        self.boot_id = ""  # of the process that the session is with, or was
        self.last_worker_id = ""  # what it called itself last; empty until it first said hello
        self.status = worker_pb2.WorkerStatus()
        self.full = False  # it said "overloaded"; asked again after its next status or when a run here ends
        self.retired = False  # no longer on the list: finishes what it runs
        self.runs: dict[str, int] = {}  # request id to the load it adds (prefill tokens or KV blocks)
        self._restarts_prefixes = False  # it was asked to, for we missed a change
        self._refusal = ""
        self._group: Group | None = None
        self._router_id = router_id
        self._events = events
        self._judge = judge
        self._tls = tls
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        if self._refusal:
            return "refused"
        if self.info is None:
            return "connecting"
        return "draining" if self.retired or self.status.draining or self.status.stalled else "ready"

    @property
    def takes_work(self) -> bool:
        return self.state == "ready" and not self.full

    @property
    def worker_id(self) -> str:
        return self.info.worker_id if self.info is not None else self.address

    @property
    def shown_role(self) -> str:
        """For the operator: prefill, decode or colocated."""
        return self.role

    @property
    def group(self) -> Group | None:
        """Whom it can be paired with; None while it has not introduced itself."""
        return self._group if self.info is not None else None

    def attach(self, request_id: str, load: int) -> None:
        """Count a run that is about to be sent."""
        self.runs[request_id] = load

    def detach(self, request_id: str) -> None:
        """Forget a run; a retired worker without runs lets go of its session."""
        if self.runs.pop(request_id, None) is not None:
            self.full = False
        if self.retired and not self.runs:
            self.stop()

    def refused(self) -> None:
        """It takes no more right now."""
        self.full = True

    def cancel(self, request_id: str, attempt: int) -> None:
        """Tell the worker to free whatever the attempt holds, and forget it."""
        if request_id in self.runs:
            self._send(cancel=worker_pb2.CancelRun(request_id=request_id, attempt=attempt))
            self.detach(request_id)

    def claim(self, request_id: str, attempt: int) -> None:
        """Tell the worker that this router takes the request over from whoever runs attempts before this one there."""
        if self.info is not None:
            self._send(cancel=worker_pb2.CancelRun(request_id=request_id, attempt=attempt - 1))

    @property
    def stopping(self) -> bool:
        return self._task is not None and (self._task.done() or self._task.cancelling() > 0)

    def start(self, on_gone: Callable[[WorkerLink], object], on_switched: Callable[[WorkerLink], object]) -> None:
        """Keep a session until stopped, and then call `on_gone`; or until what is there has the other role."""
        self._on_switched = on_switched
        self._task = asyncio.create_task(self._keep_session(), name=f"session with {self.address}")
        self._task.add_done_callback(lambda _: on_gone(self))

    def retire(self) -> None:
        """Take no new work; stop when nothing runs here any more."""
        self.retired = True
        if not self.runs:
            self.stop()

    def stop(self) -> None:
        """End the session; the worker frees what we had running there."""
        if self._task is not None:
            self._task.cancel()

    async def join(self) -> None:
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def reconsider(self) -> None:
        """Judge again: what it was compared with has changed."""
        if self.info is not None:
            self._refusal = self._judge(self)
            self.reason = self._refusal or ("stalled: work is queued, no step finishes" if self.status.stalled else "")

    def _send(self, **message: Any) -> None:
        raise NotImplementedError

    def _open(self, channel: grpc.aio.Channel, requests: AsyncIterator[Any]) -> Any:
        raise NotImplementedError

    def _received(self, kind: str, message: Any) -> None:
        raise NotImplementedError

    async def _keep_session(self) -> None:
        """Session after session until stopped, with back-off between them."""
        delay_s = MIN_RECONNECT_S
        while True:
            reason, refusal, died, is_none = "the worker ended the session", "", False, False
            try:
                async with asyncio.timeout(SILENCE_S) as watchdog:
                    await self._session(watchdog)
            except asyncio.CancelledError:
                reason = self.reason  # the router let go of it: no news
                raise
            except TimeoutError:
                reason = f"no word for {SILENCE_S:g} s: the worker or its host hangs"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                died = error.code() is grpc.StatusCode.UNAVAILABLE
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    reason = refusal = f"nothing at {self.address} is a {self.role} worker"
                    is_none = True
                elif isinstance(from_rpc_error(error), ProtocolMismatch):
                    refusal = reason
            except ProtocolMismatch as error:
                reason = refusal = error.message
            except Exception:
                logger.exception("the session with %s worker %s failed", self.role, self.address)
                reason = "the router failed to handle what it said; see the router's log"
            finally:  # also when stopped
                was_up, self.info = self.info is not None, None
                self._refusal, self.full = refusal, False
                if reason != self.reason:  # one that never spoke is probably still loading its model
                    level = logging.WARNING if was_up or refusal else logging.INFO
                    logger.log(level, "%s worker %s: %s", self.role, self.address, reason)
                self.reason = reason
                if was_up:
                    # What it still had when it went was on its way to it, or would have been handed over.
                    kind = Draining if self.status.draining else WorkerDied if died else WorkerLost
                    self._events.lost(self, kind(f"{self.role} worker {self.address} was lost: {reason}"))
                    self.runs.clear()
                self._events.workers_changed()
            if is_none and await self._has_other_role():
                self._on_switched(self)
                return
            delay_s = MIN_RECONNECT_S if was_up else min(2 * delay_s, MAX_RECONNECT_S)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # back-off, not polling

    async def _has_other_role(self) -> bool:
        """Whether the worker there answers in the other dialect."""
        hello = worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id=self._router_id)
        call: Any
        first: Any
        async with open_channel(self.address, self._tls, PeerRole.WORKER) as channel:
            if self.role == "prefill":
                call = worker_pb2_grpc.DecodeWorkerStub(channel).DecodeSession(timeout=SILENCE_S)
                first = worker_pb2.DecodeSessionRequest(hello=hello)
            else:
                call = worker_pb2_grpc.PrefillWorkerStub(channel).PrefillSession(timeout=SILENCE_S)
                first = worker_pb2.PrefillSessionRequest(hello=hello)
            try:
                await call.write(first)
                answer = await call.read()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return False
            finally:
                call.cancel()
        return answer is not grpc.aio.EOF and answer.WhichOneof("message") == "hello"

    async def _session(self, watchdog: asyncio.Timeout) -> None:
        """One session from hello to its end. A fresh channel, so that no back-off of an old one delays it."""
        loop = asyncio.get_running_loop()
        outbox = self._outbox = asyncio.Queue()
        self._send(hello=worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id=self._router_id))
        async with open_channel(self.address, self._tls, PeerRole(self.role)) as channel:
            call = self._open(channel, _drain(outbox))
            heard_at = 0.0
            try:
                async for message in call:
                    if (now := loop.time()) - heard_at > HEARD_S:
                        heard_at = now
                        watchdog.reschedule(now + SILENCE_S)
                    self.take(message)
            finally:
                call.cancel()
                outbox.put_nowait(None)  # ends _drain, which the call no longer reads

    def take(self, message: Any) -> None:
        """One message of the worker. Raises: ProtocolMismatch: this build cannot make sense of it."""
        kind = message.WhichOneof("message")
        body: Any = getattr(message, kind) if kind else None
        if kind == "hello":
            self._hello(body)
        elif self.info is None:
            raise ProtocolMismatch(f"{self.address} sent {kind} before its hello")
        elif kind == "status":
            self._status(body)
        elif kind == "failed":
            error = failure_from_proto(body.failure)
            self._events.failed(self, body.request_id, body.attempt, error)
        elif kind is not None:  # None: a message of a newer minor version, not for us
            self._received(kind, body)

    def _hello(self, info: worker_pb2.WorkerInfo) -> None:
        check_protocol(info.protocol_version, f"{self.role} worker {self.address}")
        self.info, self.boot_id, self.last_worker_id = info, info.boot_id, info.worker_id
        self._group = Group(weights=info.geometry_digest, protocol=info.protocol_version or 1)
        self.status = worker_pb2.WorkerStatus()
        self._restarts_prefixes = False
        self.reconsider()
        logger.info("%s worker %s (%s): %s", self.role, self.address, info.worker_id, self.reason or "connected")
        self._events.workers_changed()

    def _status(self, status: worker_pb2.WorkerStatus) -> None:
        for name in ("prefill_tokens_per_s", "decode_step_s", "decode_batch"):  # what loads are ranked by
            if not 0 <= (value := getattr(status, name)) < math.inf:
                raise ProtocolMismatch(f"{self.address} says that its {name} is {value}")
        self.status = status
        self.full = False
        if status.HasField("prefix_blocks"):
            self._learn(status.prefix_blocks)
        self.reconsider()
        self._events.workers_changed()

    def _learn(self, blocks: worker_pb2.PrefixBlocks) -> None:
        """What its prefix cache holds; after a gap all of it once more."""
        changes = PrefixChanges(
            number=blocks.number, restarts=blocks.restarts, added=blocks.added, removed=blocks.removed
        )
        if self._events.prefixes_changed(self, changes):
            self._restarts_prefixes = False
        elif not self._restarts_prefixes:
            self._restarts_prefixes = True
            self._send(restart_prefix_blocks=worker_pb2.RestartPrefixBlocks())

    @property
    def place(self) -> Place | None:
        info = self.info
        return Place.of(info.host_id, info.labels) if info is not None and info.host_id else None


async def _drain(outbox: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while (message := await outbox.get()) is not None:
        yield message
