"""The few calls of the CUDA runtime that PyTorch does not offer: memory of another process, many copies in one call."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_DEVICE_TO_DEVICE = 3
_IN_STREAM_ORDER = 1
_NON_BLOCKING = 1
_BATCH_FROM_VERSION = 13_000  # earlier runtimes have another signature, or no such call


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class CudaRuntime:
    """The library that PyTorch has loaded. Calls act on the calling thread's current device.

    Raises: OSError: PyTorch is not built for CUDA, or a call fails.
    """

    def __init__(self) -> None:
        if torch.version.cuda is None:
            raise OSError("this PyTorch is built without CUDA")
        self._library = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._driver = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        self._check(self._library.cudaRuntimeGetVersion(ctypes.byref(version)))
        self._has_batches = version.value >= _BATCH_FROM_VERSION

    def export(self, address: int) -> tuple[bytes, int]:
        """A handle by which another process can map the allocation around `address`, and the offset inside it."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        if self._driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)):
            raise OSError(f"{address:#x} is not device memory of this process")
        handle = _Handle()
        self._check(self._library.cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(base.value)))
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES), address - base.value

    def open(self, handle: bytes) -> int:
        """Map the allocation of another process; returns its address here."""
        if len(handle) != HANDLE_BYTES:
            raise OSError(f"a memory handle of {len(handle)} bytes, not {HANDLE_BYTES}")
        pointer = ctypes.c_void_p()
        value = _Handle.from_buffer_copy(handle)
        self._check(self._library.cudaIpcOpenMemHandle(ctypes.byref(pointer), value, ctypes.c_uint(_LAZY_PEER_ACCESS)))
        assert pointer.value is not None
        return pointer.value

    def close(self, address: int) -> None:
        self._check(self._library.cudaIpcCloseMemHandle(ctypes.c_void_p(address)))

    def new_stream(self, priority: int) -> int:
        """A stream that waits for no other, not even for the default one."""
        stream, flags = ctypes.c_void_p(), ctypes.c_uint(_NON_BLOCKING)
        self._check(self._library.cudaStreamCreateWithPriority(ctypes.byref(stream), flags, ctypes.c_int(priority)))
        assert stream.value is not None
        return stream.value

    def copy_rectangle(
        self, target: int, source: int, pitch: int, width: int, height: int, stream: torch.cuda.Stream
    ) -> None:
        """Queue a copy of `height` pieces of `width` bytes, `pitch` bytes apart on both sides."""
        self._check(
            self._library.cudaMemcpy2DAsync(
                ctypes.c_void_p(target),
                ctypes.c_size_t(pitch),
                ctypes.c_void_p(source),
                ctypes.c_size_t(pitch),
                ctypes.c_size_t(width),
                ctypes.c_size_t(height),
                ctypes.c_int(_DEVICE_TO_DEVICE),
                ctypes.c_void_p(stream.cuda_stream),
            )
        )

    def copy_pieces(
        self, targets: NDArray[np.uint64], sources: NDArray[np.uint64], size: int, stream: torch.cuda.Stream
    ) -> None:
        """Queue a copy of each of the `sources` to the target beside it, `size` bytes each."""
        if not self._has_batches:
            for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
                self.copy_rectangle(target, source, size, size, 1, stream)
            return
        count = len(targets)
        sizes = np.full(count, size, dtype=np.uint64)
        attributes = _CopyAttributes(source_access_order=_IN_STREAM_ORDER)
        first = ctypes.c_size_t(0)
        self._check(
            self._library.cudaMemcpyBatchAsync(
                ctypes.c_void_p(targets.ctypes.data),
                ctypes.c_void_p(sources.ctypes.data),
                ctypes.c_void_p(sizes.ctypes.data),
                ctypes.c_size_t(count),
                ctypes.byref(attributes),
                ctypes.byref(first),
                ctypes.c_size_t(1),
                ctypes.c_void_p(stream.cuda_stream),
            )
        )

    def _check(self, code: int) -> None:
        if code:
            text: bytes = self._library.cudaGetErrorString(code)
            self._library.cudaGetLastError()  # or the next call of PyTorch reports it
            raise OSError(f"CUDA error {code}: {text.decode()}")


@cache
def cuda_runtime() -> CudaRuntime:
    """Raises: OSError: there is none."""
    return CudaRuntime()
