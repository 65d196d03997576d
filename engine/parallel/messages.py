"""What rank 0 tells the other ranks: each step as one short row of 32-bit numbers behind its length.

A decode step of 64 sequences is about 2 KB. The other ranks keep a mirror of each sequence's block table, so only new
blocks travel; they never learn how tokens are chosen, for rank 0 chooses them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ...core.request import Request
from ...scheduling.sequence import Sequence as RunningSequence
from ...scheduling.sequence import SequenceState
from ...scheduling.step_plan import ScheduledTokens, StepPlan
from ..runner import StepMode

_LENGTH = struct.Struct("<I")


class Order(IntEnum):
    """What a message asks for: the first number in it."""

    STEP = 1
    WARM_UP = 2


def warm_up_message() -> bytes:
    return np.array([Order.WARM_UP], np.int32).tobytes()


@dataclass(slots=True)
class _Known:
    number: int
    table: list[int]  # a sequence that was preempted has another
    num_blocks: int = 0  # that the other ranks know of


class StepWriter:
    """Rank 0's side: remembers what the other ranks know."""

    def __init__(self) -> None:
        self._known: dict[RunningSequence, _Known] = {}
        self._next = 0

    def step(self, plan: StepPlan, mode: StepMode) -> bytes:
        gone = [
            sequence
            for sequence, known in self._known.items()
            if sequence.state is not SequenceState.RUNNING or known.table is not sequence.block_table
        ]
        numbers = [Order.STEP, mode, len(gone), *(self._known.pop(sequence).number for sequence in gone)]
        numbers.append(len(plan.parts))
        for part in plan.parts:
            known, is_new = self._find(part.sequence)
            table = part.sequence.block_table
            # Only whoever moves its KV away asks for the name.
            name = part.sequence.request_id.encode() if is_new and part.sequence.prefill_only else b""
            targets = part.prompt_targets
            numbers += (known.number, part.start, part.end, part.samples, part.sequence.prefill_only)
            numbers += (targets.start, targets.stop)
            numbers += (len(name), *name)
            numbers += (known.num_blocks, len(table), *table[known.num_blocks :])
            numbers += part.sequence.token_ids[part.start : part.end]
            known.num_blocks = len(table)
        return np.array(numbers, np.int32).tobytes()

    def _find(self, sequence: RunningSequence) -> tuple[_Known, bool]:
        """What the others know of a sequence, and whether they hear of it for the first time."""
        if (known := self._known.get(sequence)) is not None:
            return known, False
        known = self._known[sequence] = _Known(number=self._next, table=sequence.block_table)
        self._next = (self._next + 1) % (1 << 31)
        return known, True


@dataclass(frozen=True, slots=True, kw_only=True)
class _MirroredTokens(ScheduledTokens):
    """Only rank 0 knows who asked how likely the prompt was; the others compute as many rows of logits."""

    targets: range

    @property
    def prompt_targets(self) -> range:
        return self.targets


class StepReader:
    """The other ranks' side: steps over sequences that mirror rank 0's, as far as a forward pass looks at them."""

    def __init__(self) -> None:
        self._mirrors: dict[int, RunningSequence] = {}

    def step(self, numbers: Sequence[int]) -> tuple[StepPlan, StepMode]:
        """`numbers` are those of one STEP message, that word included."""
        rest = iter(numbers)

        def take(count: int) -> list[int]:
            return [next(rest) for _ in range(count)]

        _, mode, num_gone = take(3)
        for number in take(num_gone):
            self._mirrors.pop(number).state = SequenceState.FINISHED
        parts, started = [], []
        for _ in range(next(rest)):
            number, start, end, samples, prefill_only, first_target, end_target, name_bytes = take(8)
            name = bytes(take(name_bytes)).decode()
            known, num_blocks = take(2)
            if (mirror := self._mirrors.get(number)) is None:
                mirror = self._mirrors[number] = _mirror(name or str(number), number, bool(prefill_only), start)
                started.append(mirror)
            assert len(mirror.block_table) == known, "a step is missing"
            mirror.block_table += take(num_blocks - known)
            # Earlier tokens are in the KV pool already, and were perhaps never told: the prefix cache held them.
            mirror.token_ids += [0] * (end - len(mirror.token_ids))
            mirror.token_ids[start:end] = take(end - start)
            parts.append(
                _MirroredTokens(
                    sequence=mirror,
                    start=start,
                    end=end,
                    samples=bool(samples),
                    index=0,
                    targets=range(first_target, end_target),
                )
            )
        plan = StepPlan(
            parts=tuple(parts),
            num_decode_tokens=0,
            num_prefill_tokens=0,
            num_context_tokens=0,
            started=tuple(started),
            resumed=(),
            preempted=(),
        )
        return plan, StepMode(mode)


def _mirror(name: str, number: int, prefill_only: bool, num_cached: int) -> RunningSequence:
    return RunningSequence(
        request=Request(request_id=name, prompt_token_ids=(), max_tokens=1),
        arrival=number,
        token_ids=[],
        prefill_only=prefill_only,
        num_cached=num_cached,
        state=SequenceState.RUNNING,
    )


def write_message(fd: int, message: bytes) -> None:
    """Raises: BrokenPipeError: the reader is gone."""
    rest = memoryview(_LENGTH.pack(len(message)) + message)
    while rest:
        rest = rest[os.write(fd, rest) :]


def read_message(fd: int) -> bytes | None:
    """The next message; None when the writer is gone."""
    head = _read(fd, _LENGTH.size)
    return None if head is None else _read(fd, _LENGTH.unpack(head)[0])


def _read(fd: int, size: int) -> bytes | None:
    content = bytearray()
    while len(content) < size:
        if not (piece := os.read(fd, size - len(content))):
            return None
        content += piece
    return bytes(content)
