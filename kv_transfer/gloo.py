"""gloo: the channel of CPUs, where NCCL has none. A process group of two, which meet over a connection of their own."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch._C._distributed_c10d import Store

from ..core.errors import TransferFailed
from .channel import Channel, Meeting

_SENDER, _RECEIVER = 0, 1
_PAYLOAD, _NEVER_SENT = 0, 1  # tags
_TOKEN_BYTES, _TOKEN_S = 16, 0.5  # the receiver sends it at once; who is silent for longer is a stranger
_HEADER = struct.Struct("!II")  # bytes of a key and of its value
_MAX_ENTRY = 1 << 16  # bytes; gloo's addresses have hundreds
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
            port, token = invitation.decode().split()
            give_up_s = time.monotonic() + self._set_up_s
            with socket.create_connection((host, int(port)), timeout=self._set_up_s) as link:
                link.sendall(bytes.fromhex(token))
                return GlooChannel(_PairStore(link, give_up_s), _RECEIVER, link.getsockname()[0], self._stall_s)
        except (RuntimeError, ValueError, OverflowError, OSError) as error:
            raise TransferFailed(f"no gloo group with {host} within {self._set_up_s:g} s: {error}") from error


class _GlooMeeting:
    def __init__(self, host: str, set_up_s: float, stall_s: float) -> None:
        self._host, self._set_up_s, self._stall_s = host, set_up_s, stall_s
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = socket.create_server((host, 0))
        self.invitation = f"{self._listener.getsockname()[1]} {self._token.hex()}".encode()

    def join(self) -> Channel:
        give_up_s = time.monotonic() + self._set_up_s
        try:
            with self._listener, self._invited(give_up_s) as link:
                return GlooChannel(_PairStore(link, give_up_s), _SENDER, self._host, self._stall_s)
        except (RuntimeError, ValueError, OSError) as error:
            raise TransferFailed(f"no receiver joined the gloo group within {self._set_up_s:g} s: {error}") from error

    def _invited(self, give_up_s: float) -> socket.socket:
        """Whoever shows the invitation. Raises: OSError: nobody did in time."""
        while True:
            _set_deadline(self._listener, give_up_s)
            link, _ = self._listener.accept()
            with contextlib.suppress(OSError):
                if hmac.compare_digest(_read(link, _TOKEN_BYTES, time.monotonic() + _TOKEN_S), self._token):
                    return link
            link.close()


class _PairStore(Store):
    """What the two tell each other to become a group, over one connection.

    PyTorch's TCPStore now and then does not answer its first client at all: 1 to 3 in 100 in a loop on one machine.

    Args: give_up_s: when the peer must have said all (monotonic).
    """

    def __init__(self, link: socket.socket, give_up_s: float) -> None:
        super().__init__()
        self._link = link
        self._give_up_s = give_up_s
        self._entries: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._entries[key] = value
        self._link.sendall(_HEADER.pack(len(key), len(value)) + key.encode() + value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """The deadline of the whole counts. Raises: OSError: the peer is silent or gone."""
        while not all(key in self._entries for key in keys):
            key_bytes, value_bytes = _HEADER.unpack(self._read(_HEADER.size))
            if key_bytes + value_bytes > _MAX_ENTRY:
                raise ConnectionError(f"an entry of {key_bytes + value_bytes:,} bytes came")
            key = self._read(key_bytes).decode()
            self._entries[key] = self._read(value_bytes)

    def _read(self, num_bytes: int) -> bytes:
        return _read(self._link, num_bytes, self._give_up_s)


def _set_deadline(link: socket.socket, give_up_s: float) -> None:
    """Raises: TimeoutError: it is past."""
    if (left_s := give_up_s - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    link.settimeout(left_s)


def _read(link: socket.socket, num_bytes: int, give_up_s: float) -> bytes:
    """Raises: OSError: they do not come in time."""
    data = b""
    while len(data) < num_bytes:
        _set_deadline(link, give_up_s)
        if not (part := link.recv(num_bytes - len(data))):
            raise ConnectionError("the peer closed the connection")
        data += part
    return data


class GlooChannel:
    """A pair group. The constructor blocks until both are there, as long as the store allows."""

    def __init__(self, store: Store, rank: int, address: str, stall_s: float) -> None:
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

    def wait(self, posted: Any, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(0.0)
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
