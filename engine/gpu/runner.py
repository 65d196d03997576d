"""Runs planned steps on a GPU: captured decode steps where every sequence gets one token, packed ones otherwise."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.errors import SplitserveError
from ...scheduling.sequence import PENDING
from ...scheduling.step_plan import ScheduledTokens, StepPlan
from ..attention import KvWritten
from ..logprobs import StepLogprobs, prompt_rows
from ..output_format import OutputFormats
from ..parallel.group import RankGroup
from ..pool import KvPool
from ..runner import SequenceTokens, StepMode, StepResult, is_plain, sample_inputs, sampled_rows, step_result
from ..sampler import adjust, noise_keys
from .announcer import Announcer
from .attention_kernels import prefill_tiles
from .batch import (
    CUDNN_FROM_TOKENS,
    ORDERED_FROM,
    DecodeRows,
    GpuBatch,
    PrefillRows,
    SplitMemory,
    cudnn_length,
    layer_views,
)
from .captured_prefill import MAX_SEQUENCES, CapturedPrefill
from .packed import pack, run, table_width
from .sampling import sample_rows
from .sequence_slots import SequenceSlots
from .step_kernels import FIELDS, unpack_rows
from .uploads import to_device

_GRAPH_BATCHES = (1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_PADDING = np.array([0, -1, 0, 0, 0, 0, 0, 0, 0, 0], np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A step whose kernels are queued."""

    sampling: list[ScheduledTokens]  # those that get a token, in order
    chosen: Tensor  # [>= len(sampling)] int64, pinned; written when `done` is
    likelihoods: StepLogprobs | None  # the same
    failed: dict[str, SplitserveError]
    done: torch.cuda.Event


