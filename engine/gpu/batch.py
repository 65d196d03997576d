"""What the attention layers of one GPU step need, for a captured decode step and for any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import AttentionRules
from ..pool import KvPool
from ..runner import SequenceTokens
from . import deferred
from .attention_kernels import (
    LayerKv,
    Split,
    decode_attention,
    num_splits,
    prefill_attention,
    rotate_and_write,
    write_kv,
)

# From so many decoding sequences on it pays to begin with the longest.
ORDERED_FROM = 48
# Below this many query tokens our own kernel is as fast as cuDNN's.
CUDNN_FROM_TOKENS = 512


def layer_views(pool: KvPool) -> list[LayerKv]:
    """Kernel addresses of every layer of a pool on a GPU."""
    return [
        LayerKv(
            elements=pool.elements,
            row=pool.elements.shape[0] // pool.num_blocks,
            key_offset=pool.key_offset(i),
            value_offset=pool.value_offset(i),
            num_heads=layer.num_kv_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            page=pool.block_size,
        )
        for i, layer in enumerate(pool.geometry.layers)
    ]


class SplitMemory:
    """Room for the partial results of split decodes, shared by all layers and steps, which never overlap."""

    def __init__(self, device: torch.device, *, max_batch: int, num_heads: int, num_kv_heads: int, dim: int) -> None:
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        sizes = [
            batch * num_splits(batch, num_kv_heads, self._processors)
            for batch in range(1, max_batch + 1)
            if num_splits(batch, num_kv_heads, self._processors) > 1
        ]
        rows = num_heads * max(sizes, default=0)
        self._partial = torch.empty(rows * dim, dtype=torch.float32, device=device)
        self._lse = torch.empty(rows, dtype=torch.float32, device=device)

    def split(self, batch: int, num_kv_heads: int) -> Split:
        return Split(count=num_splits(batch, num_kv_heads, self._processors), partial=self._partial, lse=self._lse)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """The first rows of the packed tokens, one token of one sequence each."""

    count: int
    tables: Tensor  # [rows, max_blocks] int32
    table_rows: Tensor  # [count] int32
    lengths: Tensor  # [count] int32, the new token included; 0 for padding
    order: Tensor | None  # [count] int64, the longest first; None for a few


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRows:
    """Packed chunks after the decode rows."""

    spans: Sequence[tuple[int, int, int]]  # (packed row, start, end) of each chunk; empty inside a captured step
    tables: Tensor  # [chunks, max_blocks] int32
    tiles: Tensor  # [num_tiles, 4] int32
    one_prompt_of: int | None = None  # inside a captured step: all rows are one whole prompt, padded to so many tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBatch:
    """One step's metadata on the device."""

    layers: Sequence[LayerKv]
    slots: Tensor  # [tokens] int64, where each token's KV goes; negative for padding
    split_memory: SplitMemory
    decode: DecodeRows | None
    prefill: PrefillRows | None
    layer_written: Callable[[int], None] | None  # called when the kernels that write a layer's KV are queued

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, num_heads, num_tokens, key_dim]
        key: Tensor,  # [1, num_kv_heads, num_tokens, key_dim]
        value: Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
        rules: AttentionRules,
    ) -> Tensor:
        """Write the new KV and attend: [num_tokens, num_heads, value_dim]."""
        kv = self.layers[layer]
        rotation = deferred.take(query, key)
        query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
        if rotation is None:
            write_kv(key[0], value[0], kv, self.slots)
        else:
            cos, sin = rotation
            rotated = rotate_and_write(
                query[0], key[0], value[0], cos[0], sin[0], kv, self.slots, keep_key=self.prefill is not None
            )
            query, key = (x[None] for x in rotated)
        if self.layer_written is not None:
            self.layer_written(layer)
        q = query[0].transpose(0, 1)  # [num_tokens, num_heads, key_dim]
        count = 0 if self.decode is None else self.decode.count
        first = None if self.decode is None else self._decode(q[:count], kv, self.decode, rules)
        if self.prefill is None:
            assert first is not None
            return first
        output = q.new_empty(q.shape[0], q.shape[1], kv.value_dim)
        if self.prefill.spans:
            row, start, end = self.prefill.spans[-1]
            output[row + end - start :] = 0.0  # memory of other work may hold NaN
        if first is not None:
            output[:count] = first
        return self._prefill(query, key, value, kv, self.prefill, rules, output)

    def _decode(self, q: Tensor, kv: LayerKv, rows: DecodeRows, rules: AttentionRules) -> Tensor:
        return decode_attention(
            q,
            kv,
            rows.tables,
            rows.table_rows,
            rows.lengths,
            scaling=rules.scaling,
            split=self.split_memory.split(rows.count, kv.num_heads),
            order=rows.order,
            softcap=rules.softcap,
            window=rules.sliding_window,
            sinks=rules.sinks,
        )

    def _prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: LayerKv,
        rows: PrefillRows,
        rules: AttentionRules,
        output: Tensor,
    ) -> Tensor:
        if rows.one_prompt_of is not None and _cudnn_attends(rules, query, kv, rows.one_prompt_of):
            return cudnn_causal(query, key, value, 0, rows.one_prompt_of, rules.scaling)
        if _whole_prompts(rows, rules, query, kv):
            for row, start, end in rows.spans:
                attended = cudnn_causal(query, key, value, row, cudnn_length(end), rules.scaling)
                if len(rows.spans) == 1 and attended.shape[0] == output.shape[0]:
                    return attended
                output[row : row + end - start] = attended[: end - start]
            return output
        prefill_attention(
            query[0].transpose(0, 1),
            kv,
            rows.tables,
            rows.tiles,
            output,
            scaling=rules.scaling,
            softcap=rules.softcap,
            window=rules.sliding_window,
            sinks=rules.sinks,
        )
        return output


