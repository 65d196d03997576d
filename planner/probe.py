"""Drives a running worker through grids of prefill and decode steps, as a router would, and times them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from ..core.errors import SplitserveError, Unavailable, WorkerLost
from ..core.events import StepRecord
from ..core.request import Request
from ..proto import kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from ..proto.convert import PROTOCOL_VERSION, check_protocol, failure_from_proto, request_to_proto
from ..proto.rpc import from_rpc_error
from ..proto.tls import PeerRole, Tls, open_channel

_HELLO_TIMEOUT_S = 10.0
_MESSAGE_TIMEOUT_S = 120.0
_MIN_ROUNDS = 3  # of all prompt lengths, however long they take: a calibration needs some of each
_MIN_CELLS = 4
_MAX_CELL_SHARE = 0.25  # of the time that the prompts of one cell may take
_TOKENS_PER_CELL = 24  # of each sequence of a decode cell; the first gaps still hold other sequences' prompts
_PROMPTS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (32, 128, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A worker, and the steps that it was seen to make."""

    info: worker_pb2.WorkerInfo
    status: worker_pb2.WorkerStatus
    records: list[StepRecord]


async def probe_worker(
    address: str,
    *,
    seconds: float,
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda share: None,
    tls: Tls | None = None,
) -> Probed:
    """Time steps of an idle worker for about `seconds`.

    A prefill worker computes single prompts, a decode worker prefills by itself and decodes batches, and a colocated
    one does the first for half the time and then the second.
    Raises: Unavailable: it cannot be reached, or serves somebody else. SplitserveError: it failed a request.
    """
    try:
        async with open_channel(address, tls, PeerRole.WORKER) as channel:
            admin = worker_pb2_grpc.WorkerAdminStub(channel)
            told = await admin.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=_HELLO_TIMEOUT_S)
            if told.status.num_running or told.status.num_waiting:
                raise Unavailable(
                    f"worker {address} serves {told.status.num_running + told.status.num_waiting} requests; a "
                    "calibration needs it for itself, so drain the router or start another worker"
                )
            probe = _Probe(told.info, random.Random(seed), time.monotonic() + seconds, seconds, on_progress)
            if told.info.role == worker_pb2.ROLE_PREFILL:
                async with _session(worker_pb2_grpc.PrefillWorkerStub(channel).PrefillSession, _prefill_message) as end:
                    await probe.prompts(end, _prefill_once, probe.until_s)
            else:
                async with _session(worker_pb2_grpc.DecodeWorkerStub(channel).DecodeSession, _decode_message) as end:
                    if told.info.role == worker_pb2.ROLE_COLOCATED:
                        await probe.prompts(end, _prefill_locally, probe.until_s - seconds / 2)
                    await probe.batches(end, told.status.num_blocks * told.info.block_size)
            return Probed(info=told.info, status=told.status, records=probe.records)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


class _End:
    """The router's end of a session."""

    def __init__(self, call: Any, make: Callable[..., Any]) -> None:
        self._call = call
        self._make = make

    async def send(self, **message: Any) -> None:
        await self._call.write(self._make(**message))

    async def next(self) -> tuple[str, Any]:
        """The next message that is no status. Raises: WorkerLost, or what the worker failed with."""
        async with asyncio.timeout(_MESSAGE_TIMEOUT_S):
            while (message := await self._call.read()) is not grpc.aio.EOF:
                kind = message.WhichOneof("message")
                if kind == "failed":
                    raise failure_from_proto(message.failed.failure)
                if kind is not None and kind != "status":
                    return kind, getattr(message, kind)
        raise WorkerLost("the worker ended the session in the middle of the calibration")


def _prefill_message(**message: Any) -> worker_pb2.PrefillSessionRequest:
    return worker_pb2.PrefillSessionRequest(**message)


def _decode_message(**message: Any) -> worker_pb2.DecodeSessionRequest:
    return worker_pb2.DecodeSessionRequest(**message)


@asynccontextmanager
async def _session(open_call: Callable[[], Any], make: Callable[..., Any]) -> AsyncIterator[_End]:
    call = open_call()
    end = _End(call, make)
    try:
        await end.send(hello=worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="calibration"))
        kind, hello = await end.next()
        assert kind == "hello", kind
        check_protocol(hello.protocol_version, "the worker")
        yield end
    finally:
        call.cancel()  # the worker frees what is left of us


async def _prefill_once(end: _End, request: Request, info: worker_pb2.WorkerInfo) -> float:
    """Seconds of the steps of one prompt. Nobody fetches its KV: it is cancelled once the first token is there."""
    grant = kv_transfer_pb2.Grant(
        grant_id=random.randbytes(16).hex(),
        request_id=request.request_id,
        attempt=1,
        epoch=1,
        decode_boot_id="calibration",
        prefill_boot_id=info.boot_id,
        geometry_digest=info.geometry_digest,
        num_tokens=request.num_tokens,
        lease_s=_MESSAGE_TIMEOUT_S,
        codec="none",
        wire_dtype="bfloat16",  # of what nobody will ever fetch
        prefill_ranks=1,
        decode_ranks=1,
    )
    await end.send(run=worker_pb2.RunPrefill(request=request_to_proto(request, _MESSAGE_TIMEOUT_S), grant=grant))
    kind, first = await end.next()
    assert kind == "first_token", kind
    await end.send(cancel=worker_pb2.CancelRun(request_id=request.request_id, attempt=1))
    return float(first.prefill_s)