class GpuRunner:
    """Queues steps on one CUDA stream; the host is at most one step ahead.

    Newest tokens, block tables and everything else that the next step needs stay on the device, so that it can be
    queued before the tokens of this one are known.
    """

    max_steps = 2

    def __init__(
        self,
        model: PreTrainedModel,
        pool: KvPool,
        *,
        max_running: int,
        max_model_len: int,
        max_step_tokens: int,
        num_query_heads: int,
        formats: OutputFormats,
        kv_written: KvWritten | None = None,
        group: RankGroup | None = None,
    ) -> None:
        self._model = model
        self._dtype = model.dtype  # looked up among the parameters each time
        self._group = group
        self._leads = group is None or group.leads
        self._pool = pool
        self._formats = formats
        self._device = model.device
        self._layers = layer_views(pool)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._announcer = None if kv_written is None else Announcer(kv_written)
        self._running: deque[_Running] = deque()
        self.max_running = max_running
        self._max_step_tokens = max_step_tokens
        layers = pool.geometry.layers
        self._split = SplitMemory(
            self._device,
            max_batch=max_running,
            num_heads=num_query_heads,
            num_kv_heads=min(layer.num_kv_heads for layer in layers),
            dim=max(layer.value_dim for layer in layers),
        )
        max_blocks = table_width(max_model_len, pool.block_size)
        self._slots = SequenceSlots(max_running, max_blocks, self._device)
        # Static inputs of the captured steps; each graph uses the first rows.
        num_rows = max(max_running, MAX_SEQUENCES)
        self._rows = torch.zeros(num_rows, FIELDS, dtype=torch.int32, device=self._device)
        self._input_ids, self._position_ids, self._kv_slots = (
            torch.zeros(max_running, dtype=torch.int64, device=self._device) for _ in range(3)
        )
        self._lengths, self._table_rows = (
            torch.zeros(max_running, dtype=torch.int32, device=self._device) for _ in range(2)
        )
        self._chosen = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        # One per step in flight and one to fill: a copy may still read the others.
        self._sent = deque(
            torch.zeros(num_rows, FIELDS, dtype=torch.int32).pin_memory() for _ in range(self.max_steps + 1)
        )
        self._received = deque(torch.zeros(num_rows, dtype=torch.int64).pin_memory() for _ in range(self.max_steps + 1))
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._prefill = CapturedPrefill(
            model, self._layers, self._split, self._sample, rows=self._rows, max_blocks=max_blocks
        )
        self._follow_current_stream()

    # --- captured decode steps ---

    @torch.inference_mode()
    def capture(self) -> float:
        """Capture decode steps by batch and short prefill steps by tokens; returns the seconds it took."""
        began_s = time.monotonic()
        batches = [batch for batch in _GRAPH_BATCHES if batch < self.max_running] + [self.max_running]
        memory = torch.cuda.graph_pool_handle()
        self._rows[:] = torch.from_numpy(_PADDING).to(self._device)
        self._follow_current_stream()
        for batch in reversed(batches):  # the largest first: the others fit into its memory
            with torch.cuda.stream(self._stream):
                self._decode_step(batch)  # compiles kernels and lets libraries allocate
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, stream=self._stream):
                self._decode_step(batch)
            self._graphs[batch] = graph
        self._prefill.capture(self._stream, memory, self._max_step_tokens)
        return time.monotonic() - began_s

    def _follow_current_stream(self) -> None:
        """Steps come after what is queued so far on the stream that tensors are made and filled on."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @property
    def captured(self) -> bool:
        return bool(self._graphs)

    def close(self) -> None:
        self._stream.synchronize()
        self.drop_graphs()

    def drop_graphs(self) -> None:
        self._graphs.clear()
        self._prefill.drop()

    def _decode_step(self, batch: int) -> None:
        """The whole step over the static inputs; the chosen tokens are in `_chosen`."""
        unpack_rows(
            self._rows[:batch],
            self._slots.last_tokens,
            self._slots.tables,
            input_ids=self._input_ids,
            position_ids=self._position_ids,
            kv_slots=self._kv_slots,
            lengths=self._lengths,
            table_rows=self._table_rows,
            page=self._pool.block_size,
        )
        step = GpuBatch(
            layers=self._layers,
            slots=self._kv_slots[:batch],
            split_memory=self._split,
            decode=DecodeRows(
                count=batch,
                tables=self._slots.tables,
                table_rows=self._table_rows[:batch],
                lengths=self._lengths[:batch],
                order=torch.argsort(self._lengths[:batch], descending=True) if batch >= ORDERED_FROM else None,
            ),
            prefill=None,
            layer_written=None,
        )
        logits = run(self._model, step, self._input_ids[:batch], self._position_ids[:batch], None)
        self._sample(logits, self._rows[:batch])

    def _sample(self, logits: Tensor, rows: Tensor) -> None:
        chosen = self._chosen[: logits.shape[0]]
        if self._leads:
            sample_rows(logits, rows[:, 4:], rows[:, 1], last_tokens=self._slots.last_tokens, chosen=chosen)
        if self._group is not None:
            self._group.copy_from_leader(chosen)
            if not self._leads:
                slots = rows[:, 1].long()
                slots = torch.where(slots < 0, self._slots.last_tokens.shape[0] - 1, slots)
                self._slots.last_tokens.scatter_(0, slots, chosen.clamp_min(0))

    # --- steps ---

    def mode(self, plan: StepPlan) -> StepMode:
        if self._graphs and all(_can_be_captured(part) for part in plan.parts):
            return StepMode.DECODE
        return StepMode.CAPTURED if all(is_plain(part) for part in plan.parts) else StepMode.PACKED

    def is_quick(self, plan: StepPlan) -> bool:
        mode = self.mode(plan)
        return mode is StepMode.DECODE or (
            mode is StepMode.CAPTURED and self._prefill.find([(p.start, p.end) for p in plan.parts]) is not None
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan, mode: StepMode | None = None) -> None:
        mode = self.mode(plan) if mode is None else mode
        with torch.cuda.stream(self._stream):
            parts = sorted(plan.parts, key=lambda part: part.num_tokens > 1)
            sampling, rows = sampled_rows(parts)
            likelihoods: StepLogprobs | None = None
            failed: dict[str, SplitserveError] = {}
            if mode is StepMode.DECODE:
                self._launch_captured(parts)
            else:
                likelihoods, failed = self._launch_packed(parts, sampling, rows, mode)
            received = self._received[0]
            self._received.rotate(-1)
            received[: len(sampling)].copy_(self._chosen[: len(sampling)], non_blocking=True)
            if likelihoods is not None:
                likelihoods = replace(likelihoods, rows=likelihoods.rows.to_host())
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._running.append(
            _Running(sampling=sampling, chosen=received, likelihoods=likelihoods, failed=failed, done=done)
        )

    def collect(self) -> StepResult:
        step = self._running.popleft()
        step.done.synchronize()
        chosen = [i if i >= 0 else None for i in step.chosen[: len(step.sampling)].tolist()]
        return step_result(step.sampling, chosen, step.failed, step.likelihoods, self._dtype)

    def abandon(self) -> None:
        self._running.clear()
        self._stream.synchronize()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Let cuDNN prepare for the prompt lengths it will see; what it prepares belongs to the calling thread.

        And let Triton compile what steps need that are not captured.
        """
        self._formats.warm_up()
        most = self._max_step_tokens
        lengths = sorted(
            {cudnn_length(n) for n in (*range(CUDNN_FROM_TOKENS, most, 128), most) if n >= CUDNN_FROM_TOKENS}
        )
        with torch.cuda.stream(self._stream):
            for length in lengths:
                spans = [(0, 0, length)]
                step = GpuBatch(
                    layers=self._layers,
                    slots=torch.full((length,), -1, dtype=torch.int64, device=self._device),
                    split_memory=self._split,
                    decode=None,
                    prefill=PrefillRows(
                        spans=spans,
                        tables=torch.zeros(1, table_width(length, self._pool.block_size), dtype=torch.int32).to(
                            self._device
                        ),
                        tiles=torch.tensor(prefill_tiles(spans), dtype=torch.int32).to(self._device),
                    ),
                    layer_written=None,
                )
                ids = torch.zeros(length, dtype=torch.int64, device=self._device)
                positions = torch.arange(length, device=self._device)
                run(self._model, step, ids, positions, torch.zeros(1, dtype=torch.int64, device=self._device))
            self._warm_up_mixed()
            self._stream.synchronize()

    def _warm_up_mixed(self) -> None:
        """One step of a chunk and single tokens for each way to compute the latter's attention."""
        heads = {layer.num_heads for layer in self._layers}
        ways = {
            (n >= ORDERED_FROM, *(self._split.split(n, h).count for h in heads)): n
            for n in range(self.max_running, 0, -1)
        }
        page = self._pool.block_size
        for batch in ways.values():
            sequences = [SequenceTokens(request_id="", token_ids=(0,), start=0, block_table=(0,))] * batch
            sequences += [SequenceTokens(request_id="", token_ids=(0,) * 8, start=page, block_table=(0, 0))]
            step, input_ids, position_ids = pack(
                sequences, layers=self._layers, page=page, split_memory=self._split, device=self._device
            )
            step = replace(step, slots=torch.full_like(step.slots, -1))
            wanted = torch.arange(batch, device=self._device)
            logits = run(self._model, step, input_ids, position_ids, wanted)
            for x in (logits, logits.float()):  # as the model has them, and as penalties and the like leave them
                self._sample(x, torch.from_numpy(_PADDING).to(self._device).repeat(batch, 1))

    def bare_step(self, batch: int) -> Callable[[], None]:
        """Replays of one graph over the rows of the last step."""
        return self._graphs[self._bucket(batch)].replay

    def _bucket(self, batch: int) -> int:
        return min(size for size in self._graphs if size >= batch)

    def _launch_captured(self, parts: Sequence[ScheduledTokens]) -> None:
        batch = self._bucket(len(parts))
        self._send(parts, batch, captured=True)
        self._graphs[batch].replay()

    def _send(self, parts: Sequence[ScheduledTokens], padded: int, *, captured: bool) -> Tensor:
        """Fill `_rows` [padded, FIELDS] on the device with what the host knows about each part's last token.

        A `captured` step also reads the block tables on the device.
        """
        sent = self._sent[0]
        self._sent.rotate(-1)
        rows = sent.numpy()
        floats, keys = rows.view(np.float32), rows.view(np.uint32)[:, 8:]
        slots, block_size = self._slots, self._pool.block_size
        for i, part in enumerate(parts):
            sequence, position = part.sequence, part.end - 1
            slot = -1 if sequence.prefill_only else slots.index_of(sequence)
            if captured:
                slots.upload_table(sequence)
            rows[i, :4] = (sequence.token_ids[position], slot, position, sequence.block_table[position // block_size])
            params = sequence.request.sampling
            if params.is_greedy:
                rows[i, 4:] = 0
            else:
                rows[i, 4] = params.top_k
                floats[i, 5:8] = (params.temperature, params.top_p, params.min_p)
                keys[i] = noise_keys(params.seed, part.index)
        rows[len(parts) : padded] = _PADDING
        self._rows[:padded].copy_(sent[:padded], non_blocking=True)
        return self._rows[:padded]

    def _launch_packed(
        self, parts: Sequence[ScheduledTokens], sampling: Sequence[ScheduledTokens], rows: list[int], mode: StepMode
    ) -> tuple[StepLogprobs | None, dict[str, SplitserveError]]:
        """Any mix of chunks and single tokens, each kernel launched by itself.

        Returns the logprobs that were asked for, still on the device, and the requests that cannot go on.
        """
        sequences = [
            SequenceTokens(
                request_id=part.sequence.request_id,
                token_ids=part.sequence.token_ids[part.start : part.end],
                start=part.start,
                block_table=part.sequence.block_table,
            )
            for part in parts
        ]
        # Tokens that the step before this one is still choosing.
        waiting = [i for i, s in enumerate(sequences) if s.token_ids[-1] == PENDING]
        pending = None
        if waiting:
            slots = self._slots.indices([parts[i].sequence for i in waiting])
            at = to_device(np.array([waiting, slots]), self._device)
            pending = torch.stack((at[0], self._slots.last_tokens[at[1]]))
        written = None if self._announcer is None else self._announcer.of_step(parts, self._stream)
        captured = self._prefill.find([(s.start, s.end) for s in sequences]) if mode is StepMode.CAPTURED else None
        if captured is not None:
            self._send(sampling, MAX_SEQUENCES, captured=False)
            self._prefill.launch(captured, sequences, self._pool.block_size, rows, pending, written)
            return None, {}
        sent = self._send(sampling, len(sampling), captured=False)
        step, input_ids, position_ids = pack(
            sequences,
            layers=self._layers,
            page=self._pool.block_size,
            split_memory=self._split,
            device=self._device,
            layer_written=None if written is None else lambda layer: written(layer, layer + 1),
        )
        if pending is not None:
            input_ids[pending[0]] = pending[1]
        wanted = to_device(np.array(rows + prompt_rows(parts), np.int64), self._device)
        logits = run(self._model, step, input_ids, position_ids, wanted)
        if mode is StepMode.CAPTURED or not self._leads:
            if sampling:
                self._sample(logits[: len(sampling)], sent)
            return None, {}
        inputs, failed = sample_inputs(sampling, self._formats)
        if sampling:
            self._sample(adjust(logits[: len(sampling)], inputs), sent)
        return StepLogprobs.of(logits, parts, sampling, self._chosen[: len(sampling)].clamp_min(0)), failed


def _can_be_captured(part: ScheduledTokens) -> bool:
    """A single token of a sequence that has a place on the device, chosen by logits that nobody else looks at."""
    return part.num_tokens == 1 and part.samples and not part.sequence.prefill_only and is_plain(part)
