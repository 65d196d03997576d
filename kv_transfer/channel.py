"""A channel: one way, one sender, one receiver, one epoch; what gloo and NCCL have in common, and its event loop side.

Control stays on the Fetch stream: a header there says that a payload is ready, and only then is its receive posted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..core.errors import KvCorrupted, TransferFailed

_AHEAD = 2  # payloads posted to a channel at a time: between two of them, its link waits for no thread of ours


class Channel(Protocol):
    """Bytes between two ranks, in the order in which both sides post them. Set up for one epoch and never reused.

    `post` and `wait` block the thread of the lane, with a deadline of the channel's own.
    """

    def post(self, data: Tensor, *, is_send: bool, is_ahead: bool = False) -> Any:
        """Begin to move `data`. Returns what to wait for; None if it may not be posted ahead of others just now.

        Raises: TransferFailed: the peer is gone, or aborted.
        """

    def wait(self, posted: Any, sleep: Callable[[float], None] = time.sleep) -> None:
        """Return when what was sent may be overwritten, or what is received is all there; in the order of posting.

        Args: sleep: for at most so many seconds; it may post.
        Raises: TransferFailed: the peer is gone, silent, or aborted.
        """

    def abort(self) -> None:
        """Any thread, any number of times: wake whoever is blocked, here and at the peer, with TransferFailed."""

    def close(self) -> None:
        """After `abort`, when nothing is blocked any more: free its connections and memory."""


class Meeting(Protocol):
    """The sender's half of a set-up that waits for its one receiver."""

    @property
    def invitation(self) -> bytes: ...  # travels in the answer to Connect: a store's address, an NCCL unique id

    def join(self) -> Channel:
        """Block until the receiver came. Raises: TransferFailed: it did not, within the deadline."""


class Rendezvous(Protocol):
    """A way to set channels up. Each invitation is good for one channel."""

    def invite(self) -> Meeting:
        """Sender: cheap, and blocks on nobody."""

    def accept(self, host: str, invitation: bytes) -> Channel:
        """Receiver: block until both are there. Raises: TransferFailed: not within the deadline."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Payload:
    is_send: bool
    data: Tensor
    posted: Any = None


class Lane:
    """A channel on the event loop, with a thread of its own: payloads move one after the other, by turn.

    Many transfers share a lane. The sender numbers its payloads as it posts them and puts the number into their
    headers; the receiver posts by that number, whatever order the headers of several streams come in. A transfer that
    leaves a turn unused must abort the lane: nothing else can follow it.
    """

    def __init__(self, name: str, open_channel: Callable[[], Channel]) -> None:
        """Begin to set the channel up at once; what is posted meanwhile waits for it."""
        self.name = name
        self.error: TransferFailed | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-lane")
        self._channel: Channel | None = None  # set by the thread
        self._aborted = False
        self._num_posted = 0
        self._payloads: deque[_Payload] = deque()  # appended by the event loop, taken by the thread, never iterated
        self._appended = threading.Event()
        self._due: dict[int, asyncio.Future[None]] = {}  # receives whose turn has not come
        self._opening = self._loop.run_in_executor(self._thread, self._open, open_channel)
        self._opening.add_done_callback(self._opened)

    @property
    def was_open(self) -> bool:
        """It was set up, whatever happened since."""
        return self._opening.done() and not self._opening.cancelled() and self._opening.exception() is None

    async def ready(self) -> None:
        """Wait for the set-up. Raises: TransferFailed."""
        await asyncio.wait({self._opening})
        if self.error is not None:
            raise self.error

    def send(self, data: Tensor) -> tuple[int, asyncio.Future[None]]:
        """Post a payload. Returns its turn, and when it has left. Raises: TransferFailed: the lane was aborted."""
        if self.error is not None:
            raise self.error
        turn, self._num_posted = self._num_posted, self._num_posted + 1
        return turn, self._moving(True, data)

    async def recv(self, turn: int, data: Tensor) -> asyncio.Future[None]:
        """Post the receive of a payload once those before it are posted. Returns when it is complete.

        Raises: TransferFailed: the lane was aborted. KvCorrupted: that turn is over.
        """
        if turn < self._num_posted or turn in self._due:
            raise KvCorrupted(f"{self.name}: payload {turn} was announced a second time")
        if self.error is not None:
            raise self.error
        if turn > self._num_posted:
            self._due[turn] = self._loop.create_future()
            await self._due[turn]
            if self.error is not None:  # since its turn came
                raise self.error
        self._num_posted += 1
        moving = self._moving(False, data)
        if (following := self._due.pop(self._num_posted, None)) is not None and not following.done():
            following.set_result(None)
        return moving

    def _moving(self, is_send: bool, data: Tensor) -> asyncio.Future[None]:
        """In the thread. Its error may find nobody who waits: whoever posted was cancelled, or failed for another."""
        payload = _Payload(is_send=is_send, data=data)
        self._payloads.append(payload)
        self._appended.set()
        moving = self._loop.run_in_executor(self._thread, self._move, payload)
        moving.add_done_callback(lambda done: done.cancelled() or done.exception())
        return moving

    def abort(self, reason: str) -> None:
        """Break the channel, on both sides. Idempotent."""
        if self.error is not None:
            return
        self.error = TransferFailed(f"{self.name} was given up: {reason}")
        for waiter in self._due.values():
            if not waiter.done():
                waiter.set_exception(self.error)
        self._due.clear()
        self._aborted = True
        if self._channel is not None:
            self._channel.abort()
        self._thread.submit(self._drop)  # behind whatever still uses it
        self._thread.shutdown(wait=False)

    # -- in the thread --

    def _open(self, open_channel: Callable[[], Channel]) -> None:
        self._channel = channel = open_channel()
        if self._aborted:  # after it looked whether there was a channel to abort
            channel.abort()

    def _drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _opened(self, opening: asyncio.Future[None]) -> None:
        if not opening.cancelled() and (error := opening.exception()) is not None:
            self.abort(f"it could not be set up: {error}")

    def _move(self, payload: _Payload) -> None:
        """Payloads come here in their order. One that was posted ahead is waited for, whatever happened since: until
        then its memory is the channel's."""
        try:
            if self._channel is None or (self._aborted and payload.posted is None):
                raise TransferFailed(f"{self.name} was given up")
            payload.posted = payload.posted or self._channel.post(payload.data, is_send=payload.is_send)
            self._channel.wait(payload.posted, self._sleep)
        finally:
            self._payloads.remove(payload)
            payload.posted = None  # an error's traceback keeps this frame, and it would keep the channel's connections

    def _sleep(self, seconds: float) -> None:
        """Less if a payload comes behind the one that is waited for: it is posted ahead."""
        self._appended.clear()
        if self._has_following():
            self._post_ahead()
            time.sleep(seconds)
        elif self._appended.wait(seconds) and self._has_following():
            self._post_ahead()

    def _has_following(self) -> bool:
        return len(self._payloads) >= _AHEAD

    def _post_ahead(self) -> None:
        following = self._payloads[_AHEAD - 1]
        if self._channel is not None and not self._aborted and following.posted is None:
            following.posted = self._channel.post(following.data, is_send=following.is_send, is_ahead=True)
