"""One stream of an incoming transfer: each frame is judged, copied into our blocks and checked; then the end of all."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from operator import itemgetter
from typing import Any

import grpc
import grpc.aio
import numpy as np
from torch import Tensor

from ..core.errors import KvCorrupted, SplitserveError, StaleMessage, TransferFailed, TransferInterrupted
from ..core.metrics import WorkerMetrics
from ..proto import kv_transfer_pb2 as pb
from ..proto.rpc import from_rpc_error, is_typed
from .capability import Granter
from .channel import Lane
from .channels import staging_of
from .codecs import WireFormat
from .frames import HEADER_BYTES, FrameHeader, FrameKind
from .grants import Grant
from .host_copies import Bytes
from .incoming import Incoming
from .layout import PoolBytes
from .peer import MAPPED, TRANSPORT_NAMES, LinkClosed, Peer, ask
from .pool import KvPool
from .staging import Staging
from .wire import WireBytes

_AHEAD_S = 1e-3  # a frame that was waited for came while later ones are being computed


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
    write_s: float = 0.0  # that the sender's writes took, or a channel's payloads, in the last stream
    prefill_s: float = 0.0  # from the first KV that prefill wrote to its end


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    """One grant's KV on its way in, over as many streams as it takes."""

    grant: Grant
    block_ids: Sequence[int]
    on_end: Callable[[], None]
    incoming: Incoming
    checksums: list[int] = field(default_factory=list)  # of the frames that are in our blocks, in order
    copying: deque[asyncio.Future[int]] = field(default_factory=deque)  # frames that arrived since, in order
    started_s: float | None = None  # first KV frame of all streams
    round: int = 0
    was_told: bool = False  # that the end of all KV came
    was_open: bool = False  # the last stream began
    is_link_lost: bool = False  # as far as the last stream saw
    is_over: bool = False  # the prefill worker gave it up, or its KV is not what was granted: no other stream helps

    @property
    def num_kept(self) -> int:
        return len(self.checksums)

    def tell_end(self) -> None:
        """Once, whatever has to come again."""
        if self.incoming.is_covered and not self.was_told:
            self.was_told = True
            self.on_end()

    async def settle(self, most: int = 0) -> None:
        """Wait until at most so many copies run. Raises: their error. Cancelling the waiter does not disown them."""
        while len(self.copying) > most:
            await asyncio.wait({self.copying[0]})
            self.checksums.append(self.copying[0].result())
            self.copying.popleft()

    async def quiet(self) -> None:
        """Wait until no copy runs, through any number of cancellations; those before the first that failed count."""
        cancelled: asyncio.CancelledError | None = None
        while not all(copy.done() for copy in self.copying):
            try:
                await asyncio.wait(self.copying)
            except asyncio.CancelledError as error:
                cancelled = error
        whole = [not copy.cancelled() and copy.exception() is None for copy in self.copying]  # asks each for its error
        self.checksums += [copy.result() for copy, _ in takewhile(itemgetter(1), zip(self.copying, whole, strict=True))]
        self.copying.clear()
        if cancelled is not None:
            raise cancelled


class LaneGone(StaleMessage):
    """The sender may have given up a lane that we still held for good; if so, another fetch over a new one works."""


