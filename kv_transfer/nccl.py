"""NCCL: the channel between GPUs of any two hosts, a communicator of two ranks.

Its unique id is the invitation, so who was not answered by `Connect` cannot join. Nothing in it blocks: a set-up and
each payload have a deadline, and what misses it, or fails, aborts the communicator, which is not used again. An abort
is not heard by the other side: the Fetch streams tell it. Few channels (CTAs), and a receive is posted only when the
sender is ready: the posted one spins on the multiprocessors of the decode worker.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ..core.errors import TransferFailed
from .channel import Channel, Meeting
from .cuda import cuda_runtime
from .device_layout import HIGH_PRIORITY
from .nccl_library import UNIQUE_ID_BYTES, nccl, wait_until
from .turns import Turns

logger = logging.getLogger(__name__)

_SENDER, _RECEIVER = 0, 1
MAX_CTAS = 16
_BYTES_PER_S = 400e9  # of the fastest link
# Sends that wait for their receivers hold multiprocessors. With more of them than fit, one whose receiver is ready
# could wait for one whose receiver waits in turn; receives need no bound, since their sends are running.
_sends = threading.BoundedSemaphore(4)
_SLOT_LOOK_S = 0.02  # between two looks whether who waits for one of them was aborted
# Those of communicators that are gone. None of PyTorch's, which hands out the same 32 of a device in turn: a receive
# that spins would hold up the transfers and communicators that got its stream as well.
_idle_streams: defaultdict[torch.device, deque[torch.cuda.Stream]] = defaultdict(deque)
_turns = Turns()
_FREE_PATIENCE_S = 1.0  # less than its receive may spin beside a decode step
# NCCL ends a communicator's kernels at once, looks half a second later whether its threads may go, and then frees its
# memory. Who makes one meanwhile is connected before that, or waits for what is left.
_MAKE_PATIENCE_S = 0.25


class NcclRendezvous:
    """Sets communicators up.

    Args:
        device: of the pool.
        set_up_s: how long both sides may take to meet.
        stall_s: how long one payload may take.
        max_ctas: of a communicator: multiprocessors that a transfer takes from the model.
    """

    def __init__(
        self, device: torch.device, *, set_up_s: float = 5.0, stall_s: float = 5.0, max_ctas: int | None = None
    ) -> None:
        self._device = device
        self._set_up_s = set_up_s
        self._stall_s = stall_s
        self._max_ctas = MAX_CTAS if max_ctas is None else max_ctas

    def invite(self) -> Meeting:
        unique_id = nccl().unique_id()
        return _NcclMeeting(unique_id, lambda: self._open(unique_id, _SENDER))

    def accept(self, host: str, invitation: bytes) -> Channel:
        if len(invitation) != UNIQUE_ID_BYTES:
            raise TransferFailed(f"{host} invites with {len(invitation)} bytes, not {UNIQUE_ID_BYTES}")
        return self._open(invitation, _RECEIVER)

    def _open(self, unique_id: bytes, rank: int) -> Channel:
        return NcclChannel(
            self._device, unique_id, rank, set_up_s=self._set_up_s, stall_s=self._stall_s, max_ctas=self._max_ctas
        )


class _NcclMeeting:
    def __init__(self, invitation: bytes, join: Callable[[], Channel]) -> None:
        self.invitation = invitation
        self.join = join


class _Posted:
    """A payload that NCCL has queued."""

    def __init__(self, num_bytes: int, *, is_send: bool) -> None:
        self.what = "sending" if is_send else "receiving"
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.expected_s = num_bytes / _BYTES_PER_S
        self._holds_slot = is_send

    def free(self) -> None:
        """Its kernel holds no multiprocessors any more. Idempotent."""
        if self._holds_slot:
            self._holds_slot = False
            _sends.release()


class NcclChannel:
    """A communicator of two. The constructor blocks until a first byte has gone over it, or the deadline has passed.

    One thread makes and uses it; `abort` alone may come from another one.
    """

    def __init__(
        self, device: torch.device, unique_id: bytes, rank: int, *, set_up_s: float, stall_s: float, max_ctas: int
    ) -> None:
        self._device = device
        self._stall_s = stall_s
        self._aborted = threading.Event()
        self._communicator: ctypes.c_void_p | None = None
        self._stream: torch.cuda.Stream | None = None
        self._unfinished: set[_Posted] = set()  # one that was posted ahead is waited for by nobody after an abort
        deadline_s = time.monotonic() + set_up_s
        with self._whole(), _turns.making(_MAKE_PATIENCE_S), torch.cuda.device(device):
            self._communicator = nccl().begin(unique_id, rank, max_ctas)
            self._wait("set up", self._is_ready, deadline_s)
            self._stream = _take_stream(device)
            # The first bytes connect the two GPUs and load the kernels: not the first payload's business.
            first = self._post(_first_bytes(device), _Posted(8, is_send=False), rank, deadline_s)
            self._wait("set up", first.done.query, deadline_s)

    def post(self, data: Tensor, *, is_send: bool, is_ahead: bool = False) -> _Posted | None:
        with self._whole():
            while is_send and not _sends.acquire(timeout=0.0 if is_ahead else _SLOT_LOOK_S):
                if is_ahead:
                    return None
                if self._aborted.is_set():
                    raise TransferFailed("NCCL was aborted before a payload could be sent")
            posted = _Posted(data.numel(), is_send=is_send)
            self._unfinished.add(posted)
            return self._post(data, posted, _SENDER if is_send else _RECEIVER, time.monotonic() + self._stall_s)

    def wait(self, posted: _Posted, sleep: Callable[[float], None] = time.sleep) -> None:
        try:
            with self._whole():
                if self._communicator is None:
                    raise TransferFailed(f"the NCCL communicator was aborted while {posted.what}")
                deadline_s = time.monotonic() + self._stall_s
                self._wait(posted.what, posted.done.query, deadline_s, sleep, posted.expected_s)
        finally:
            posted.free()
            self._unfinished.discard(posted)

    def _post(self, data: Tensor, posted: _Posted, rank: int, deadline_s: float) -> _Posted:
        if self._communicator is None or self._stream is None:
            raise TransferFailed("the NCCL communicator was aborted before")
        with torch.cuda.device(self._device):
            nccl().post(
                self._communicator,
                is_send=rank == _SENDER,
                address=data.data_ptr(),
                size=data.numel(),
                stream=self._stream.cuda_stream,
            )
            self._wait(posted.what, self._is_ready, deadline_s)  # only now its kernel is queued
            posted.done.record(self._stream)
        return posted

    def abort(self) -> None:
        """The thread that waits sees it; nobody else touches the communicator."""
        self._aborted.set()

    def close(self) -> None:
        self._give_up()

    def _is_ready(self) -> bool:
        assert self._communicator is not None
        return nccl().is_done(self._communicator)

    def _wait(
        self,
        what: str,
        is_done: Callable[[], bool],
        deadline_s: float,
        sleep: Callable[[float], None] = time.sleep,
        expected_s: float = 0.0,
    ) -> None:
        """Raises: TransferFailed: aborted, too late, or NCCL failed."""

        def is_over() -> bool:
            if is_done():
                return True
            if self._aborted.is_set():
                raise TransferFailed(f"NCCL was aborted while {what}")
            if time.monotonic() > deadline_s:
                raise TransferFailed(f"NCCL made no progress while {what}; the peer is gone or silent")
            self._is_ready()  # a peer on another host that is gone is told of here
            return False

        wait_until(is_over, expected_s, sleep)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails here ends the communicator. Raises: TransferFailed, also for what PyTorch says of the GPU."""
        try:
            yield
        except BaseException as error:
            self._give_up()
            if isinstance(error, RuntimeError | OSError):
                raise TransferFailed(f"the GPU failed a transfer by NCCL: {error}") from error
            raise

    def _give_up(self) -> None:
        """Abort and wait until no kernel of ours touches a payload any more."""
        communicator, self._communicator = self._communicator, None
        try:
            if communicator is not None:
                with _turns.freeing(_FREE_PATIENCE_S), torch.cuda.device(self._device):
                    nccl().abort(communicator)
                    if self._stream is not None:
                        self._stream.synchronize()
                        _idle_streams[self._device].append(self._stream)
        except RuntimeError:  # of a GPU that is lost, and writes nothing either
            logger.exception("a GPU failed while an NCCL communicator was given up")
        finally:
            while self._unfinished:
                self._unfinished.pop().free()


def _take_stream(device: torch.device) -> torch.cuda.Stream:
    """Nobody else's. On the thread's device."""
    try:
        return _idle_streams[device].pop()
    except IndexError:
        handle = cuda_runtime().new_stream(HIGH_PRIORITY)
        return torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]


@cache
def _first_bytes(device: torch.device) -> Tensor:
    """[8] uint8 that every set-up on a device moves, and nobody reads."""
    data = torch.zeros(8, dtype=torch.uint8, device=device)
    torch.cuda.current_stream(device).synchronize()
    return data
