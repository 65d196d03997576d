"""What the device keeps of decoding sequences from step to step: newest tokens and block tables, a slot for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ...scheduling.sequence import Sequence, SequenceState
from .uploads import to_device


@dataclass(slots=True)
class _Slot:
    """A decoding sequence's place in the device's tables."""

    index: int
    table: list[int]  # the list that was uploaded; a sequence that was preempted has another
    num_blocks: int


class SequenceSlots:
    """Block tables and newest tokens by slot: a sequence gets its slot when it first needs one, and keeps it until it
    has ended and another one needs one."""

    def __init__(self, max_running: int, max_blocks: int, device: torch.device) -> None:
        self._device = device
        self._slots: dict[Sequence, _Slot] = {}
        self._free = list(range(max_running))
        self.tables = torch.zeros(max_running, max_blocks, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_running + 1, dtype=torch.int64, device=device)  # the last: nobody's

    def index_of(self, sequence: Sequence) -> int:
        slot = self._slots.get(sequence)
        if slot is None:
            self._collect()
            slot = self._slots[sequence] = _Slot(index=self._free.pop(), table=[], num_blocks=0)
        return slot.index

    def indices(self, sequences: Iterable[Sequence]) -> list[int]:
        """Of sequences that have a slot."""
        return [self._slots[sequence].index for sequence in sequences]

    def upload_table(self, sequence: Sequence) -> None:
        """Bring the device's block table up to date, but for the newest block, which the step itself enters."""
        slot, table = self._slots[sequence], sequence.block_table
        if slot.table is not table or len(table) > slot.num_blocks + 1:
            self.tables[slot.index, : len(table)] = to_device(np.array(table, np.int32), self._device)
            slot.table = table
        slot.num_blocks = len(table)

    def _collect(self) -> None:
        """Let go of those that ended, and of their tokens: to a collector of garbage, prompts are long lists. What is
        queued for a slot comes before whatever its next owner queues."""
        for sequence in [s for s in self._slots if s.state is not SequenceState.RUNNING]:
            self._free.append(self._slots.pop(sequence).index)
