"""Slots of decoding sequences on a device: as many as may run, and none for one that ended."""

from __future__ import annotations

import torch
from splitserve.core.request import Request
from splitserve.engine.gpu.sequence_slots import SequenceSlots
from splitserve.scheduling.sequence import Sequence, SequenceState


def running(number: int) -> Sequence:
    request = Request(request_id=str(number), prompt_token_ids=(1, 2, 3), max_tokens=4)
    return Sequence(request=request, arrival=number, token_ids=[1, 2, 3], state=SequenceState.RUNNING)


def test_sequences_that_run_have_slots_of_their_own_and_keep_them() -> None:
    slots = SequenceSlots(4, 8, torch.device("cpu"))
    sequences = [running(number) for number in range(4)]
    places = [slots.index_of(sequence) for sequence in sequences]
    assert sorted(places) == [0, 1, 2, 3]
    assert [slots.index_of(sequence) for sequence in sequences] == slots.indices(sequences) == places


def test_sequences_that_ended_are_let_go_of_when_another_one_comes() -> None:
    """Kept with their prompts, they made looking for garbage take 70 ms."""
    slots = SequenceSlots(2, 8, torch.device("cpu"))
    for number in range(10):
        sequence = running(number)
        slots.index_of(sequence)
        assert list(slots._slots) == [sequence]
        sequence.state = SequenceState.FINISHED
