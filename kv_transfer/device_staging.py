"""Payloads in a GPU's memory: packed, checked and unpacked there, on a stream of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import TransferFailed
from .device_checksum import device_checksum
from .device_layout import DevicePoolBytes
from .frames import KvPart
from .layout import check
from .wire import WireBytes


class DeviceStaging:
    """Beside a pool. Memory comes from PyTorch's allocator, which keeps it for the next payload; how much there can be
    is bounded by what senders may have in flight."""

    def __init__(self, pool: DevicePoolBytes) -> None:
        self._pool = pool
        self._first = torch.zeros(1, dtype=torch.int32, device=pool.device)

    def pack(self, wire_bytes: WireBytes, part: KvPart, block_table: Sequence[int]) -> tuple[Tensor, int]:
        with self._pool.on_own_stream():
            payload = self._room(wire_bytes.part_bytes(part))
            wire_bytes.gather(part, block_table, payload)
            return payload, self._checksum(payload)  # which waits for both

    def room(self, num_bytes: int) -> Tensor:
        with self._pool.on_own_stream():  # its last user has waited for this stream
            return self._room(num_bytes)

    def unpack(
        self, wire_bytes: WireBytes, part: KvPart, block_table: Sequence[int], payload: Tensor, expected: int
    ) -> None:
        with self._pool.on_own_stream() as stream:
            check(self._checksum(payload), expected, part)
            wire_bytes.scatter(part, block_table, payload)
            stream.synchronize()

    def _room(self, num_bytes: int) -> Tensor:
        """[num_bytes], and zeros up to the next whole word of the checksum."""
        try:
            whole = torch.empty(-(-num_bytes // 8) * 8, dtype=torch.uint8, device=self._pool.device)
        except torch.OutOfMemoryError as error:
            raise TransferFailed(
                f"no {num_bytes:,} bytes of GPU memory for KV on its way; lower gpu_memory_fraction"
            ) from error
        whole[num_bytes:].zero_()
        return whole[:num_bytes]

    def _checksum(self, payload: Tensor) -> int:
        words = -(-payload.numel() // 8) * 8
        row = payload.as_strided((1, words), (words, 1))
        return device_checksum(row, self._first, 0, words)
