"""A forward pass over packed tokens of many sequences on a GPU, for any mix of chunks and single tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import current
from ..pool import KvPool
from ..runner import SequenceTokens
from .attention_kernels import LayerKv, prefill_tiles
from .batch import ORDERED_FROM, DecodeRows, GpuBatch, PrefillRows, SplitMemory, chunk_spans, layer_views, padded_rows
from .last_layer import logits_of
from .uploads import to_device


def pack(
    sequences: Sequence[SequenceTokens],
    *,
    layers: Sequence[LayerKv],
    page: int,
    split_memory: SplitMemory,
    device: torch.device,
    layer_written: Callable[[int], None] | None = None,
) -> tuple[GpuBatch, Tensor, Tensor]:
    """Metadata, input ids and position ids, [tokens] int64 each; sequences with a single new token come first.

    Rows may be added at the end whose KV goes nowhere.
    """
    num_decode = sum(len(s.token_ids) == 1 for s in sequences)
    assert all(len(s.token_ids) == 1 for s in sequences[:num_decode]), "sequences with one new token come first"
    spans = chunk_spans(sequences[num_decode:], num_decode)
    wide, tables = pack_arrays(sequences, page)
    num_tokens = wide.shape[1]
    if (padding := padded_rows(spans) - num_tokens) > 0:
        wide = np.pad(wide, ((0, 0), (0, padding)))
        wide[2, num_tokens:] = -1
    input_ids, position_ids, kv_slots = to_device(wide, device)
    tables_on_device = to_device(tables, device)
    decode = prefill = None
    if num_decode:
        ends = np.zeros((2, -(-num_decode // 4) * 4), np.int32)
        ends[:, :num_decode] = range(num_decode), [s.end for s in sequences[:num_decode]]
        rows, lengths = to_device(ends, device)
        decode = DecodeRows(
            count=num_decode,
            tables=tables_on_device,
            table_rows=rows[:num_decode],
            lengths=lengths[:num_decode],
            order=torch.argsort(lengths[:num_decode], descending=True) if num_decode >= ORDERED_FROM else None,
        )
    if spans:
        tiles = to_device(np.array(prefill_tiles(spans), np.int32), device)
        prefill = PrefillRows(spans=spans, tables=tables_on_device[num_decode:], tiles=tiles)
    batch = GpuBatch(
        layers=layers,
        slots=kv_slots,
        split_memory=split_memory,
        decode=decode,
        prefill=prefill,
        layer_written=layer_written,
    )
    return batch, input_ids, position_ids


def table_width(num_tokens: int, page: int) -> int:
    """Columns of a block table, a multiple of 16.

    Triton compiles a kernel anew, for half a second, when a pointer or stride is first divisible by 16 or not.
    """
    return -(-num_tokens // (16 * page)) * 16


def pack_arrays(
    sequences: Sequence[SequenceTokens], page: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int32]]]:
    """([3, tokens] of input id, position and KV slot; [sequences, table_width] block tables)."""
    tokens = np.concatenate([np.asarray(s.token_ids, np.int64) for s in sequences])
    positions = [np.arange(s.start, s.end) for s in sequences]
    slots = [
        np.asarray(s.block_table, np.int64)[at // page] * page + at % page
        for s, at in zip(sequences, positions, strict=True)
    ]
    tables = np.zeros((len(sequences), table_width(max(s.end for s in sequences), page)), np.int32)
    for i, s in enumerate(sequences):
        used = -(-s.end // page)
        tables[i, :used] = s.block_table[:used]
    return np.stack([tokens, np.concatenate(positions), np.concatenate(slots)]), tables


def run(
    model: PreTrainedModel, batch: GpuBatch, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor | None
) -> Tensor:
    """Logits [rows, vocab] in the model's dtype, of every token where `logit_rows` is None."""
    token = current.set(batch)
    try:
        return logits_of(
            model, logit_rows, input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False
        )[0]
    finally:
        current.reset(token)


@torch.inference_mode()
def forward(
    model: PreTrainedModel, pool: KvPool, sequences: Sequence[SequenceTokens], logit_rows: Sequence[int]
) -> Tensor:
    """As ..runner.forward, through the kernels that serve: [len(logit_rows), vocab] fp32."""
    layers = pool.geometry.layers
    split = SplitMemory(
        model.device,
        max_batch=len(sequences),
        num_heads=int(model.config.get_text_config().num_attention_heads),
        num_kv_heads=min(layer.num_kv_heads for layer in layers),
        dim=max(layer.value_dim for layer in layers),
    )
    batch, input_ids, position_ids = pack(
        sequences, layers=layer_views(pool), page=pool.block_size, split_memory=split, device=model.device
    )
    rows = torch.tensor(list(logit_rows), dtype=torch.int64, device=model.device)
    return run(model, batch, input_ids, position_ids, rows).float()
