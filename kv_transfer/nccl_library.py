"""The few calls of NCCL that a channel needs, of the library that PyTorch has loaded.

Not PyTorch's own binding: `ProcessGroupNCCL` meets through a store, another port that nobody authenticates, and its
watchdog ends the process when an operation runs out of time; `torch.cuda.nccl` has collectives only. nccl4py would be
one more package to match with PyTorch's CUDA. What is needed of NCCL is a dozen functions, unchanged since 2.18.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

import torch

from ..core.errors import TransferFailed

UNIQUE_ID_BYTES = 128
OLDEST = 21800
_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_UNDEFINED = -(2**31)
_MAGIC = 0xCAFEBEEF
_PAUSE_S, _MAX_PAUSE_S = 20e-6, 1e-3  # between two looks at a communicator


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t as of 2.18; newer libraries fill in what came later."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


class Nccl:
    """Raises: OSError: PyTorch has none, or one older than 2.18."""

    def __init__(self) -> None:
        if torch.version.cuda is None:
            raise OSError("this PyTorch is built without CUDA, so without NCCL")
        self._library = library = ctypes.CDLL("libnccl.so.2")
        library.ncclGetErrorString.restype = ctypes.c_char_p
        library.ncclGetLastError.restype = ctypes.c_char_p
        library.ncclGetLastError.argtypes = (ctypes.c_void_p,)
        library.ncclCommInitRankConfig.argtypes = (
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            _UniqueId,
            ctypes.c_int,
            ctypes.POINTER(_Config),
        )
        # Asked again and again, and answered at once: giving the interpreter away each time would take far longer.
        self._state = ctypes.PyDLL("libnccl.so.2").ncclCommGetAsyncError
        self._state.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
        library.ncclCommAbort.argtypes = (ctypes.c_void_p,)
        transfer = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        library.ncclSend.argtypes = library.ncclRecv.argtypes = transfer
        version = ctypes.c_int()
        library.ncclGetVersion(ctypes.byref(version))
        self.version = version.value
        if self.version < OLDEST:
            raise OSError(f"NCCL {self.version} is older than {OLDEST}")

    def unique_id(self) -> bytes:
        """Names a communicator that is to be; this process listens for who joins. Raises: TransferFailed."""
        value = _UniqueId()
        if code := self._library.ncclGetUniqueId(ctypes.byref(value)):
            raise TransferFailed(f"NCCL cannot listen: {self.error_text(code)}")
        return ctypes.string_at(ctypes.byref(value), UNIQUE_ID_BYTES)

    def begin(self, unique_id: bytes, rank: int, max_ctas: int) -> ctypes.c_void_p:
        """A communicator of two on the thread's device, not ready yet. Raises: TransferFailed."""
        config = _Config(
            size=_Config.split_share.offset + _Config.split_share.size,  # without the padding
            magic=_MAGIC,
            version=OLDEST,
            blocking=0,
            cga_cluster_size=_UNDEFINED,
            min_ctas=_UNDEFINED,
            max_ctas=max_ctas,
            net_name=None,
            split_share=_UNDEFINED,
        )
        communicator = ctypes.c_void_p()
        value = _UniqueId.from_buffer_copy(unique_id)
        code = self._library.ncclCommInitRankConfig(ctypes.byref(communicator), 2, value, rank, ctypes.byref(config))
        if code not in (_SUCCESS, _IN_PROGRESS) or not communicator.value:
            if communicator.value:
                self.abort(communicator)
            raise TransferFailed(f"NCCL refuses a communicator: {self.error_text(code)}")
        return communicator

    def post(self, communicator: ctypes.c_void_p, *, is_send: bool, address: int, size: int, stream: int) -> None:
        """Begin to move bytes to or from the other rank; `is_done` says when it is queued. Raises: TransferFailed."""
        call = self._library.ncclSend if is_send else self._library.ncclRecv
        # Both ranks are named by what they are: 0 sends, 1 receives.
        code = call(address, size, _UINT8, 1 if is_send else 0, communicator, stream)
        if code not in (_SUCCESS, _IN_PROGRESS):
            raise TransferFailed(f"NCCL failed: {self.error_text(code, communicator)}")

    def is_done(self, communicator: ctypes.c_void_p) -> bool:
        """Whether what was begun on the communicator is ready or queued. Raises: TransferFailed: it failed."""
        state = ctypes.c_int()
        code = self._state(communicator, ctypes.byref(state)) or state.value
        if code not in (_SUCCESS, _IN_PROGRESS):
            raise TransferFailed(f"NCCL failed: {self.error_text(code, communicator)}")
        return bool(code == _SUCCESS)

    def abort(self, communicator: ctypes.c_void_p) -> None:
        """End what is under way, here alone, and free the communicator."""
        self._library.ncclCommAbort(communicator)

    def error_text(self, code: int, communicator: ctypes.c_void_p | None = None) -> str:
        text = f"{self._library.ncclGetErrorString(code).decode()} ({code})"
        last = self._library.ncclGetLastError(communicator) or b""
        return f"{text}: {last.decode(errors='replace')}" if last else text


@cache
def nccl() -> Nccl:
    """Raises: OSError: there is none."""
    return Nccl()


def is_available() -> bool:
    """Whether this process could join a communicator: it has a GPU, and a library that is new enough."""
    try:
        return torch.cuda.is_available() and nccl() is not None
    except OSError:
        return False


def wait_until(
    is_done: Callable[[], bool], expected_s: float = 0.0, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Look often, not all the time: each look takes the interpreter from whoever packs the next payload.

    Args:
        expected_s: what it takes at least.
        sleep: for at most so many seconds.
    """
    began_s = time.monotonic()
    while not is_done():
        waited_s = time.monotonic() - began_s
        sleep(max(_PAUSE_S, expected_s - waited_s, min(_MAX_PAUSE_S, waited_s / 16)))
