"""The decode side: pulls a granted request's KV into its own blocks, verifies all of it, commits."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import grpc
import grpc.aio
import numpy as np
from torch import Tensor

from ..core.errors import Draining, KvCorrupted, SplitserveError, StaleMessage, TransferFailed
from ..core.metrics import WorkerMetrics
from ..core.request import Request
from ..proto import kv_transfer_pb2 as pb
from ..proto.rpc import from_rpc_error
from ..proto.tls import Tls
from .capability import Granter
from .channel import Lane
from .channels import staging_of
from .codec_choice import LinkSpeed, is_codec_worth_it
from .codecs import CodecName, WireFormat, narrower
from .frames import HEADER_BYTES, FrameHeader, FrameKind, KvPart, checksum
from .grants import Grant, KvSource
from .identity import WorkerIdentity
from .incoming import Incoming
from .layout import Bytes, pool_bytes
from .peer import MAPPED, TRANSPORT_NAMES, Peer, Peers
from .pool import KvPool
from .ranges import KvLayout, route
from .staging import Staging
from .wire import WireBytes, payload_bytes

logger = logging.getLogger(__name__)

COMMIT_TIMEOUT_S = 5.0
AUTO_CODEC: CodecName = "int8"  # as many bytes as fp8, a smaller error: docs/kv_transfer.md
CODEC_BYTES_PER_S = 1e9  # of KV in its own dtype; one CPU core codes 1.3 to 3.8 GB/s


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A verified transfer. The blocks hold the KV of all the grant's tokens, unless `finished`."""

    first_token_id: int
    finished: bool  # the answer is complete with its first token; nothing to decode
    transport: str  # a name of peer.py's TRANSPORTS
    num_bytes: int  # of KV on the wire; without a codec, by the layout's formula
    transfer_s: float  # first KV frame to verified
    transfer_exposed_s: float  # end of prefill to verified
    digest: bytes
    started_at_s: float  # monotonic, first KV frame


class _LaneGone(StaleMessage):
    """The sender may have given up a lane that we still held for good; if so, another fetch over a new one works."""


