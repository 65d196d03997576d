"""The prefill side: streams each granted request's KV while it is computed, and keeps it until the receiver has it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..core.errors import (
    CapabilityRefused,
    Draining,
    GeometryMismatch,
    Overloaded,
    SplitserveError,
    TransferFailed,
    TransferInterrupted,
)
from ..core.kv_geometry import DTYPE_BYTES
from ..core.metrics import WorkerMetrics
from ..proto import kv_transfer_pb2 as pb
from ..proto.convert import check_protocol
from ..proto.mount import ServiceMount
from ..proto.rpc import abort
from .capability import check_proof
from .codecs import CODEC_NAMES, narrower
from .frames import SERVICE, FrameKind
from .grants import Grant
from .identity import WorkerIdentity
from .layout import pool_bytes
from .offers import Offers
from .outgoing import Outgoing
from .packing import Packer, Way
from .pool import KvPool
from .progress import KvProgress
from .ranges import KvLayout, check_pair, route
from .sending import WAIT_INTERVAL_S, Sending, Write, is_set
from .ways import Ways
from .wire import WireBytes

logger = logging.getLogger(__name__)

MAX_PARKED = 1024

Context = grpc.aio.ServicerContext[Any, Any]


class KvSender:
    """Serves KvTransfer on the prefill worker's event loop.

    Args:
        release: called exactly once per offered request, when its KV is needed no longer (committed, failed,
            cancelled, lease over).
        report: called before `release` when the transfer ended in an error that the worker did not cause itself.
        layout, rank: how the worker's ranks hold the model's KV, and which of them this pool is; one rank holds all.
        host: address that channels listen on.
        lease_s: how long KV is kept without a Fetch, or without a Commit after the stream's end.
        park_s: how long a Fetch may wait for its request.
        resume_s: how long KV is kept, at most, after its stream broke, for a receiver that fetches the rest.
    """

    def __init__(
        self,
        pool: KvPool,
        identity: WorkerIdentity,
        *,
        release: Callable[[str], None],
        report: Callable[[str, SplitserveError], None] | None = None,
        metrics: WorkerMetrics | None = None,
        layout: KvLayout | None = None,
        rank: int = 0,
        host: str = "127.0.0.1",
        lease_s: float = 30.0,
        park_s: float = 10.0,
        resume_s: float = 10.0,
    ) -> None:
        self._pool = pool
        self._layout = layout or KvLayout(geometry=pool.geometry)
        self._rank = rank
        self._bytes = pool_bytes(pool, self._layout.first_heads(rank))
        self._identity = identity
        self._geometry_digest = self._layout.geometry.digest()
        self._metrics = metrics
        self._park_s = park_s
        self._packer = Packer(pool, self._bytes)
        self._loop = asyncio.get_running_loop()
        self._sending = Sending(self._packer, self._bytes, metrics)
        self._ways = Ways(pool, self._bytes, identity, self._layout, rank, host)
        self._offers = Offers(
            identity.boot_id, release=release, report=report, metrics=metrics, lease_s=lease_s, resume_s=resume_s
        )
        self._parked: dict[str, set[asyncio.Event]] = {}  # grant id -> Fetches that wait for its request
        self._standing_by: set[asyncio.Task[Any]] = set()  # a stream of Fetch each that is asked for nothing
        self._closed = False

    def register(self, server: grpc.aio.Server | ServiceMount) -> None:
        """Add the service. By hand, since the frames of Fetch are bytes and not protobuf."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Connect": grpc.unary_unary_rpc_method_handler(
                self._connect,
                request_deserializer=pb.ConnectRequest.FromString,
                response_serializer=pb.ConnectResponse.SerializeToString,
            ),
            "Fetch": grpc.stream_stream_rpc_method_handler(self._fetch),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    # -- what the worker tells --

    def offer(self, grant: Grant, token_ids: Sequence[int], block_table: Callable[[str], Sequence[int]]) -> None:
        """Take responsibility for a request's KV, before its prefill starts.

        Args:
            token_ids: all tokens that the grant covers.
            block_table: the request's blocks, called whenever a part is packed, by a thread or the loop.
        Raises: StaleMessage, GeometryMismatch: the grant is not for this process, this model or these tokens.
        """
        if grant.prefill_boot_id != self._identity.boot_id:
            raise self._offers.stale(f"{grant} is for boot {grant.prefill_boot_id}, this is {self._identity.boot_id}")
        if grant.geometry_digest != self._geometry_digest:
            raise GeometryMismatch(
                f"{grant} has KV geometry {grant.geometry_digest}, this worker has {self._geometry_digest}; "
                "pair workers of one model"
            )
        dtype = self._pool.geometry.dtype
        known = grant.codec in CODEC_NAMES and grant.wire_dtype in DTYPE_BYTES
        if not known or narrower(dtype, grant.wire_dtype) != grant.wire_dtype:
            raise GeometryMismatch(
                f"{grant} asks for codec {grant.codec} and KV in {grant.wire_dtype}; this worker has {dtype} and the "
                f"codecs {', '.join(CODEC_NAMES)}"
            )
        if (grant.prefill_ranks, grant.prefill_rank) != (self._layout.num_ranks, self._rank):
            raise GeometryMismatch(
                f"{grant} is for rank {grant.prefill_rank} of {grant.prefill_ranks}, this is rank {self._rank} of "
                f"{self._layout.num_ranks}"
            )
        if len(token_ids) != grant.num_tokens:
            raise self._offers.stale(f"{grant} covers {grant.num_tokens} tokens, the request has {len(token_ids)}")
        target = KvLayout(geometry=self._layout.geometry, num_ranks=grant.decode_ranks)
        sent = route(self._layout, self._rank, target, grant.decode_rank)
        out = Outgoing(
            grant=grant,
            token_ids=token_ids,
            block_table=block_table,
            progress=KvProgress(self._layout.geometry, grant.num_cached_tokens, grant.num_tokens, sent.heads),
            wire_bytes=WireBytes(self._bytes, self._pool.geometry, grant.wire),
        )
        self._offers.add(out)
        for parked in self._parked.get(grant.grant_id, ()):
            parked.set()

    def kv_written(
        self,
        request_id: str,
        layer_start: int,
        layer_end: int,
        token_start: int,
        token_end: int,
        at_s: float | None = None,
    ) -> None:
        """Any thread: these layers of these tokens are in the pool, and stay until `release`. `at_s`: since when."""
        out = self._offers.of_request(request_id)
        if out is None:
            return
        if out.prefill_began_s is None:
            out.prefill_began_s = time.monotonic() if at_s is None else at_s
        due = out.progress.wrote(layer_start, layer_end, token_start, token_end)
        # On a GPU the first token may be known before we are told of the last KV: then nothing else wakes the stream.
        due = due or out.first_token_id is not None
        if due and not out.wake_pending:  # one wake-up for however many parts until the loop gets to it
            out.wake_pending = True
            self._loop.call_soon_threadsafe(self._woken, out)

    def finish(self, request_id: str, first_token_id: int, *, final: bool, at_s: float | None = None) -> None:
        """Prefill is done, since `at_s`. `final`: the answer is complete with its first token, nobody needs the KV."""
        out = self._offers.of_request(request_id)
        if out is None:
            return
        out.first_token_id, out.finished = first_token_id, final
        out.prefill_ended_s = time.monotonic() if at_s is None else at_s
        # Else something reads its blocks, or will once more when it resumes: the stream's end frees them.
        if final and out.stream is None and not out.sent:
            self._offers.release(out)
        out.changed.set()

    def fail(self, request_id: str, error: SplitserveError) -> None:
        """Give up a request, also when cancelled: the receiver is told, now or when it asks. Idempotent."""
        out = self._offers.of_request(request_id)
        if out is not None:
            self._offers.end(out, error)

    def lease_left_s(self, request_id: str) -> float | None:
        """Until its KV is freed if nobody comes for it; None while somebody fetches it."""
        return self._offers.lease_left_s(request_id)

    async def close(self) -> None:
        """Fail what is left."""
        self._closed = True
        for fetch in self._standing_by:
            fetch.cancel()
        for out in self._offers.all():
            self._offers.end(out, self._stopping(), report=True)
        self._ways.close()
        self._sending.close()

    # -- the service --

    async def _connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectResponse:
        try:
            check_protocol(request.protocol_version, f"decode worker {request.worker_id}")
            peer = KvLayout.from_proto(request.shape)
            check_pair(self._layout, peer)
            return self._ways.choose(request, peer)
        except SplitserveError as error:
            await abort(context, error)

    async def _asked(self, context: Context) -> pb.FetchRequest | None:
        """The next request of a stream, which may come long after the last; None: the receiver left."""
        task = asyncio.current_task()
        assert task is not None
        self._standing_by.add(task)
        try:
            if self._closed:
                await abort(context, self._stopping())
            data = await context.read()
            return None if data is grpc.aio.EOF else pb.FetchRequest.FromString(data)
        except DecodeError as error:
            await abort(context, TransferInterrupted(f"the Fetch came damaged: {error}; send it again"))
        except asyncio.CancelledError:
            if not self._closed:
                raise
            task.uncancel()
            await abort(context, self._stopping())
        finally:
            self._standing_by.discard(task)

    async def _fetch(self, _: object, context: Context) -> None:
        while (request := await self._asked(context)) is not None:
            if request.HasField("commit"):
                await self._commit(request, context)
            else:
                await self._serve(request, context)

    async def _serve(self, request: pb.FetchRequest, context: Context) -> None:
        """One stream of a transfer, to its last frame."""
        grant = Grant.from_proto(request.grant)
        out: Outgoing | None = None
        stream = object()
        try:
            write = partial(_write, context)
            way = self._ways.of(request)  # first: without a lane the receiver connects anew and asks again
            out = await self._find(grant, write, request.round)
            self._check_proof(out.grant, request.proof)
            self._offers.begin(out, stream, request)
            await self._send(out, stream, write, way)
            if out.stream is stream:  # a commit by another stream may have ended it already
                self._offers.sent(out)
        except TransferInterrupted as error:
            if out is not None and out.stream is stream:
                self._offers.suspend(out)
            await abort(context, error)
        except SplitserveError as error:
            if out is not None and out.stream is stream:
                self._offers.end(out, error, report=True)
            await abort(context, error)
        except asyncio.CancelledError:
            if out is not None and out.stream is stream:
                if out.digest is None:
                    self._offers.suspend(out)
                else:  # a receiver that has END may close before we see our last write return
                    self._offers.sent(out)
            raise
        except Exception:
            logger.exception("sending %s failed", grant)
            failure = TransferFailed(f"{grant}: the prefill worker failed while sending; see its log")
            if out is not None and out.stream is stream:
                self._offers.end(out, failure, report=True)
            await abort(context, failure)

    async def _commit(self, request: pb.FetchRequest, context: Context) -> None:
        grant = Grant.from_proto(request.grant)
        try:
            out = self._offers.of_grant(grant)
            if out is not None:
                self._check_proof(out.grant, request.proof)
                self._offers.commit(out, request.commit)
            elif not self._offers.is_over(grant) and not request.commit.abandoned:
                raise self._offers.stale(f"{grant} is unknown here; it may be from before a restart")
        except SplitserveError as error:
            await abort(context, error)
        await context.write(pb.FetchResponse().SerializeToString())

    # -- inside --

    async def _find(self, grant: Grant, write: Write, number: int) -> Outgoing:
        """The request of a Fetch; parks it until the router brings the request.

        Raises: StaleMessage: no such grant. Overloaded: too many wait already.
        """
        out = self._offers.of_grant(grant)
        if out is not None:
            return out
        if self._offers.is_over(grant):
            raise self._offers.stale(f"{grant} is over")
        if len(self._parked) >= MAX_PARKED:
            raise Overloaded(f"{MAX_PARKED} transfers wait for their requests already", retry_after_s=1.0)
        offered, waiting = asyncio.Event(), self._parked.setdefault(grant.grant_id, set())
        waiting.add(offered)  # beside an older stream's, where that is not seen to be broken yet
        give_up_s = time.monotonic() + self._park_s
        try:
            while not await is_set(offered, min(WAIT_INTERVAL_S, give_up_s - time.monotonic())):
                if time.monotonic() >= give_up_s:
                    raise self._offers.stale(f"{grant}: its request did not come within {self._park_s:g} s")
                await write(self._packer.control(grant, FrameKind.WAIT, 0, round_number=number))
        finally:
            waiting.discard(offered)
            if not waiting:
                self._parked.pop(grant.grant_id, None)
        out = self._offers.of_grant(grant)
        if out is None:
            raise self._offers.stale(f"{grant} is over")
        return out

    async def _send(self, out: Outgoing, stream: object, write: Write, way: Way) -> None:
        """One stream of a transfer. Raises: what Sending.send does."""
        await self._sending.send(out, stream, write, way)

    def _woken(self, out: Outgoing) -> None:
        out.wake_pending = False
        if out.progress.torn and out.error is None:
            error = TransferFailed(f"{out.grant}: its KV was preempted while it was sent; prefill it again")
            self._offers.end(out, error, report=True)
        out.changed.set()

    def _check_proof(self, grant: Grant, proof: bytes) -> None:
        """Raises: CapabilityRefused."""
        try:
            check_proof(grant, proof)
        except CapabilityRefused:
            if self._metrics is not None:
                self._metrics.links.refused.labels("capability").inc()
            raise

    def _stopping(self) -> Draining:
        return Draining(f"prefill worker {self._identity.worker_id} is stopping")


async def _write(context: Context, frame: bytes) -> None:
    """Raises: asyncio.CancelledError: the receiver is gone; gRPC fails a write that waits, then cancels its task."""
    try:
        await context.write(frame)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
