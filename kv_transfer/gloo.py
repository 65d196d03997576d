"""gloo: the channel of CPUs, where NCCL has none. A process group of two, with a store and a port of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from ..core.errors import TransferFailed
from .channel import Channel, Meeting

_SENDER, _RECEIVER = 0, 1
_PAYLOAD, _NEVER_SENT = 0, 1  # tags
_ProcessGroupGloo: Any = torch.distributed.ProcessGroupGloo  # its stub has no options, sends and receives


class GlooRendezvous:
    """Sets pair groups up.

    Args:
        host: the address that senders listen on.
        set_up_s: how long both sides may take to meet.
        stall_s: how long one payload may take.
    """

    def __init__(self, host: str = "127.0.0.1", *, set_up_s: float = 5.0, stall_s: float = 5.0) -> None:
        self._host = host
        self._set_up_s = set_up_s
        self._stall_s = stall_s

    def invite(self) -> Meeting:
        return _GlooMeeting(self._host, self._set_up_s, self._stall_s)

    def accept(self, host: str, invitation: bytes) -> Channel:
        try:
            store = TCPStore(
                host,
                int(invitation),
                world_size=2,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self._set_up_s),
            )
            return GlooChannel(store, _RECEIVER, _address_towards(host, int(invitation)), self._stall_s)
        except (RuntimeError, ValueError, OSError) as error:
            raise TransferFailed(f"no gloo group with {host} within {self._set_up_s:g} s: {error}") from error


class _GlooMeeting:
    def __init__(self, host: str, set_up_s: float, stall_s: float) -> None:
        self._host, self._set_up_s, self._stall_s = host, set_up_s, stall_s
        listener = socket.create_server((host, 0))  # by itself, TCPStore would listen on every interface
        self.invitation = str(listener.getsockname()[1]).encode()
        self._store = TCPStore(
            host,
            listener.getsockname()[1],
            world_size=2,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=set_up_s),
            master_listen_fd=listener.detach(),
        )

    def join(self) -> Channel:
        try:
            return GlooChannel(self._store, _SENDER, self._host, self._stall_s)
        except RuntimeError as error:
            raise TransferFailed(f"no receiver joined the gloo group within {self._set_up_s:g} s: {error}") from error


class GlooChannel:
    """A pair group. The constructor blocks until both are there, as long as the store's timeout allows."""

    def __init__(self, store: TCPStore, rank: int, address: str, stall_s: float) -> None:
        options = _ProcessGroupGloo._Options()
        options._devices = [_ProcessGroupGloo.create_device(hostname=address)]
        options._threads = 1
        options._timeout = timedelta(seconds=stall_s)
        self._group = _ProcessGroupGloo(store, rank, 2, options)
        self._peer = 1 - rank
        self._abort_once = threading.Lock()

    def post(self, data: Tensor, *, is_send: bool, is_ahead: bool = False) -> Any:
        try:
            begin = self._group.send if is_send else self._group.recv
            return begin([data], self._peer, _PAYLOAD)
        except RuntimeError as error:
            raise TransferFailed(f"the gloo group broke: {error}") from error

    def wait(self, posted: Any, meanwhile: Callable[[], None] = lambda: None) -> None:
        meanwhile()
        try:
            posted.wait()
        except RuntimeError as error:
            posted = None  # the traceback keeps this frame, and it would keep the group's connections
            raise TransferFailed(f"the gloo group broke while sending or receiving: {error}") from error

    def abort(self) -> None:
        """gloo has no abort of its own, but a wait that runs out of time breaks every connection of its group."""
        if not self._abort_once.acquire(blocking=False):
            return
        try:
            self._group.recv([torch.empty(1)], self._peer, _NEVER_SENT).wait(timedelta(milliseconds=1))
        except RuntimeError:
            return  # that is what was asked for

    def close(self) -> None:
        self._group = None  # tracebacks of what failed refer to this object, so it cannot wait to be collected


def _address_towards(host: str, port: int) -> str:
    """Our address on the way to the peer; a datagram socket finds it without sending anything."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        address: str = probe.getsockname()[0]
        return address