class KvReceiver:
    """Lives on the decode worker's event loop; copies run in threads of its own.

    Args:
        transports: what may be used, best first.
        codec: how KV is coded where its bytes travel; "auto" decides by a link's measured speed.
        layout, rank: how the worker's ranks hold the model's KV, and which of them this pool is; one rank holds all.
        granter: of all ranks of a worker; None: this one is alone.
        lease_s: how long the sender shall keep KV without a sign of life.
        silence_s: a stream that says nothing for this long is given up.
        stall_s: the same, once the first KV has come.
        tls: of this worker; None: plain text.
    """

    def __init__(
        self,
        pool: KvPool,
        identity: WorkerIdentity,
        *,
        transports: Sequence[str] = ("cuda_ipc", "shared_memory", "grpc"),
        codec: CodecName | Literal["auto"] = "none",
        metrics: WorkerMetrics | None = None,
        layout: KvLayout | None = None,
        rank: int = 0,
        granter: Granter | None = None,
        lease_s: float = 30.0,
        silence_s: float = 10.0,
        stall_s: float = 5.0,
        tls: Tls | None = None,
    ) -> None:
        self._pool = pool
        self._layout = layout or KvLayout(geometry=pool.geometry)
        self._rank = rank
        self._bytes = pool_bytes(pool, self._layout.first_heads(rank))
        self._identity = identity
        self._codec = codec
        self._metrics = metrics
        self._lease_s = lease_s
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._granter = granter or Granter.new()
        self._geometry_digest = self._layout.geometry.digest()
        self._peers = Peers(pool, self._bytes, self._layout, rank, identity, transports, tls)
        self._epochs: defaultdict[str, int] = defaultdict(lambda: 1)  # per address, raised after every failure
        self._speeds: defaultdict[str, LinkSpeed] = defaultdict(LinkSpeed)  # per address
        self._stagings: dict[int, Staging] = {}  # by transport
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="kv-unpack")

    def choose_wire(self, source: KvSource, num_tokens: int) -> WireFormat:
        """How KV from there shall travel: what is configured or, with codec auto, what its link's speed asks for."""
        own = self._pool.geometry
        plain = WireFormat(codec="none", dtype=narrower(source.dtype or own.dtype, own.dtype))
        if self._codec != "auto":
            return replace(plain, codec=self._codec)
        whole = KvPart(
            layer_start=0,
            layer_end=own.num_layers,
            head_start=0,
            head_end=own.layers[0].num_kv_heads,
            token_start=0,
            token_end=num_tokens,
        )
        coded = replace(plain, codec=AUTO_CODEC)
        speed = self._speeds[source.address]
        worth_it = is_codec_worth_it(
            num_bytes=payload_bytes(own, plain, whole),
            coded_bytes=payload_bytes(own, coded, whole),
            link_bytes_per_s=speed.link_bytes_per_s,
            prefill_s=num_tokens / speed.prefill_tokens_per_s if speed.prefill_tokens_per_s else 0.0,
            codec_bytes_per_s=CODEC_BYTES_PER_S,
        )
        return coded if worth_it else plain

    def make_grant(
        self,
        request: Request,
        source: KvSource,
        wire: WireFormat,
        num_cached_tokens: int,
        decode_rank: int | None = None,
    ) -> Grant:
        """Promise blocks, which the caller has reserved, for one attempt; of another rank if `decode_rank` says so."""
        grant = Grant(
            grant_id=secrets.token_hex(16),
            request_id=request.request_id,
            attempt=request.attempt,
            epoch=self._epochs[source.address],
            decode_boot_id=self._identity.boot_id,
            prefill_boot_id=source.boot_id,
            geometry_digest=self._geometry_digest,
            num_cached_tokens=num_cached_tokens,
            num_tokens=request.num_tokens,
            lease_s=self._lease_s,
            codec=wire.codec,
            wire_dtype=wire.dtype,
            prefill_ranks=source.num_ranks,
            prefill_rank=source.rank,
            decode_ranks=self._layout.num_ranks,
            decode_rank=self._rank if decode_rank is None else decode_rank,
        )
        return self._granter.seal(grant)

    async def receive(
        self,
        grant: Grant,
        kv_address: str,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        on_covered: Callable[[], None] = lambda: None,
    ) -> Received:
        """Pull the KV of `token_ids` into `block_ids`; all of it is verified when this returns, not yet committed.

        `on_covered` is called when all KV was announced: what is left takes a millisecond or two.

        When it returns, raises or is cancelled, nothing writes to the blocks any more.
        Raises: TransferFailed, KvCorrupted, LeaseExpired, StaleMessage, GeometryMismatch, or the error that the
            request ended with on the prefill worker.
        """
        try:
            try:
                async with self._peers.use(kv_address, grant.prefill_boot_id) as peer:
                    return await self._fetch(peer, kv_address, grant, token_ids, block_ids, on_covered)
            except _LaneGone:
                async with self._peers.use(kv_address, grant.prefill_boot_id) as peer:  # over a new lane
                    return await self._fetch(peer, kv_address, grant, token_ids, block_ids, on_covered)
        except SplitserveError:
            self.failed(kv_address)
            raise

    async def commit(self, grant: Grant, kv_address: str, received: Received) -> None:
        """Tell the sender that it may free its copy. Best effort: if it does not hear, its lease frees it."""
        if self._metrics is not None:
            self._metrics.transfers.inc()
        try:
            async with self._peers.use(kv_address, grant.prefill_boot_id) as peer:
                await peer.commit(
                    pb.CommitRequest(grant=grant.to_peer(), digest=received.digest, proof=self._granter.proof(grant)),
                    timeout=COMMIT_TIMEOUT_S,
                )
        except (grpc.aio.AioRpcError, SplitserveError) as error:
            logger.warning("commit of %s was not taken: %s", grant, error)

    async def close(self) -> None:
        """Close every link. Cancel what is receiving first."""
        await self._peers.close()
        self._threads.shutdown(wait=True)

    async def _fetch(
        self,
        peer: Peer,
        kv_address: str,
        grant: Grant,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        on_covered: Callable[[], None],
    ) -> Received:
        started_s: float | None = None
        copying: asyncio.Future[int] | None = None  # one copy runs while the next frame arrives
        late: list[int] = []  # checksums to compare with those that come with END
        # A peer's mapped pool is copied by whole blocks; a prefix hit that ends inside a block cannot be added to.
        whole = grant.num_cached_tokens % self._pool.block_size == 0
        transport = peer.transport if whole else pb.TRANSPORT_GRPC
        mapped = transport in MAPPED
        wire = WireFormat(codec="none", dtype=self._pool.geometry.dtype) if mapped else grant.wire
        source = KvLayout(geometry=self._layout.geometry, num_ranks=grant.prefill_ranks)
        due = route(source, grant.prefill_rank, self._layout, self._rank)
        lane = peer.lane if transport == peer.transport else None
        incoming = Incoming(grant, self._layout.geometry, due, wire, token_ids)
        wire_bytes = WireBytes(self._bytes, self._pool.geometry, wire)
        request = pb.FetchRequest(
            grant=grant.to_peer(),
            transport=transport,
            link_epoch=peer.link_epoch,
            proof=self._granter.proof(grant),
        )
        call = peer.fetch(request)
        try:
            while True:
                frame = await self._next_frame(call, grant, self._silence_s if started_s is None else self._stall_s)
                header = FrameHeader.unpack(frame)
                if incoming.is_stale(header):
                    self._count_stale()
                elif header.kind is FrameKind.END:
                    break
                elif header.kind is not FrameKind.WAIT:
                    started_s = time.monotonic() if started_s is None else started_s
                    incoming.accept_data(header, frame)
                    if (header.kind is FrameKind.APART) != (lane is not None):
                        raise KvCorrupted(f"{grant}: frame {header.sequence} came by another transport than agreed")
                    payload = None
                    if lane is not None:  # posted at once, so that others' turns can follow
                        payload = self._staging(transport).room(wire_bytes.part_bytes(header.part))
                        moving = await self._post(lane, header, payload)
                    if incoming.is_covered:
                        on_covered()
                    if copying is not None:
                        late.append(await _done(copying))
                    if payload is not None:
                        staging = self._staging(transport)
                        moved = self._copy_moved(moving, staging, wire_bytes, header, payload, block_ids)
                        copying = asyncio.ensure_future(moved)
                    else:
                        copying = self._copy(peer, wire_bytes, header, frame, block_ids, mapped=mapped)
            ended_s = time.monotonic()
            if copying is not None:
                late.append(await _done(copying))
            checksums = late if transport == pb.TRANSPORT_CUDA_IPC else ()
            end = incoming.accept_end(header, memoryview(frame)[HEADER_BYTES:], checksums)
            self._check_source(grant, end)
        except (SplitserveError, asyncio.CancelledError) as error:
            # A turn of ours may never be taken. Cancelled before anything came, a transfer leaves the lane to others;
            # if the sender saw it otherwise, its answer to the next one is StaleMessage.
            if lane is not None and (started_s is not None or isinstance(error, StaleMessage | TransferFailed)):
                lane.abort(f"{grant} ended before its last frame")
                if started_s is None and type(error) is StaleMessage:
                    raise _LaneGone(error.message) from error
            raise
        finally:
            call.cancel()
            if copying is not None:
                await _quiet(copying)
        verified_s = time.monotonic()
        if not mapped:
            self._speeds[kv_address] = self._speeds[kv_address].observe(
                wire_bytes=incoming.num_bytes,
                write_s=end.write_s,
                num_tokens=grant.num_tokens - grant.num_cached_tokens,
                prefill_s=end.prefill_s,
            )
        if self._metrics is not None:
            self._metrics.transfer_bytes.inc(incoming.num_bytes)
        started_s = ended_s if started_s is None else started_s
        return Received(
            first_token_id=end.first_token_id,
            finished=end.finished,
            transport=TRANSPORT_NAMES[transport],
            num_bytes=incoming.num_bytes,
            transfer_s=verified_s - started_s,
            transfer_exposed_s=end.since_prefill_end_s + verified_s - ended_s,
            digest=incoming.digest,
            started_at_s=started_s,
        )

    async def _next_frame(self, call: Any, grant: Grant, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                frame = await call.read()
        except TimeoutError:
            raise TransferFailed(
                f"{grant}: the prefill worker said nothing for {timeout_s:g} s; prefill it again"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise _typed(error) from error
        if frame is grpc.aio.EOF:
            raise TransferFailed(f"{grant}: the stream ended before its last frame; prefill it again")
        assert isinstance(frame, bytes)
        return frame

    def _copy(
        self,
        peer: Peer,
        wire_bytes: WireBytes,
        header: FrameHeader,
        frame: bytes,
        block_ids: Sequence[int],
        *,
        mapped: bool,
    ) -> asyncio.Future[int]:
        """Start copying one frame's KV into our blocks, in a thread; its result is the checksum of what arrived."""
        part, size = header.part, self._pool.block_size

        def from_frame() -> int:
            return _unpack(wire_bytes, header, np.frombuffer(frame, dtype=np.uint8, offset=HEADER_BYTES), block_ids)

        def from_peer() -> int:
            if part.token_start % size or peer.pool is None or header.payload_bytes % 4:
                raise KvCorrupted(f"frame {header.sequence} does not hold the numbers of whole blocks")
            source = np.frombuffer(frame, dtype="<u4", offset=HEADER_BYTES)
            target = np.asarray(block_ids[part.token_start // size : -(-part.token_end // size)], dtype=np.intp)
            found = peer.pool.copy(part, source, self._bytes, target)
            if peer.transport != pb.TRANSPORT_CUDA_IPC and found != header.checksum:
                raise KvCorrupted(f"the checksum of frame {header.sequence} is wrong")
            return found

        job = from_peer if mapped else from_frame
        return asyncio.get_running_loop().run_in_executor(self._threads, job)

    def _staging(self, transport: int) -> Staging:
        if transport not in self._stagings:
            self._stagings[transport] = staging_of(transport, self._bytes)
        return self._stagings[transport]

    async def _post(self, lane: Lane, header: FrameHeader, payload: Tensor) -> asyncio.Future[None]:
        """Post the receive of a payload at its turn."""
        if payload.numel() != header.payload_bytes:
            raise KvCorrupted(f"frame {header.sequence} announces {header.payload_bytes} bytes for {header.part}")
        try:
            async with asyncio.timeout(self._stall_s):
                return await lane.recv(header.turn, payload)
        except TimeoutError:
            raise TransferFailed(f"{lane.name} did not come to turn {header.turn} in {self._stall_s:g} s") from None

    async def _copy_moved(
        self,
        moving: asyncio.Future[None],
        staging: Staging,
        wire_bytes: WireBytes,
        header: FrameHeader,
        payload: Tensor,
        block_ids: Sequence[int],
    ) -> int:
        """Once a lane has moved a payload, check it and copy it into our blocks. Returns its checksum."""
        await moving
        unpack = partial(staging.unpack, wire_bytes, header.part, block_ids, payload, header.checksum)
        await asyncio.get_running_loop().run_in_executor(self._threads, unpack)
        return header.checksum

    def failed(self, kv_address: str) -> None:
        """A transfer from there failed, also to another rank: later grants are of another epoch."""
        self._epochs[kv_address] += 1
        if self._metrics is not None:
            self._metrics.transfer_failures.inc()

    def _check_source(self, grant: Grant, end: pb.TransferEnd) -> None:
        try:
            self._granter.check_end(grant, end)
        except KvCorrupted:
            if self._metrics is not None:
                self._metrics.links.refused.labels("capability").inc()
            raise

    def _count_stale(self) -> None:
        if self._metrics is not None:
            self._metrics.stale_messages.inc()


def _unpack(wire_bytes: WireBytes, header: FrameHeader, payload: Bytes, block_ids: Sequence[int]) -> int:
    """Check a payload and scatter it; runs in a thread. Returns its checksum."""
    if payload.nbytes != wire_bytes.part_bytes(header.part):
        raise KvCorrupted(f"frame {header.sequence} has {payload.nbytes} bytes for {header.part}")
    if checksum(payload.data) != header.checksum:
        raise KvCorrupted(f"the checksum of frame {header.sequence} is wrong")
    wire_bytes.unpack(header.part, block_ids, payload)
    return header.checksum


async def _done(copying: asyncio.Future[int]) -> int:
    """Wait for a copy's checksum, or raise its error. Cancelling the waiter does not disown the copy."""
    await asyncio.wait({copying})
    return copying.result()


async def _quiet(copying: asyncio.Future[int]) -> None:
    """Wait until a copy is over, through any number of cancellations; its error has been or will not be asked for."""
    cancelled: asyncio.CancelledError | None = None
    while not copying.done():
        try:
            await asyncio.wait({copying})
        except asyncio.CancelledError as error:
            cancelled = error
    copying.exception()
    if cancelled is not None:
        raise cancelled


def _typed(error: grpc.aio.AioRpcError) -> SplitserveError:
    """What the prefill worker said; a broken link is a failed transfer."""
    typed = from_rpc_error(error)
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return TransferFailed("what was a prefill worker is none any more; prefill it elsewhere")
    if isinstance(typed, Draining | TransferFailed | StaleMessage) or error.code() is not (grpc.StatusCode.UNAVAILABLE):
        return typed
    return TransferFailed(f"the prefill worker cannot be reached any more: {error.details()}")