def _whole_prompts(rows: PrefillRows, rules: AttentionRules, query: Tensor, kv: LayerKv) -> bool:
    """Whether cuDNN's causal attention over the chunks' own tokens is the same as ours, and faster."""
    return bool(rows.spans) and all(
        start == 0 and end >= CUDNN_FROM_TOKENS and _cudnn_attends(rules, query, kv, end)
        for _, start, end in rows.spans
    )


def _cudnn_attends(rules: AttentionRules, query: Tensor, kv: LayerKv, length: int) -> bool:
    if rules.softcap is not None or rules.sinks is not None or query.dtype == torch.float32:
        return False
    window = rules.sliding_window
    plain = window is None or window >= length
    return plain and kv.key_dim == kv.value_dim and kv.key_dim <= 128 and kv.key_dim % 8 == 0


def cudnn_length(num_tokens: int) -> int:
    """Rows that cuDNN attends over for a prompt: it takes 50 ms to prepare for each new length, so there are few.

    The whole model computes so many rows: a sixteenth more than the prompt has in the middle, at most a quarter.
    """
    step = 128 if num_tokens <= 2048 else 256 if num_tokens <= 4096 else 512 if num_tokens <= 8192 else 1024
    return -(-num_tokens // step) * step


def chunk_spans(sequences: Sequence[SequenceTokens], first_row: int = 0) -> list[tuple[int, int, int]]:
    """(packed row, start, end) of each, packed one behind the other from `first_row` on."""
    spans, row = [], first_row
    for s in sequences:
        spans.append((row, s.start, s.end))
        row += len(s.token_ids)
    return spans


def padded_rows(spans: Sequence[tuple[int, int, int]]) -> int:
    """Rows that the packed tokens need so that every whole prompt can be rounded up in place."""
    return max((row + cudnn_length(end) if start == 0 else row + end - start for row, start, end in spans), default=0)


def cudnn_causal(query: Tensor, key: Tensor, value: Tensor, row: int, length: int, scaling: float) -> Tensor:
    """Causal attention of `length` rows from `row` on: [length, heads, dim].

    The rows behind a prompt's own are another prompt's or padding; no row of the prompt looks at them.
    """
    # Strides are part of what cuDNN prepares for, and those of the first dimension would follow the packed length.
    q, k, v = (
        x[0, :, row : row + length].as_strided(
            (1, x.shape[1], length, x.shape[3]),
            (length * x.stride(2), x.stride(1), x.stride(2), 1),
            x.storage_offset() + row * x.stride(2),
        )
        for x in (query, key, value)
    )
    attended: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, False, 0.0, True, False, scale=scaling
    )[0]
    return attended[0].transpose(0, 1)
