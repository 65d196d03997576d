"""One stream of an outgoing transfer: its frames in order, as far ahead of the wire as may be in flight, then END."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from ..core.errors import StaleMessage, TransferFailed, TransferInterrupted
from ..core.metrics import WorkerMetrics
from ..proto import kv_transfer_pb2 as pb
from . import framing
from .capability import sign_end
from .channel import Lane
from .codecs import GROUP_TOKENS
from .frames import HEADER_BYTES, FrameKind, KvPart, RunningDigest
from .in_flight import InFlight
from .layout import PoolBytes
from .outgoing import Outgoing, SentFrame
from .packing import Apart, Packed, Packer, Way

WAIT_INTERVAL_S = 1.0

Write = Callable[[bytes], Awaitable[None]]


class Sending:
    """Of one pool; lives on the event loop, packs in threads of its own."""

    def __init__(self, packer: Packer, pool_bytes: PoolBytes, metrics: WorkerMetrics | None) -> None:
        self._packer = packer
        self._bytes = pool_bytes
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="kv-pack")
        # One is enough at memory speed, and a host's other cores are for those who copy meanwhile.
        self._checking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-check")
        self.in_flight = InFlight(link_bytes=framing.MAX_LINK_BYTES, total_bytes=framing.MAX_BYTES)
        self._on_device = InFlight(link_bytes=framing.MAX_DEVICE_LINK_BYTES, total_bytes=framing.MAX_DEVICE_BYTES)

    def close(self) -> None:
        for threads in (self._threads, self._checking):
            threads.shutdown(wait=False, cancel_futures=True)

    async def send(self, out: Outgoing, stream: object, write: Write, way: Way) -> None:
        """Send parts as they become ready, behind those of `out.sent`, then END.

        Raises: StaleMessage: a newer Fetch took over. TransferInterrupted: the channel broke. The error that the
            request ended with.
        """
        framing, lane = way.framing, way.lane
        in_flight = self._on_device if framing.on_device else self.in_flight
        lossy = not framing.mapped and out.grant.wire.is_lossy
        sent = out.sent  # a newer stream has a list of its own
        digest = RunningDigest(out.grant, out.token_ids)  # before prefill ends: what follows is what a token waits for
        granularity = self._bytes.block_size if framing.mapped else GROUP_TOKENS if lossy else 1
        out.progress.restart(
            granularity,
            (frame.part for frame in sent),
            wake_bytes=framing.wake_bytes,
            wake_share=framing.wake_share,
        )
        summing = self._threads if framing.on_device else self._checking
        checks = [self._check(out, frame.part, summing) for frame in sent if frame.has_late_checksum]
        write_s = left_s = 0.0
        parts: deque[KvPart] = deque()  # taken and not sent
        packed: asyncio.Future[Packed] | None = None
        leaving: asyncio.Future[None] | None = None  # the payload before, in the lane
        largest = framing.max_bytes * 3 // 2  # see KvProgress.take
        link = f"{out.grant.decode_boot_id}/{out.grant.decode_rank}"
        held: deque[int] = deque()  # bytes of the pieces that count as in flight, oldest first

        def left(size: int, posted_s: float, _: asyncio.Future[None]) -> None:
            """The lane has moved a payload, or failed to; it moves one after the other."""
            nonlocal write_s, left_s
            in_flight.give(link, size)
            began_s, left_s = max(posted_s, left_s), time.monotonic()
            write_s += left_s - began_s

        async def say_wait() -> None:
            await write(self._packer.control(out.grant, FrameKind.WAIT, len(sent), round_number=way.round))

        async def wait(*futures: asyncio.Future[Any]) -> None:
            """Until they are done; none is cancelled. What others hold up must not look like our silence."""
            pending = {future for future in futures if not future.done()}
            while pending:
                _, pending = await asyncio.wait(pending, timeout=WAIT_INTERVAL_S)
                if pending:
                    await say_wait()

        try:
            while True:
                frame = await packed if packed is not None else None
                packed = None
                _check_newest(out, stream)  # behind the wait: what is taken next would be a newer stream's
                # Packed ahead only where there is room at once: who waits for room must hold nothing.
                may_pack = framing.mapped or frame is None or in_flight.has_room(link, largest)
                if (
                    not out.finished
                    and may_pack
                    and (part := out.progress.take(framing.max_bytes, whole_rows=framing.mapped)) is not None
                ):
                    if not framing.mapped:
                        size = out.wire_bytes.part_bytes(part)
                        await in_flight.take(link, size, wait)
                        held.append(size)
                    number = len(sent) + (frame is not None)
                    if framing.mapped:  # block numbers are at hand sooner than a thread
                        packed = self._loop.create_future()
                        packed.set_result(self._pack(out, part, number, way))
                        if framing.on_device:  # a kernel is at work at once, and holds nobody up
                            checks.append(self._check(out, part, summing))
                    else:
                        packed = self._loop.run_in_executor(self._threads, self._pack, out, part, number, way)
                    parts.append(part)
                if frame is not None:
                    began_s = time.monotonic()
                    if lane is not None and isinstance(frame, Apart):
                        if leaving is not None and leaving.done():
                            _check_left(leaving)
                        turn, leaving = _post(lane, frame)
                        leaving.add_done_callback(partial(left, held.popleft(), began_s))
                        frame = replace(frame.header, turn=turn).pack()
                    assert isinstance(frame, bytes)
                    part = parts.popleft()
                    sent.append(
                        SentFrame(
                            header=frame[:HEADER_BYTES],
                            part=part,
                            num_bytes=(self._bytes if framing.mapped else out.wire_bytes).part_bytes(part),
                            has_late_checksum=framing.mapped,
                        )
                    )
                    await write(frame)
                    if framing.mapped and not framing.on_device:  # who is to copy it begins first
                        _check_newest(out, stream)  # since it was written
                        checks.append(self._check(out, part, summing))
                    if lane is None:
                        if held:
                            in_flight.give(link, held.popleft())
                        write_s += time.monotonic() - began_s
                elif packed is None:
                    if out.first_token_id is not None and (out.finished or out.progress.all_taken):
                        break
                    if not await is_set(out.changed, WAIT_INTERVAL_S):
                        await say_wait()
                    out.changed.clear()
            await wait(*checks, *([leaving] if leaving is not None else []))
            if leaving is not None:
                _check_left(leaving)
            checksums = [check.result() for check in checks]
            _check_newest(out, stream)
        except BaseException:
            if lane is not None and leaving is not None:  # its turn may never be taken
                lane.abort(f"{out.grant} ended before its last frame")
            raise
        finally:
            for future in (packed, *checks):
                if future is not None:
                    future.cancel()
            for size in held:
                in_flight.give(link, size)
        for done in sent:
            digest.add(done.header)
        digest.add_checksums(checksums)
        out.digest = digest.digest()
        end = pb.TransferEnd(
            first_token_id=out.first_token_id,
            finished=out.finished,
            num_frames=len(sent),
            num_bytes=(num_bytes := sum(done.num_bytes for done in sent)),
            digest=out.digest,
            checksums=checksums,
            since_prefill_end_s=time.monotonic() - out.prefill_ended_s,
            write_s=write_s,
            prefill_s=out.prefill_ended_s - (out.prefill_began_s or out.prefill_ended_s),
        )
        sign_end(out.grant, end)
        last = self._packer.control(
            out.grant, FrameKind.END, len(sent), end.SerializeToString(), round_number=way.round
        )
        await write(last)
        if self._metrics is not None:
            counted = max(num_bytes, out.num_counted)  # what a resumed transfer repeats may take fewer, coded
            self._metrics.transfer_bytes.inc(counted - out.num_counted)
            out.num_counted = counted

    def _pack(self, out: Outgoing, part: KvPart, sequence: int, way: Way) -> Packed:
        """Runs in a thread, if it moves KV."""
        return self._packer.pack(out.grant, out.block_table, out.wire_bytes, part, sequence, way)

    def _check(self, out: Outgoing, part: KvPart, threads: ThreadPoolExecutor) -> asyncio.Future[int]:
        """Begin to compute the checksum of a part's blocks."""
        return self._loop.run_in_executor(threads, self._packer.checksum, out.grant, out.block_table, part)


def _check_newest(out: Outgoing, stream: object) -> None:
    """Raises: StaleMessage. The error that the request ended with."""
    if out.error is not None:
        raise out.error
    if out.stream is not stream:
        raise StaleMessage(f"{out.grant}: a newer Fetch replaced this one")


def _check_left(leaving: asyncio.Future[None]) -> None:
    """Raises: TransferInterrupted: the lane could not move a payload."""
    try:
        leaving.result()
    except TransferFailed as error:
        raise TransferInterrupted(error.message) from error


def _post(lane: Lane, frame: Apart) -> tuple[int, asyncio.Future[None]]:
    """Raises: TransferInterrupted: another transfer broke the lane."""
    try:
        return lane.send(frame.payload)
    except TransferFailed as error:
        raise TransferInterrupted(error.message) from error


async def is_set(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event; False when the time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
