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


class DevicePoolBytes(PoolBytes):
    """Works on streams of its own, so that it never waits for a step, and blocks until the result is there.

    Its callers are threads of transfers: each call makes the pool's device theirs.
    """

    def __init__(self, pool: KvPool, first_heads: Sequence[int] | None = None) -> None:
        self.device = pool.keys(0).device
        super().__init__(pool, first_heads)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _array(self, view: Tensor) -> Any:
        return view

    def checksum(self, part: KvPart, block_ids: Ids) -> int:
        span = self.row_range(part)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            ids = torch.from_numpy(block_ids.astype(np.int32)).to(self.device)
            value = device_checksum(self.rows, ids, span.start, span.stop - span.start)
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