async def _prefill_locally(end: _End, request: Request, info: worker_pb2.WorkerInfo) -> float:
    """The same of a worker that keeps what it prefills."""
    await end.send(run=worker_pb2.RunLocal(request=request_to_proto(request, _MESSAGE_TIMEOUT_S)))
    while True:
        kind, message = await end.next()
        for sequence in message.sequences if kind == "tokens" else ():
            if sequence.finish_reason:
                return float(sequence.report.prefill_s)


class _Probe:
    """Cells of the grids, until the time is up."""

    def __init__(
        self,
        info: worker_pb2.WorkerInfo,
        rng: random.Random,
        until_s: float,
        seconds: float,
        on_progress: Callable[[float], None],
    ) -> None:
        self.records: list[StepRecord] = []
        self._info = info
        self._rng = rng
        self.until_s = until_s
        self._seconds = seconds
        self._on_progress = on_progress
        self._num_requests = 0

    async def prompts(
        self, end: _End, run: Callable[[_End, Request, worker_pb2.WorkerInfo], Awaitable[float]], until_s: float
    ) -> None:
        """Single prompts of one step each, in rounds of random order."""
        longest = min(self._info.max_step_tokens or _PROMPTS[-1], self._info.max_model_len - 2)
        lengths = [length for length in _PROMPTS if length <= longest] or [longest]
        num_rounds = 0
        while num_rounds < _MIN_ROUNDS or (time.monotonic() < until_s and num_rounds < 40):
            for length in self._rng.sample(lengths, len(lengths)):
                seconds = await run(end, self._request(length, 1), self._info)
                self._record("prefill", tokens=length, batch=0, context=length, sequences=1, seconds=seconds)
                if num_rounds >= _MIN_ROUNDS and time.monotonic() > until_s:
                    return
            num_rounds += 1

    async def batches(self, end: _End, kv_tokens: int) -> None:
        """Decode batches of equal contexts; what prefill they need is timed too."""
        cells = [
            (batch, context)
            for batch in _BATCHES
            for context in _CONTEXTS
            if context + _TOKENS_PER_CELL < self._info.max_model_len
            and batch * (context + _TOKENS_PER_CELL + self._info.block_size) < kv_tokens * 0.9
            and batch * context <= 65_536
        ]
        self._rng.shuffle(cells)
        # One short cell first: it tells how fast the worker prefills, and so which cells are worth their prompts.
        cells.sort(key=lambda cell: cell != (1, _CONTEXTS[0]))
        tokens_per_s = 0.0
        for number, (batch, context) in enumerate(cells):
            if number >= _MIN_CELLS and time.monotonic() > self.until_s:
                return
            if number and batch * context > tokens_per_s * self._seconds * _MAX_CELL_SHARE:
                continue
            try:
                await self._decode_cell(end, batch, context)
            except SplitserveError as error:
                if error.code != "overloaded":
                    raise
                return  # larger batches than it takes
            if number == 0:
                tokens_per_s = max(context / r.total_s for r in self.records if r.kind == "prefill")

    async def _decode_cell(self, end: _End, batch: int, context: int) -> None:
        requests = [self._request(context, _TOKENS_PER_CELL) for _ in range(batch)]
        for request in requests:
            await end.send(run=worker_pb2.RunLocal(request=request_to_proto(request, _MESSAGE_TIMEOUT_S)))
        unfinished = {request.request_id for request in requests}
        previous_s, previous_full = 0.0, False
        while unfinished:
            kind, message = await end.next()
            now_s = time.monotonic()
            if kind != "tokens":
                continue
            # This step and the one before gave every sequence a token: only this batch's decode lies between.
            full = len(message.sequences) == batch and all(len(s.token_ids) == 1 for s in message.sequences)
            if full and previous_full:
                total = sum(context + s.index for s in message.sequences)
                self._record(
                    "decode", tokens=0, batch=batch, context=total, sequences=batch, seconds=now_s - previous_s
                )
            for sequence in message.sequences:
                if batch == 1 and sequence.HasField("report"):
                    self._record("prefill", context, 0, context, 1, sequence.report.prefill_s)
                if sequence.finish_reason:
                    unfinished.discard(sequence.request_id)
            previous_s, previous_full = now_s, full

    def _request(self, num_tokens: int, max_tokens: int) -> Request:
        """Random tokens, so that no prefix cache has them; nothing ends it early."""
        self._num_requests += 1
        self._on_progress(min(1.0, 1 - (self.until_s - time.monotonic()) / self._seconds))
        prompt: Sequence[int] = self._rng.choices(range(self._info.vocab_size), k=num_tokens)
        return Request(
            request_id=f"calibration-{self._num_requests}",
            prompt_token_ids=tuple(prompt),
            max_tokens=max_tokens + (self._info.role == worker_pb2.ROLE_PREFILL),
            ignore_eos=True,
        )

    def _record(self, kind: Any, tokens: int, batch: int, context: int, sequences: int, seconds: float) -> None:
        self.records.append(
            StepRecord(
                step=len(self.records),
                at_s=time.monotonic(),
                kind=kind,
                num_sequences=sequences,
                num_prefill_tokens=tokens,
                num_decode_tokens=batch,
                num_context_tokens=context,
                num_new_tokens=sequences,
                schedule_s=0.0,
                run_s=seconds,
                total_s=seconds,
                num_waiting=0,
                num_free_blocks=0,
            )
        )