class Fetcher:
    """Of one pool; lives on the event loop, copies in threads of its own."""

    def __init__(
        self,
        pool: KvPool,
        pool_bytes: PoolBytes,
        granter: Granter,
        *,
        metrics: WorkerMetrics | None,
        silence_s: float,
        stall_s: float,
        pause: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._pool = pool
        self._bytes = pool_bytes
        self._granter = granter
        self._metrics = metrics
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._pause = pause
        self._stagings: dict[int, Staging] = {}  # by transport
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="kv-unpack")
        # Of one transfer, so that a thread has the next frame at hand; a GPU's have a queue of their own.
        self._most_copies = 2 if pool.keys(0).device.type == "cpu" else 1

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    async def fetch(self, peer: Peer, transfer: Transfer, instead: pb.Transport.ValueType | None = None) -> Received:
        """Ask a stream for what is missing, and take all of it. Nothing writes to the blocks when this is left.

        Args: instead: of the link's transport.
        Raises: TransferFailed, and what the prefill worker says; `transfer` tells whether another stream can help.
        """
        grant, incoming = transfer.grant, transfer.incoming
        # A peer's mapped pool is copied by whole blocks; a prefix hit that ends inside a block cannot be added to.
        whole = grant.num_cached_tokens % self._pool.block_size == 0
        transport = (instead or peer.transport) if whole else pb.TRANSPORT_GRPC
        mapped = transport in MAPPED
        lane = peer.lane if transport == peer.transport else None
        wire = WireFormat(codec="none", dtype=self._pool.geometry.dtype) if mapped else grant.wire
        wire_bytes = WireBytes(self._bytes, self._pool.geometry, wire)
        incoming.begin(transfer.round, wire, num_kept=transfer.num_kept, late_checksums=mapped)
        request: pb.FetchRequest | None = pb.FetchRequest(
            grant=grant.to_peer(),
            transport=transport,
            link_epoch=peer.link_epoch,
            proof=self._granter.proof(grant),
            round=transfer.round,
            num_kept=transfer.num_kept,
        )
        transfer.was_open, transfer.is_link_lost, transfer.is_over = True, False, False
        has_begun = is_whole = False
        call = peer.stream()
        try:
            while True:
                asked_s = time.monotonic()
                frame = await self._next_frame(call, transfer, self._stall_s if has_begun else self._silence_s, request)
                is_ahead = time.monotonic() - asked_s > _AHEAD_S
                request = None
                header = FrameHeader.unpack(frame)
                if incoming.is_stale(header):
                    self._count_stale()
                elif header.kind is FrameKind.END:
                    transfer.tell_end()
                    break
                elif header.kind is not FrameKind.WAIT:
                    has_begun = True
                    transfer.started_s = transfer.started_s or time.monotonic()
                    incoming.accept_data(header, frame)
                    if (header.kind is FrameKind.APART) != (lane is not None):
                        raise KvCorrupted(f"{grant}: frame {header.sequence} came by another transport than agreed")
                    payload = None
                    if lane is not None:  # posted at once, so that others' turns can follow
                        payload = self._staging(transport).room(wire_bytes.part_bytes(header.part))
                        moving = await self._post(lane, header, payload)
                    await transfer.settle(self._most_copies - 1)
                    # The last one is what a token waits for, and so are those that were there already. NCCL's sender
                    # waits for each.
                    can_wait = transport == pb.TRANSPORT_CUDA_IPC and is_ahead and not incoming.is_covered
                    if can_wait and self._pause is not None:
                        await self._pause()
                    if payload is not None:
                        staging = self._staging(transport)
                        moved = self._copy_moved(moving, staging, wire_bytes, header, payload, transfer.block_ids)
                        transfer.copying.append(asyncio.ensure_future(moved))
                    else:
                        transfer.copying.append(
                            self._copy(peer, wire_bytes, header, frame, transfer.block_ids, mapped=mapped)
                        )
            ended_s = time.monotonic()
            await transfer.settle()
            end = self._accept_end(transfer, header, memoryview(frame)[HEADER_BYTES:])
            is_whole = True
        except (SplitserveError, asyncio.CancelledError) as error:
            # A turn of ours may never be taken. Cancelled before anything came, a transfer leaves the lane to others;
            # if the sender saw it otherwise, its answer to the next one is StaleMessage.
            if lane is not None and (has_begun or isinstance(error, StaleMessage | TransferFailed)):
                lane.abort(f"{grant} ended before its last frame")
                if not has_begun and type(error) is StaleMessage:
                    raise LaneGone(error.message) from error
            raise
        finally:
            if not is_whole:
                call.cancel()
            await transfer.quiet()
        peer.keep(call)
        verified_s = time.monotonic()
        started_s = ended_s if transfer.started_s is None else transfer.started_s
        return Received(
            first_token_id=end.first_token_id,
            finished=end.finished,
            transport=TRANSPORT_NAMES[transport],
            num_bytes=incoming.num_bytes,
            transfer_s=verified_s - started_s,
            transfer_exposed_s=end.since_prefill_end_s + verified_s - ended_s,
            digest=incoming.digest,
            started_at_s=started_s,
            write_s=end.write_s,
            prefill_s=end.prefill_s,
        )

    def _accept_end(self, transfer: Transfer, header: FrameHeader, payload: memoryview) -> pb.TransferEnd:
        """Raises: KvCorrupted: not all that was announced is in our blocks, unchanged."""
        incoming = transfer.incoming
        late = [transfer.checksums[number] for number in incoming.late_frames]
        try:
            end = incoming.accept_end(header, payload, late)
            self._check_source(transfer.grant, end)
        except KvCorrupted:
            if incoming.first_damaged is not None:
                del transfer.checksums[incoming.first_damaged :]
            else:
                transfer.is_over = incoming.end_was_read
            raise
        return end

    async def _next_frame(
        self, call: Any, transfer: Transfer, timeout_s: float, request: pb.FetchRequest | None
    ) -> bytes:
        """Args: request: to be sent first."""
        try:
            frame = await ask(call, request, timeout_s)
        except TimeoutError:
            raise TransferFailed(
                f"{transfer.grant}: the prefill worker said nothing for {timeout_s:g} s; prefill it again"
            ) from None
        except grpc.aio.AioRpcError as error:
            typed = _said(error)
            transfer.is_link_lost = typed is None
            transfer.is_over = typed is not None and not isinstance(typed, TransferInterrupted)
            raise typed or TransferFailed(
                f"{transfer.grant}: the prefill worker cannot be reached any more: {error.details()}"
            ) from error
        except LinkClosed as error:
            transfer.is_link_lost = True
            raise TransferFailed(f"{transfer.grant}: {error.message}") from None
        if frame is grpc.aio.EOF:
            raise TransferFailed(f"{transfer.grant}: the stream ended before its last frame; prefill it again")
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
            return peer.pool.copy(part, source, self._bytes, target)

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
    wire_bytes.unpack(header.part, block_ids, payload, header.checksum)
    return header.checksum


def _said(error: grpc.aio.AioRpcError) -> SplitserveError | None:
    """What the prefill worker said; None: it is the link that broke."""
    if is_typed(error):
        return from_rpc_error(error)
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return TransferFailed("what was a prefill worker is none any more; prefill it elsewhere")
    return None  # a lost connection, or bytes that gRPC itself cannot read, such as a length with a flipped bit
