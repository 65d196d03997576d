"""Run planned steps: the forward pass over the packed tokens of many sequences, and sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..scheduling.steps import ScheduledTokens, StepPlan
from .attention import AttentionBatch, Chunk, DecodeBatch, KvWritten, current
from .cpu_attention import decode_kernel
from .pool import KvPool
from .sampler import SampleInput, sample


class StepRunner(Protocol):
    """Computes planned steps in order. Only the device thread calls."""

    max_steps: int  # that may be launched and not collected

    def launch(self, plan: StepPlan) -> None:
        """Start a step; on a GPU this only queues its work."""
        ...

    def collect(self) -> dict[str, int]:
        """Wait for the oldest launched step: the new token of each request id that gets one."""
        ...

    def abandon(self) -> None:
        """A step failed: forget those that were launched."""
        ...

    def warm_up(self) -> None:
        """Prepare what the calling thread needs, so that no step has to."""
        ...

    def bare_step(self, batch: int) -> Callable[[], None]:
        """What queues the device's part of a decode step. Raises: NotImplementedError: there is no such part."""
        ...


class CpuRunner:
    """Runs a step when it is collected."""

    max_steps = 1

    def __init__(self, model: PreTrainedModel, pool: KvPool, kv_written: KvWritten | None) -> None:
        self._model = model
        self._pool = pool
        self._kv_written = kv_written
        self._plan: StepPlan | None = None

    def launch(self, plan: StepPlan) -> None:
        self._plan = plan

    def abandon(self) -> None:
        self._plan = None

    def warm_up(self) -> None:
        decode_kernel()

    def bare_step(self, batch: int) -> Callable[[], None]:
        raise NotImplementedError("a step on the CPU is not queued apart from its host part")

    def collect(self) -> dict[str, int]:
        assert self._plan is not None, "collect without launch"
        plan, self._plan = self._plan, None
        # Single tokens first: the attention function takes them together.
        parts = sorted(plan.parts, key=lambda part: part.num_tokens > 1)
        sequences = [
            SequenceTokens(
                request_id=part.sequence.request_id,
                token_ids=part.sequence.token_ids[part.start : part.end],
                start=part.start,
                block_table=part.sequence.block_table,
                announce=part.sequence.prefill_only,
            )
            for part in parts
        ]
        sampling, rows = sampled_rows(parts)
        logits = forward(self._model, self._pool, sequences, rows, self._kv_written)
        token_ids = sample(logits, [sample_input(part) for part in sampling])
        return {part.sequence.request_id: token for part, token in zip(sampling, token_ids, strict=True)}


def sampled_rows(parts: Sequence[ScheduledTokens]) -> tuple[list[ScheduledTokens], list[int]]:
    """Those parts that yield a token, and the row of the last token of each among the packed tokens of all parts."""
    sampling, rows, row = [], [], -1
    for part in parts:
        row += part.num_tokens
        if part.samples:
            sampling.append(part)
            rows.append(row)
    return sampling, rows


def sample_input(part: ScheduledTokens) -> SampleInput:
    request = part.sequence.request
    return SampleInput(
        params=request.sampling,
        index=part.index,
        # Only penalties look at the tokens; what follows them is not known yet.
        token_ids=part.sequence.token_ids[: part.end] if request.sampling.has_penalties else (),
        num_prompt_tokens=request.num_prompt_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTokens:
    """New tokens of one sequence: positions [start, start + len(token_ids))."""

    request_id: str
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    announce: bool = False  # tell `kv_written` about its layers

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@torch.inference_mode()
def forward(
    model: PreTrainedModel,
    pool: KvPool,
    sequences: Sequence[SequenceTokens],
    logit_rows: Sequence[int],
    kv_written: KvWritten | None = None,
) -> Tensor:
    """Compute the KV of all tokens, packed in the order given, and the logits of some: [len(logit_rows), vocab] fp32.

    `logit_rows` are places in the packed row. Sequences with a single new token must come first.
    """
    block_size = pool.block_size
    positions = [p for s in sequences for p in range(s.start, s.end)]
    token_blocks = [s.block_table[p // block_size] for s in sequences for p in range(s.start, s.end)]
    chunks, row = [], 0
    for s in sequences:
        table = torch.tensor(s.block_table[: -(-s.end // block_size)])
        chunks.append(
            Chunk(request_id=s.request_id, row=row, start=s.start, end=s.end, block_table=table, announce=s.announce)
        )
        row += len(s.token_ids)
    single = [chunk for chunk in chunks if chunk.end == chunk.start + 1]
    assert chunks[: len(single)] == single, "sequences with one new token come first"
    position_ids = torch.tensor(positions)
    batch = AttentionBatch(
        pool=pool,
        token_blocks=torch.tensor(token_blocks),
        token_offsets=position_ids % block_size,
        decode=_decode_batch(single) if single else None,
        chunks=chunks[len(single) :],
        announced=[chunk for chunk in chunks if chunk.announce],
        kv_written=kv_written,
    )
    token = current.set(batch)
    try:
        output = model(
            input_ids=torch.tensor([[t for s in sequences for t in s.token_ids]]),
            position_ids=position_ids[None],
            use_cache=False,
            logits_to_keep=torch.tensor(logit_rows, dtype=torch.int64),
        )
    finally:
        current.reset(token)
    logits: Tensor = output.logits[0]
    return logits.float()


def _decode_batch(chunks: Sequence[Chunk]) -> DecodeBatch:
    tables = torch.nn.utils.rnn.pad_sequence([chunk.block_table for chunk in chunks], batch_first=True)
    positions = torch.tensor([chunk.start for chunk in chunks])
    return DecodeBatch(num_sequences=len(chunks), block_tables=tables, positions=positions)
