"""Packed steps as CUDA graphs: a short step takes the host longer to launch than the GPU to run.

Two kinds, each padded to a bucket of tokens: any mix of a few chunks and single tokens through our own kernel, and one
whole prompt through cuDNN, the latter in pieces of some layers, so that KV can leave before the step ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..runner import SequenceTokens
from .attention_kernels import LayerKv, prefill_tiles, tile_queries
from .batch import GpuBatch, PrefillRows, SplitMemory, chunk_spans
from .packed import pack_arrays, run
from .uploads import to_device

MAX_SEQUENCES = 16
_MIXED_BUCKETS = (*range(64, 513, 64), *range(640, 1025, 128))
_WHOLE_BUCKETS = tuple(range(640, 2049, 128))
_PIECE_LAYERS = 8
_LAST_PIECE_LAYERS = 2  # what is left to send when the last layer's KV is written, a millisecond before the step ends


@dataclass(slots=True)
class _Captured:
    """One bucket; each piece ends when the KV of the layers before `layer_ends` is written."""

    pieces: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    layer_ends: list[int] = field(default_factory=list)


class CapturedPrefill:
    """Captured packed steps of one model and pool."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerKv],
        split_memory: SplitMemory,
        sample: Callable[[Tensor, Tensor], None],
        *,
        rows: Tensor,
        max_blocks: int,
    ) -> None:
        """`sample(logits, rows)` chooses tokens; `rows` [>= MAX_SEQUENCES, fields] int32 are filled by the caller."""
        self._model = model
        self._layers = layers
        self._split = split_memory
        self._sample = sample
        self._rows = rows
        self._device = model.device
        largest = max(*_MIXED_BUCKETS, *_WHOLE_BUCKETS)
        num_tiles = largest // tile_queries() + MAX_SEQUENCES
        self._tokens = torch.zeros(3, largest, dtype=torch.int64, device=self._device)  # input id, position, KV slot
        self._tables = torch.zeros(MAX_SEQUENCES, max_blocks, dtype=torch.int32, device=self._device)
        self._tiles = torch.zeros(num_tiles, 4, dtype=torch.int32, device=self._device)
        self._logit_rows = torch.zeros(MAX_SEQUENCES, dtype=torch.int64, device=self._device)
        self._mixed: dict[int, _Captured] = {}
        self._whole: dict[int, _Captured] = {}

    def capture(self, stream: torch.cuda.Stream, memory: Any, max_tokens: int) -> None:
        """Capture every bucket that steps of `max_tokens` can need, into the memory of earlier graphs."""
        with torch.cuda.stream(stream):
            self._tokens[2] = -1
        for buckets, captured in ((_WHOLE_BUCKETS, self._whole), (_MIXED_BUCKETS, self._mixed)):
            limit = next((bucket for bucket in buckets if bucket >= max_tokens), max(buckets))
            for bucket in reversed([bucket for bucket in buckets if bucket <= limit]):
                whole = captured is self._whole
                with torch.cuda.stream(stream):
                    self._step(bucket, whole, None)  # compiles kernels and lets libraries prepare
                    stream.synchronize()
                    captured[bucket] = self._capture(bucket, whole, memory)

    def drop(self) -> None:
        self._mixed.clear()
        self._whole.clear()

    def _capture(self, bucket: int, whole: bool, memory: Any) -> _Captured:
        captured = _Captured()

        @contextmanager
        def piece() -> Iterator[None]:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=memory)
            try:
                yield
            finally:
                graph.capture_end()  # also after an error: nothing else can run on a stream that still captures
            captured.pieces.append(graph)

        with ExitStack() as current:

            def layer_written(layer: int) -> None:
                end, num_layers = layer + 1, len(self._layers)
                last = num_layers - _LAST_PIECE_LAYERS
                if whole and (end in (last, num_layers) or (end % _PIECE_LAYERS == 0 and end < last)):
                    current.close()
                    captured.layer_ends.append(end)
                    current.enter_context(piece())

            current.enter_context(piece())
            self._step(bucket, whole, layer_written)
        captured.layer_ends.append(len(self._layers))
        return captured

    def _step(self, bucket: int, whole: bool, layer_written: Callable[[int], None] | None) -> None:
        batch = GpuBatch(
            layers=self._layers,
            slots=self._tokens[2, :bucket],
            split_memory=self._split,
            decode=None,
            prefill=PrefillRows(
                spans=(), tables=self._tables, tiles=self._tiles, one_prompt_of=bucket if whole else None
            ),
            layer_written=layer_written,
        )
        logits = run(self._model, batch, self._tokens[0, :bucket], self._tokens[1, :bucket], self._logit_rows)
        self._sample(logits, self._rows[:MAX_SEQUENCES])

    def find(self, spans: Sequence[tuple[int, int]]) -> _Captured | None:
        """The captured step for these (start, end) of sequences, if there is one; `launch` takes it."""
        num_tokens = sum(end - start for start, end in spans)
        if len(spans) == 1 and spans[0][0] == 0 and num_tokens > 512:
            return self._whole.get(-(-num_tokens // 128) * 128)
        if len(spans) > MAX_SEQUENCES:
            return None
        return next((self._mixed[bucket] for bucket in sorted(self._mixed) if bucket >= num_tokens), None)

    def launch(
        self,
        captured: _Captured,
        sequences: Sequence[SequenceTokens],
        page: int,
        logit_rows: Sequence[int],
        pending: Tensor | None,
        layers_written: Callable[[int, int], None] | None,
    ) -> None:
        """Queue one step on the current stream; the rows of sampling were sent before.

        Args:
            pending: [2, n] int64 on the device: places in the packed row, and the tokens that belong there.
            layers_written: called with a range of layers when the kernels that write their KV are queued.
        """
        tokens, tables = pack_arrays(sequences, page)
        count = tokens.shape[1]
        bucket = next(b for kind in (self._mixed, self._whole) for b, c in kind.items() if c is captured)
        padded = np.zeros((3, bucket), np.int64)
        padded[2] = -1
        padded[:, :count] = tokens
        tiles = np.zeros((self._tiles.shape[0], 4), np.int32)
        work = prefill_tiles(chunk_spans(sequences))
        tiles[: len(work)] = work
        wanted = np.zeros(MAX_SEQUENCES, np.int64)
        wanted[: len(logit_rows)] = logit_rows
        self._tokens[:, :bucket] = to_device(padded, self._device)
        self._tables[: tables.shape[0], : tables.shape[1]] = to_device(tables, self._device)
        self._tiles.copy_(to_device(tiles, self._device))
        self._logit_rows.copy_(to_device(wanted, self._device))
        if pending is not None:
            self._tokens[0, pending[0]] = pending[1]
        first = 0
        for graph, end in zip(captured.pieces, captured.layer_ends, strict=True):
            graph.replay()
            if layers_written is not None and first < end:  # the last piece of a whole prompt writes no KV
                layers_written(first, end)
            first = end
