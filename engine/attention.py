"""Our attention function inside unmodified transformers models: write the new KV into its blocks, attend over blocks.

Tokens of many sequences arrive packed in one row. What the model cannot know (whose tokens they are, where their KV
lives) travels beside it in a context variable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ..core.errors import ModelUnsupported
from ..core.kv_geometry import LayerGeometry
from .pool import KvPool

NAME = "splitserve"

KvWritten = Callable[[str, int, int, int, int], None]
"""(request_id, layer_start, layer_end, token_start, token_end): this KV is in the pool now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive new tokens of one sequence, somewhere in the packed row."""

    request_id: str
    row: int  # of its first token in the packed row
    start: int  # position of its first token in the sequence
    end: int
    block_table: Tensor  # [num_blocks] int64, the blocks of tokens [0, end)
    announce: bool  # its KV leaves this worker: tell whoever sends it


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """The first `num_sequences` tokens of the packed row: one new token each, attended to together."""

    num_sequences: int
    block_tables: Tensor  # [num_sequences, max_blocks] int64, padded with block 0
    positions: Tensor  # [num_sequences] int64, of the new token


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """Everything that the attention layers of one step need beside the hidden states."""

    pool: KvPool
    token_blocks: Tensor  # [num_tokens] int64, block of each new token
    token_offsets: Tensor  # [num_tokens] int64, its place inside the block
    decode: DecodeBatch | None
    chunks: Sequence[Chunk]  # everything that is not in `decode`
    announced: Sequence[Chunk]  # those, wherever they are, whose KV leaves this worker
    kv_written: KvWritten | None


class GeometryProbe:
    """Records the KV shape of each layer that calls our attention function."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerGeometry] = {}

    def record(self, layer: int, key: Tensor, value: Tensor, sliding_window: int | None) -> None:
        """Raises: ModelUnsupported: a layer attends twice, so one KV cache per layer would be wrong."""
        if layer in self.layers:
            raise ModelUnsupported(
                f"layer {layer} attends more than once in a forward pass; its KV would be overwritten"
            )
        self.layers[layer] = LayerGeometry(
            num_kv_heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3], sliding_window=sliding_window
        )


current: ContextVar[AttentionBatch | GeometryProbe] = ContextVar("splitserve_attention_batch")


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, key_dim]
    key: Tensor,  # [1, num_kv_heads, num_tokens, key_dim]
    value: Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one layer; the signature is transformers'. Returns [1, num_tokens, num_heads, value_dim]."""
    batch, layer = current.get(), module.layer_idx
    assert isinstance(layer, int)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(batch, GeometryProbe):
        batch.record(layer, key, value, sliding_window)
        groups = query.shape[1] // key.shape[1]
        return query.new_zeros(1, query.shape[2], key.shape[1] * groups, value.shape[3]), None

    keys, values = batch.pool.keys(layer), batch.pool.values(layer)
    keys[batch.token_blocks, :, batch.token_offsets] = key[0].transpose(0, 1).to(keys.dtype)
    values[batch.token_blocks, :, batch.token_offsets] = value[0].transpose(0, 1).to(values.dtype)
    if batch.kv_written is not None:
        for chunk in batch.announced:
            batch.kv_written(chunk.request_id, layer, layer + 1, chunk.start, chunk.end)

    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    if batch.decode is not None:
        rows = batch.decode.num_sequences
        output[:rows] = _decode(
            query[0, :, :rows].transpose(0, 1), keys, values, batch.decode, scaling, softcap, sliding_window, s_aux
        )
    for chunk in batch.chunks:
        end = chunk.row + chunk.end - chunk.start
        output[chunk.row : end] = _prefill(
            query[:, :, chunk.row : end], keys, values, chunk, scaling, softcap, sliding_window, s_aux
        )
    return output.unsqueeze(0), None


def _decode(
    query: Tensor,  # [num_sequences, num_heads, key_dim]
    keys: Tensor,
    values: Tensor,
    batch: DecodeBatch,
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """One new token of each sequence over all of its KV: [num_sequences, num_heads, value_dim]."""
    num_sequences, num_heads, dim = query.shape
    k = _gather(keys, batch.block_tables).to(query.dtype)
    v = _gather(values, batch.block_tables).to(query.dtype)
    at = torch.arange(k.shape[2])
    visible = at <= batch.positions[:, None]  # [num_sequences, context]
    if sliding_window is not None:
        visible &= at > batch.positions[:, None] - sliding_window
    # The query heads that share a KV head become its rows, so that no KV is repeated.
    grouped = query.reshape(num_sequences, k.shape[1], -1, dim)
    sinks = None if sinks is None else sinks.reshape(1, k.shape[1], -1, 1)
    attended = _attend(grouped, k, v, visible[:, None, None, :], scaling, softcap, sinks)
    return attended.reshape(num_sequences, num_heads, v.shape[3])


def _prefill(
    query: Tensor,  # [1, num_heads, num_tokens, key_dim]
    keys: Tensor,
    values: Tensor,
    chunk: Chunk,
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """A chunk's tokens over everything up to themselves: [num_tokens, num_heads, value_dim]."""
    k = _gather(keys, chunk.block_table[None])[:, :, : chunk.end].to(query.dtype)
    v = _gather(values, chunk.block_table[None])[:, :, : chunk.end].to(query.dtype)
    groups = query.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    at, position = torch.arange(chunk.end), torch.arange(chunk.start, chunk.end)[:, None]
    visible = None  # plain causal
    if chunk.start or (sliding_window is not None and sliding_window < chunk.end):
        visible = at <= position
        if sliding_window is not None:
            visible &= at > position - sliding_window
    sinks = None if sinks is None else sinks.reshape(1, -1, 1, 1)
    return _attend(query, k, v, visible, scaling, softcap, sinks)[0].transpose(0, 1)


def _attend(
    query: Tensor,  # [batch, heads, queries, key_dim]
    key: Tensor,  # [batch, heads, context, key_dim]
    value: Tensor,  # [batch, heads, context, value_dim]
    visible: Tensor | None,  # bool, broadcast to [batch, heads, queries, context]; None: causal
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,  # broadcast to [batch, heads, queries, 1]: a logit that attends to nothing
) -> Tensor:
    """Softmax attention: [batch, heads, queries, value_dim]. PyTorch's own has neither soft cap nor sinks."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=visible is None, scale=scaling
        )
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def _gather(view: Tensor, block_tables: Tensor) -> Tensor:
    """[num_blocks, heads, block_size, dim] by [num, max_blocks] -> [num, heads, max_blocks * block_size, dim]."""
    heads, dim = view.shape[1], view.shape[3]
    gathered = view[block_tables[:, None, :], torch.arange(heads)[:, None]]  # one copy, already head-major
    return gathered.view(block_tables.shape[0], heads, -1, dim)


AttentionInterface.register(NAME, paged_attention)
