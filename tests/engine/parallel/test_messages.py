"""The other ranks see each step as rank 0 planned it, however sequences come, go, are preempted and share KV."""

from __future__ import annotations

import os
import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve.core.request import Request
from splitserve.engine.parallel.messages import StepReader, StepWriter, read_message, write_message
from splitserve.engine.runner import StepMode
from splitserve.scheduling.blocks import BlockAllocator
from splitserve.scheduling.sequence import SequenceState
from splitserve.scheduling.step_plan import StepPlan
from splitserve.scheduling.steps import StepScheduler


def scheduler(num_blocks: int) -> StepScheduler:
    return StepScheduler(
        BlockAllocator(num_blocks, 16, prefix_cache=True),
        model_id="m",
        kv_dtype="float32",
        max_running=4,
        max_waiting=64,
        max_step_tokens=40,
    )


def shown(plan: StepPlan) -> list[tuple[object, ...]]:
    """What a forward pass looks at."""
    return [
        (
            part.start,
            part.end,
            part.samples,
            part.prompt_targets,
            part.sequence.prefill_only,
            part.sequence.token_ids[part.start : part.end],
            part.sequence.block_table,
        )
        for part in plan.parts
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=12),
    num_blocks=st.integers(9, 24),
    ahead=st.booleans(),
)
def test_every_step_arrives_as_it_was_planned(lengths: list[tuple[int, int]], num_blocks: int, ahead: bool) -> None:
    steps, writer, reader = scheduler(num_blocks), StepWriter(), StepReader()
    for i, (prompt, answer) in enumerate(lengths):  # prompts that begin alike, so that the prefix cache holds some
        tokens = tuple(range(1, prompt + 1))
        asked = 2 if i % 3 == 1 else None
        steps.add(Request(request_id=str(i), prompt_token_ids=tokens, max_tokens=answer, prompt_logprobs=asked))
    running: list[StepPlan] = []
    while True:
        plan = steps.schedule() if len(running) <= ahead else None
        if plan is not None:
            running.append(plan)
            message = writer.step(plan, StepMode.CAPTURED)
            mirrored, mode = reader.step(np.frombuffer(message, np.int32).tolist())
            assert mode is StepMode.CAPTURED
            assert shown(mirrored) == shown(plan)
            assert all(part.sequence.state is SequenceState.RUNNING for part in mirrored.parts)
        elif running:
            done = running.pop(0)
            steps.commit({part.sequence.request_id: 7 for part in done.parts if part.samples})
        else:
            break
    assert not steps.has_work


def test_a_sequence_that_is_gone_is_forgotten_by_every_rank() -> None:
    steps, writer, reader = scheduler(16), StepWriter(), StepReader()
    mirrors = []
    for i in range(3):
        steps.add(Request(request_id=str(i), prompt_token_ids=(1, 2, 3), max_tokens=1))
        plan = steps.schedule()
        assert plan is not None
        mirrored, _ = reader.step(np.frombuffer(writer.step(plan, StepMode.PACKED), np.int32).tolist())
        mirrors.append(mirrored.parts[0].sequence)
        steps.commit({str(i): 9})
    assert [mirror.state for mirror in mirrors] == [SequenceState.FINISHED] * 2 + [SequenceState.RUNNING]
    assert len(writer._known) == len(reader._mirrors) == 1


def test_messages_larger_than_the_pipe_arrive_whole_and_its_end_is_the_end() -> None:
    read, write = os.pipe()
    content = os.urandom(1 << 20)

    def send() -> None:
        write_message(write, content)
        write_message(write, b"")
        os.close(write)

    writer = threading.Thread(target=send)
    writer.start()
    assert read_message(read) == content
    assert read_message(read) == b""
    assert read_message(read) is None
    writer.join()
    os.close(read)
