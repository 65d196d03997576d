"""Our attention function inside unmodified transformers models: write the new KV into its blocks, attend over blocks.

Tokens of many sequences arrive packed in one row. What the model cannot know (whose tokens they are, where their KV
lives) travels beside it in a context variable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ..core.errors import ModelUnsupported
from ..core.kv_geometry import LayerGeometry
from .cpu_attention import decode_kernel
from .cpu_linear import has_native_bfloat16
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
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window

    def mask(self, sliding_window: int | None, dtype: torch.dtype, block_size: int) -> Tensor:
        """[num_sequences, 1, 1, context]: 0 where a token may look, -inf elsewhere; the same for most layers."""
        if (mask := self.masks.get(sliding_window)) is None:
            at, last = torch.arange(self.block_tables.shape[1] * block_size), self.positions[:, None]
            visible = at <= last
            if sliding_window is not None:
                visible &= at > last - sliding_window
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))[:, None, None]
            self.masks[sliding_window] = mask
        return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRules:
    """What the model's layer asks of its attention."""

    scaling: float
    softcap: float | None
    sliding_window: int | None
    sinks: Tensor | None  # [num_heads]


class StepAttention(Protocol):
    """What the attention layers of one step need beside the hidden states, on one kind of device."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, num_heads, num_tokens, key_dim]
        key: Tensor,  # [1, num_kv_heads, num_tokens, key_dim]
        value: Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
        rules: AttentionRules,
    ) -> Tensor:
        """Write the new tokens' KV, then attend over all of their sequences': [num_tokens, num_heads, value_dim]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """A step on the CPU."""

    pool: KvPool
    token_blocks: Tensor  # [num_tokens] int64, block of each new token
    token_offsets: Tensor  # [num_tokens] int64, its place inside the block
    decode: DecodeBatch | None
    chunks: Sequence[Chunk]  # everything that is not in `decode`
    announced: Sequence[Chunk]  # those, wherever they are, whose KV leaves this worker
    kv_written: KvWritten | None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        keys, values = self.pool.keys(layer), self.pool.values(layer)
        keys[self.token_blocks, :, self.token_offsets] = key[0].transpose(0, 1).to(keys.dtype)
        values[self.token_blocks, :, self.token_offsets] = value[0].transpose(0, 1).to(values.dtype)
        if self.kv_written is not None:
            for chunk in self.announced:
                self.kv_written(chunk.request_id, layer, layer + 1, chunk.start, chunk.end)
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        if self.decode is not None:
            rows = self.decode.num_sequences
            output[:rows] = _decode(query[0, :, :rows].transpose(0, 1), self.pool, layer, self.decode, rules)
        for chunk in self.chunks:
            end = chunk.row + chunk.end - chunk.start
            output[chunk.row : end] = _prefill(query[:, :, chunk.row : end], self.pool, layer, chunk, rules)
        return output


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


current: ContextVar[StepAttention | GeometryProbe] = ContextVar("splitserve_attention_batch")


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

    rules = AttentionRules(scaling=scaling, softcap=softcap, sliding_window=sliding_window, sinks=s_aux)
    return batch.attend(layer, query, key, value, rules).unsqueeze(0), None


def _decode(query: Tensor, pool: KvPool, layer: int, batch: DecodeBatch, rules: AttentionRules) -> Tensor:
    """One new token per sequence over all of its KV: [num_sequences, num_heads, key_dim] -> the same with value_dim."""
    kernel = decode_kernel()
    if kernel is None or not kernel.serves(pool, layer, query.shape[1]):
        return _decode_gathered(query, pool, layer, batch, rules)
    return kernel.attend(
        query,
        pool,
        layer,
        batch.block_tables,
        batch.positions,
        scaling=rules.scaling,
        softcap=rules.softcap,
        sliding_window=rules.sliding_window,
        sinks=rules.sinks,
    )


def _decode_gathered(query: Tensor, pool: KvPool, layer: int, batch: DecodeBatch, rules: AttentionRules) -> Tensor:
    """The same without our kernel: KV is copied together for PyTorch's attention."""
    num_sequences, num_heads, dim = query.shape
    k, v = pool.gather(layer, batch.block_tables)
    mask = batch.mask(rules.sliding_window, query.dtype, pool.block_size)
    # The query heads that share a KV head become its rows, so that no KV is repeated.
    grouped = query.reshape(num_sequences, k.shape[1], -1, dim)
    sinks = None if rules.sinks is None else rules.sinks.reshape(1, k.shape[1], -1, 1)
    attended = _attend(grouped, k.to(query.dtype), v.to(query.dtype), mask, rules, sinks)
    return attended.reshape(num_sequences, num_heads, -1)


def _prefill(query: Tensor, pool: KvPool, layer: int, chunk: Chunk, rules: AttentionRules) -> Tensor:
    """A chunk's tokens over everything up to themselves: [1, num_heads, num_tokens, key_dim] -> [num_tokens, ...]."""
    # Half-precision products of this size take ten times as long on a CPU without hardware for them.
    given, query = query.dtype, query.float() if _widen(query.dtype) else query
    k, v = pool.gather(layer, chunk.block_table[None])
    k, v = k[:, :, : chunk.end].to(query.dtype), v[:, :, : chunk.end].to(query.dtype)
    groups = query.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    window = rules.sliding_window
    mask = None  # plain causal
    if chunk.start or (window is not None and window < chunk.end):
        at, position = torch.arange(chunk.end), torch.arange(chunk.start, chunk.end)[:, None]
        visible = at <= position
        if window is not None:
            visible &= at > position - window
        mask = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, float("-inf"))
    sinks = None if rules.sinks is None else rules.sinks.reshape(1, -1, 1, 1)
    return _attend(query, k, v, mask, rules, sinks)[0].transpose(0, 1).to(given)


def _widen(dtype: torch.dtype) -> bool:
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not has_native_bfloat16())


def _attend(
    query: Tensor,  # [batch, heads, queries, key_dim]
    key: Tensor,  # [batch, heads, context, key_dim]
    value: Tensor,  # [batch, heads, context, value_dim]
    mask: Tensor | None,  # 0 or -inf, broadcast to [batch, heads, queries, context]; None: causal
    rules: AttentionRules,
    sinks: Tensor | None,  # broadcast to [batch, heads, queries, 1]: a logit that attends to nothing
) -> Tensor:
    """Softmax attention: [batch, heads, queries, value_dim]. PyTorch's own has neither soft cap nor sinks."""
    if rules.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=rules.scaling
        )
    scores = (query @ key.transpose(-1, -2)).float() * rules.scaling
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if mask is None:
        mask = torch.full((query.shape[2], key.shape[2]), float("-inf")).triu(1)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


AttentionInterface.register(NAME, paged_attention)
