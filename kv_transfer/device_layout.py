"""Byte views of a KV pool in a GPU's memory: checksums computed there, parts packed there and copied to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .device_checksum import device_checksum
from .frames import KvPart
from .layout import Ids, PoolBytes
from .pool import KvPool

HIGH_PRIORITY = -1  # a kernel of microseconds goes before the next wave of a step's large ones


class DevicePoolBytes(PoolBytes):
    """Works on a stream of its own, so that it never waits for a step, and blocks until the result is there.

    Its callers are threads of transfers: each call makes the pool's device theirs.
    """

    def __init__(self, pool: KvPool, first_heads: Sequence[int] | None = None) -> None:
        self.device = pool.keys(0).device
        super().__init__(pool, first_heads)
        self._stream = torch.cuda.Stream(self.device, HIGH_PRIORITY)  # type: ignore[no-untyped-call]

    def _array(self, view: Tensor) -> Any:
        return view

    def checksum(self, part: KvPart, block_ids: Ids) -> int:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return self.checksum_here(part, self.on_device(block_ids))

    def on_device(self, block_ids: Ids) -> Tensor:
        """[n] int32, copied on the current stream."""
        return torch.from_numpy(block_ids.astype(np.int32)).to(self.device)

    def checksum_here(self, part: KvPart, block_ids: Tensor) -> int:
        """The checksum, behind whatever the current stream has to do."""
        span = self.row_range(part)
        value = device_checksum(self.rows, block_ids, span.start, span.stop - span.start)
        return int(value.item()) & (2**64 - 1)

    def pack(self, part: KvPart, block_table: Sequence[int], out: Any) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            flat = torch.empty(self.part_bytes(part), dtype=torch.uint8, device=self.device)
            super().pack(part, block_table, flat)
            out[...] = flat.cpu().numpy()

    def unpack(self, part: KvPart, block_table: Sequence[int], payload: Any) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            super().unpack(part, block_table, torch.tensor(payload).to(self.device))
            self._stream.synchronize()
