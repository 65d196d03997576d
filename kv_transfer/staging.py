"""Where payloads of a channel are packed before they leave, and unpacked from once they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .frames import KvPart
from .wire import WireBytes


class Staging(Protocol):
    """In the memory that the channel moves bytes of: a host's, or a GPU's (device_staging.py). Called in threads."""

    def pack(self, wire_bytes: WireBytes, part: KvPart, block_table: Sequence[int]) -> tuple[Tensor, int]:
        """A part, gathered and coded, and its checksum. Raises: KvCorrupted: a value cannot be coded."""

    def room(self, num_bytes: int) -> Tensor:
        """Memory [num_bytes] uint8 for a payload that is to come."""

    def unpack(
        self, wire_bytes: WireBytes, part: KvPart, block_table: Sequence[int], payload: Tensor, expected: int
    ) -> None:
        """Scatter what came. Raises: KvCorrupted: its checksum is not the expected one, or it cannot be decoded."""


class HostStaging:
    """For channels that move a host's memory, wherever the pool is."""

    def pack(self, wire_bytes: WireBytes, part: KvPart, block_table: Sequence[int]) -> tuple[Tensor, int]:
        out = np.empty(wire_bytes.part_bytes(part), dtype=np.uint8)
        value = wire_bytes.pack(part, block_table, out)
        return torch.from_numpy(out), value

    def room(self, num_bytes: int) -> Tensor:
        return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))

    def unpack(
        self, wire_bytes: WireBytes, part: KvPart, block_table: Sequence[int], payload: Tensor, expected: int
    ) -> None:
        wire_bytes.unpack(part, block_table, payload.numpy(), expected)
