"""Short packed steps as CUDA graphs: up to a thousand tokens, the host takes longer to launch them than the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..runner import SequenceTokens
from .attention_kernels import LayerKv, prefill_tiles, tile_queries
from .batch import GpuBatch, PrefillRows, SplitMemory
from .packed import pack_arrays, run, to_device

MAX_TOKENS = 1024
MAX_SEQUENCES = 16
_BUCKETS = (*range(64, 513, 64), *range(640, MAX_TOKENS + 1, 128))


class CapturedPrefill:
    """Any mix of at most `MAX_SEQUENCES` chunks and single tokens, padded to a bucket of tokens."""

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
        device = model.device
        num_tiles = MAX_TOKENS // tile_queries() + MAX_SEQUENCES
        self._tokens = torch.zeros(3, MAX_TOKENS, dtype=torch.int64, device=device)  # input id, position, KV slot
        self._tables = torch.zeros(MAX_SEQUENCES, max_blocks, dtype=torch.int32, device=device)
        self._tiles = torch.zeros(num_tiles, 4, dtype=torch.int32, device=device)
        self._logit_rows = torch.zeros(MAX_SEQUENCES, dtype=torch.int64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def is_captured(self) -> bool:
        return bool(self._graphs)

    def takes(self, num_tokens: int, num_sequences: int) -> bool:
        return bool(self._graphs) and num_tokens <= max(self._graphs) and num_sequences <= MAX_SEQUENCES

    def capture(self, stream: torch.cuda.Stream, memory: object, max_tokens: int) -> object:
        """Capture every bucket up to `max_tokens` into the memory of earlier graphs; returns that memory."""
        self._tokens[2] = -1
        limit = next((bucket for bucket in _BUCKETS if bucket >= max_tokens), MAX_TOKENS)
        for bucket in reversed([bucket for bucket in _BUCKETS if bucket <= limit]):
            with torch.cuda.stream(stream):
                self._step(bucket)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, stream=stream):  # type: ignore[arg-type]
                self._step(bucket)
            memory = graph.pool()
            self._graphs[bucket] = graph
        return memory

    def _step(self, bucket: int) -> None:
        batch = GpuBatch(
            layers=self._layers,
            slots=self._tokens[2, :bucket],
            split_memory=self._split,
            decode=None,
            prefill=PrefillRows(spans=(), tables=self._tables, tiles=self._tiles),
            layer_written=None,
        )
        logits = run(self._model, batch, self._tokens[0, :bucket], self._tokens[1, :bucket], self._logit_rows)
        self._sample(logits, self._rows[:MAX_SEQUENCES])

    def launch(
        self, sequences: Sequence[SequenceTokens], page: int, logit_rows: Sequence[int], pending: Tensor | None
    ) -> None:
        """Queue one step on the current stream; the rows of sampling were sent before.

        `pending` [2, n] int64 on the device: places in the packed row, and the tokens that belong there.
        """
        tokens, tables = pack_arrays(sequences, page)
        count = tokens.shape[1]
        bucket = next(bucket for bucket in sorted(self._graphs) if bucket >= count)
        padded = np.zeros((3, bucket), np.int64)
        padded[2] = -1
        padded[:, :count] = tokens
        spans, row = [], 0
        for s in sequences:
            spans.append((row, s.start, s.end))
            row += len(s.token_ids)
        tiles = np.zeros((self._tiles.shape[0], 4), np.int32)
        work = prefill_tiles(spans)
        tiles[: len(work)] = work
        wanted = np.zeros(MAX_SEQUENCES, np.int64)
        wanted[: len(logit_rows)] = logit_rows
        device = self._model.device
        self._tokens[:, :bucket] = to_device(padded, device)
        self._tables[: tables.shape[0], : tables.shape[1]] = to_device(tables, device)
        self._tiles.copy_(to_device(tiles, device))
        self._logit_rows.copy_(to_device(wanted, device))
        if pending is not None:
            self._tokens[0, pending[0]] = pending[1]
        self._graphs[bucket].replay()
