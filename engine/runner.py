"""Run planned steps: the forward pass over the packed tokens of many sequences, and sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import EngineFailed, SplitserveError
from ..core.logprobs import TokenLogprob
from ..scheduling.step_plan import ScheduledTokens, StepPlan
from .attention import AttentionBatch, Chunk, DecodeBatch, KvWritten, current
from .cpu_attention import decode_kernel
from .logprobs import StepLogprobs, prompt_rows
from .output_format import OutputFormats
from .pool import KvPool
from .sampler import SampleInput, sample


class StepMode(IntEnum):
    """How a step is computed. Ranks that share a model must choose alike, so rank 0 chooses."""

    PACKED = 0  # kernel by kernel
    CAPTURED = 1  # as PACKED, but through the graph of its number of tokens if there is one
    DECODE = 2  # one new token for each sequence, through the graph of its batch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step yields, by request id."""

    token_ids: Mapping[str, int]
    logprobs: Mapping[str, TokenLogprob] = field(default_factory=dict)  # of the new tokens
    # Position of the first of these prompt tokens, and they.
    prompt_logprobs: Mapping[str, tuple[int, list[TokenLogprob]]] = field(default_factory=dict)
    failed: Mapping[str, SplitserveError] = field(default_factory=dict)  # instead of a token


class StepRunner(Protocol):
    """Computes planned steps in order. Only the device thread calls."""

    max_steps: int  # that may be launched and not collected

    @property
    def captured(self) -> bool:
        """Whether steps run as CUDA graphs."""
        ...

    def mode(self, plan: StepPlan) -> StepMode:
        """How `launch` computes this step unless told otherwise."""
        ...

    def is_quick(self, plan: StepPlan) -> bool:
        """Whether `launch` takes next to no time, as of a graph, or about as long as a prefill step."""
        ...

    def launch(self, plan: StepPlan, mode: StepMode | None = None) -> None:
        """Start a step; on a GPU this only queues its work."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest launched step."""
        ...

    def abandon(self) -> None:
        """A step failed: forget those that were launched."""
        ...

    def warm_up(self) -> None:
        """Prepare what the calling thread needs, so that no step has to."""
        ...

    def close(self) -> None:
        """Free what was captured; no step follows."""
        ...

    def bare_step(self, batch: int) -> Callable[[], None]:
        """What queues the device's part of a decode step. Raises: NotImplementedError: there is no such part."""
        ...


class CpuRunner:
    """Runs a step when it is collected; where another rank samples, `samples` is false and there are no tokens."""

    max_steps = 1
    captured = False

    def __init__(
        self,
        model: PreTrainedModel,
        pool: KvPool,
        formats: OutputFormats,
        kv_written: KvWritten | None,
        *,
        samples: bool = True,
    ) -> None:
        self._model = model
        self._dtype = model.dtype  # looked up among the parameters each time
        self._pool = pool
        self._formats = formats
        self._kv_written = kv_written
        self._samples = samples
        self._plan: StepPlan | None = None

    def mode(self, plan: StepPlan) -> StepMode:
        return StepMode.PACKED

    def is_quick(self, plan: StepPlan) -> bool:
        return True

    def launch(self, plan: StepPlan, mode: StepMode | None = None) -> None:
        self._plan = plan

    def abandon(self) -> None:
        self._plan = None

    def warm_up(self) -> None:
        decode_kernel()
        self._formats.warm_up()

    def close(self) -> None:
        pass

    def bare_step(self, batch: int) -> Callable[[], None]:
        raise NotImplementedError("a step on the CPU is not queued apart from its host part")

    def collect(self) -> StepResult:
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
        logits = forward(self._model, self._pool, sequences, rows + prompt_rows(parts), self._kv_written)
        if not self._samples:
            return StepResult(token_ids={})
        inputs, failed = sample_inputs(sampling, self._formats)
        chosen = sample(logits[: len(rows)], inputs)
        known = torch.tensor([token_id or 0 for token_id in chosen], dtype=torch.int64)
        likelihoods = StepLogprobs.of(logits, parts, sampling, known)
        return step_result(sampling, chosen, failed, likelihoods, self._dtype)


def step_result(
    sampling: Sequence[ScheduledTokens],
    token_ids: Sequence[int | None],
    failed: Mapping[str, SplitserveError],
    likelihoods: StepLogprobs | None,
    dtype: torch.dtype,
) -> StepResult:
    """Args: token_ids: None where there is none to choose, which fails its request. dtype: of the model."""
    chosen = {part.sequence.request_id: token_id for part, token_id in zip(sampling, token_ids, strict=True)}
    failed = {**{i: _no_token(dtype) for i, token_id in chosen.items() if token_id is None}, **failed}
    return StepResult(
        token_ids={i: token_id for i, token_id in chosen.items() if token_id is not None and i not in failed},
        logprobs=likelihoods.of_tokens() if likelihoods is not None else {},
        prompt_logprobs=likelihoods.of_prompts() if likelihoods is not None else {},
        failed=failed,
    )


def _no_token(dtype: torch.dtype) -> EngineFailed:
    return EngineFailed(
        "the model's logits are not finite numbers, so no token can be chosen; check its weights, and whether --dtype "
        f"({dtype}) is wide enough for them"
    )


def sampled_rows(parts: Sequence[ScheduledTokens]) -> tuple[list[ScheduledTokens], list[int]]:
    """Those parts that yield a token, and the row of the last token of each among the packed tokens of all parts."""
    sampling, rows, row = [], [], -1
    for part in parts:
        row += part.num_tokens
        if part.samples:
            sampling.append(part)
            rows.append(row)
    return sampling, rows


def needs_history(part: ScheduledTokens) -> bool:
    """Whether its choice looks at earlier output, so that the step before must have ended."""
    request = part.sequence.request
    return part.samples and (request.sampling.has_penalties or request.output_format is not None)


def is_plain(part: ScheduledTokens) -> bool:
    """Whether its token is chosen by the model's own logits, and nobody wants to see these."""
    request = part.sequence.request
    changes = needs_history(part) or request.sampling.logit_bias or part.index < request.min_tokens
    return not (part.samples and (changes or request.logprobs is not None)) and not part.prompt_targets


def sample_inputs(
    sampling: Sequence[ScheduledTokens], formats: OutputFormats
) -> tuple[list[SampleInput], dict[str, SplitserveError]]:
    """What each part is sampled with, and the request ids that cannot go on."""
    inputs: list[SampleInput] = []
    failed: dict[str, SplitserveError] = {}
    for part in sampling:
        sequence, request = part.sequence, part.sequence.request
        allowed = None
        if request.output_format is not None and not sequence.released:  # it may have ended while this step was planned
            try:
                allowed = torch.from_numpy(formats.allowed(sequence, part.end))
            except SplitserveError as error:
                failed[sequence.request_id] = error
        inputs.append(
            SampleInput(
                params=request.sampling,
                index=part.index,
                # What follows them is not known yet.
                token_ids=sequence.token_ids[: part.end] if request.sampling.has_penalties else (),
                num_prompt_tokens=request.num_prompt_tokens,
                banned=request.stop_token_ids if part.index < request.min_tokens else (),
                allowed=allowed,
            )
        )
    return inputs, failed


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
