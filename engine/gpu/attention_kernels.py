"""Attention over the paged KV pool in Triton: write new KV, decode (split KV), prefill (packed prompts of any length).

One element of layer l, head h, token t of a sequence lives at
`pool[block_table[t // page] * row + offset_l + (h * page + t % page) * dim + d]`; see KvPool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = math.log2(math.e)
_TOKENS = 64  # KV tokens of one iteration
_QUERIES = 128  # query rows of one prefill program


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKv:
    """Where one layer's keys and values are."""

    elements: Tensor  # [num_blocks * row], KV dtype, on the device
    row: int  # elements from one block to the next
    key_offset: int  # elements from the row's start
    value_offset: int
    num_heads: int
    key_dim: int
    value_dim: int
    page: int  # tokens per block


@triton.jit
def _write_kernel(
    key, value, pool, slots,
    key_head, key_token, value_head, value_token, row, key_offset, value_offset,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    KEY_DIM: tl.constexpr, BLOCK_K: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    block = pool + (slot // PAGE) * row
    head = tl.arange(0, BLOCK_H)[:, None]
    at = head * PAGE + slot % PAGE
    dim = tl.arange(0, BLOCK_K)[None, :]
    mask = (head < HEADS) & (dim < KEY_DIM)
    new = tl.load(key + head * key_head + token.to(tl.int64) * key_token + dim, mask=mask)
    tl.store(block + key_offset + at * KEY_DIM + dim, new.to(pool.dtype.element_ty), mask=mask)
    dim = tl.arange(0, BLOCK_V)[None, :]
    mask = (head < HEADS) & (dim < VALUE_DIM)
    new = tl.load(value + head * value_head + token.to(tl.int64) * value_token + dim, mask=mask)
    tl.store(block + value_offset + at * VALUE_DIM + dim, new.to(pool.dtype.element_ty), mask=mask)


def write_kv(key: Tensor, value: Tensor, kv: LayerKv, slots: Tensor) -> None:
    """Store keys [heads, tokens, key_dim] and values at `slots` [tokens] (block * page + offset; negative: nowhere)."""
    assert key.stride(2) == value.stride(2) == 1, "the last dimension is contiguous"
    _write_kernel[(key.shape[1],)](
        key, value, kv.elements, slots,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), kv.row, kv.key_offset, kv.value_offset,
        HEADS=kv.num_heads, BLOCK_H=triton.next_power_of_2(kv.num_heads),
        KEY_DIM=kv.key_dim, BLOCK_K=triton.next_power_of_2(kv.key_dim),
        VALUE_DIM=kv.value_dim, BLOCK_V=triton.next_power_of_2(kv.value_dim),
        PAGE=kv.page,
    )  # fmt: skip


@triton.jit
def _rotate_heads(x, out, cos, sin, mask, HALF: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate rows `x` of pointers to `out`; dimensions past 2 * HALF are copied. `mask` [heads, 1]."""
    dim = tl.arange(0, BLOCK)[None, :]
    inside = mask & (dim < HALF)
    low = tl.load(x + dim, mask=inside).to(tl.float32)
    high = tl.load(x + HALF + dim, mask=inside).to(tl.float32)
    cos_low = tl.load(cos + dim, mask=dim < HALF).to(tl.float32)
    cos_high = tl.load(cos + HALF + dim, mask=dim < HALF).to(tl.float32)
    sin_low = tl.load(sin + dim, mask=dim < HALF).to(tl.float32)
    sin_high = tl.load(sin + HALF + dim, mask=dim < HALF).to(tl.float32)
    tl.store(out + dim, (low * cos_low - high * sin_low).to(out.dtype.element_ty), mask=inside)
    tl.store(out + HALF + dim, (high * cos_high + low * sin_high).to(out.dtype.element_ty), mask=inside)
    for start in tl.static_range(2 * HALF, DIM, BLOCK):
        rest = mask & (start + dim < DIM)
        tl.store(out + start + dim, tl.load(x + start + dim, mask=rest).to(out.dtype.element_ty), mask=rest)


@triton.jit
def _rotary_write_kernel(
    query, key, value, cos, sin, pool, slots, query_out, key_out,
    query_head, query_token, key_head, key_token, value_head, value_token, cos_token, row, key_offset, value_offset,
    QUERY_HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, QUERY_BLOCKS: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, KEEP_KEY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cos += token * cos_token
    sin += token * cos_token
    if part < QUERY_BLOCKS:
        head = part * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
        x = query + token * query_token + head * query_head
        out = query_out + (token * QUERY_HEADS + head) * DIM
        _rotate_heads(x, out, cos, sin, head < QUERY_HEADS, HALF, DIM, BLOCK_D)
    else:
        kv_head = tl.arange(0, BLOCK_H)[:, None]
        new_key = key + token * key_token + kv_head * key_head
        if KEEP_KEY:
            kept = key_out + (token * KV_HEADS + kv_head) * DIM
            _rotate_heads(new_key, kept, cos, sin, kv_head < KV_HEADS, HALF, DIM, BLOCK_D)
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            block = pool + (slot // PAGE) * row
            at = kv_head * PAGE + slot % PAGE
            in_pool = block + key_offset + at * DIM
            _rotate_heads(new_key, in_pool, cos, sin, kv_head < KV_HEADS, HALF, DIM, BLOCK_D)
            dim = tl.arange(0, BLOCK_V)[None, :]
            mask = (kv_head < KV_HEADS) & (dim < VALUE_DIM)
            new = tl.load(value + kv_head * value_head + token * value_token + dim, mask=mask)
            tl.store(block + value_offset + at * VALUE_DIM + dim, new.to(pool.dtype.element_ty), mask=mask)


def rotate_and_write(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, kv: LayerKv, slots: Tensor, *, keep_key: bool
) -> tuple[Tensor, Tensor]:
    """Rotary embedding (half-split) of queries and keys, and `write_kv` of the result, in one pass.

    Args:
        query, key, value: [heads, tokens, dim], last dimension contiguous.
        cos, sin: [tokens, <= dim].
        keep_key: also return the keys; otherwise they are in the pool only and the second result is `key`.
    Returns: rotated queries and keys, [heads, tokens, dim] laid out token-major.
    """
    heads, tokens, dim = query.shape
    assert query.stride(2) == key.stride(2) == value.stride(2) == 1, "the last dimension is contiguous"
    query_out = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
    key_out = torch.empty(tokens, kv.num_heads, dim, dtype=key.dtype, device=key.device) if keep_key else key
    half = cos.shape[-1] // 2
    block_q = min(8, triton.next_power_of_2(heads))
    query_blocks = triton.cdiv(heads, block_q)
    _rotary_write_kernel[(tokens, query_blocks + 1)](
        query, key, value, cos, sin, kv.elements, slots, query_out, key_out,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        cos.stride(0), kv.row, kv.key_offset, kv.value_offset,
        QUERY_HEADS=heads, BLOCK_Q=block_q, QUERY_BLOCKS=query_blocks,
        KV_HEADS=kv.num_heads, BLOCK_H=triton.next_power_of_2(kv.num_heads),
        DIM=dim, HALF=half, BLOCK_D=triton.next_power_of_2(half),
        VALUE_DIM=kv.value_dim, BLOCK_V=triton.next_power_of_2(kv.value_dim),
        PAGE=kv.page, KEEP_KEY=keep_key, num_warps=4,
    )  # fmt: skip
    return query_out.transpose(0, 1), key_out.transpose(0, 1) if keep_key else key


@triton.jit
def _decode_kernel(
    query, pool, tables, table_rows, lengths, order, sinks, output, partial, partial_lse,
    scale, softcap, window,
    query_row, query_head, row, key_offset, value_offset, table_row, output_row, output_head,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    KEY_DIM: tl.constexpr, BLOCK_K: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    # The first dimension of a grid runs fastest, so the programs of the first sequences in `order` start first.
    sequence, kv_head, split = tl.program_id(2), tl.program_id(0), tl.program_id(1)
    if ORDERED:
        sequence = tl.load(order + sequence).to(tl.int32)
    length = tl.load(lengths + sequence)
    table = tables + tl.load(table_rows + sequence).to(tl.int64) * table_row
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    span = tl.cdiv(tl.cdiv(length - first, NUM_SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * span
    end = tl.minimum(begin + span, length)

    g, dk, dv = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    head = kv_head * GROUP + g
    q = tl.load(
        query + sequence.to(tl.int64) * query_row + head[:, None] * query_head + dk[None, :],
        mask=(g[:, None] < GROUP) & (dk[None, :] < KEY_DIM), other=0.0,
    )  # fmt: skip
    maximum = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        token = start + n
        valid = token < end
        block = tl.load(tables_at(table, token, PAGE), mask=valid, other=0).to(tl.int64) * row
        within = kv_head * PAGE + token % PAGE
        k = tl.load(
            pool + key_offset + (block + within * KEY_DIM)[None, :] + dk[:, None],
            mask=valid[None, :] & (dk[:, None] < KEY_DIM), other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * scores / softcap)) - 1.0)
        scores = tl.where(valid[None, :], scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        rescale = tl.exp2(maximum - higher)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(
            pool + value_offset + (block + within * VALUE_DIM)[:, None] + dv[None, :],
            mask=valid[:, None] & (dv[None, :] < VALUE_DIM), other=0.0,
        )  # fmt: skip
        acc = acc * rescale[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
        maximum = higher

    stored = (g[:, None] < GROUP) & (dv[None, :] < VALUE_DIM)
    if NUM_SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=g < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(maximum, sink)
            rescale = tl.exp2(maximum - higher)
            total = total * rescale + tl.exp2(sink - higher)
            acc = acc * rescale[:, None]
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        at = output + sequence.to(tl.int64) * output_row + head[:, None] * output_head + dv[None, :]
        tl.store(at, acc.to(output.dtype.element_ty), mask=stored)
    else:
        at = (sequence.to(tl.int64) * NUM_HEADS + head) * NUM_SPLITS + split
        tl.store(
            partial + at[:, None] * VALUE_DIM + dv[None, :], acc / tl.where(total > 0, total, 1.0)[:, None], mask=stored
        )
        tl.store(partial_lse + at, maximum + tl.log2(total), mask=g < GROUP)  # -inf where nothing was seen


@triton.jit
def tables_at(table, token, PAGE: tl.constexpr):
    return table + token // PAGE


@triton.jit
def _combine_kernel(
    partial, partial_lse, sinks, output, output_row, output_head,
    NUM_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, NUM_SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, dv = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_V)
    at = (sequence * NUM_HEADS + head) * NUM_SPLITS + split
    lse = tl.load(partial_lse + at)
    highest = tl.max(lse, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(lse - highest)
    total = tl.sum(weights, 0)
    if SINKS:
        total += tl.exp2(sink - highest)
    parts = tl.load(partial + at[:, None] * VALUE_DIM + dv[None, :], mask=dv[None, :] < VALUE_DIM, other=0.0)
    mixed = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        output + sequence * output_row + head * output_head + dv, mixed.to(output.dtype.element_ty), mask=dv < VALUE_DIM
    )


def num_splits(batch: int, num_kv_heads: int, num_processors: int) -> int:
    """Programs that share one sequence and KV head, a power of two: enough to fill the device, no more."""
    wanted = 4 * num_processors / (batch * num_kv_heads)
    return min(64, triton.next_power_of_2(max(1, int(wanted))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Memory of a split decode: partial results before they are combined."""

    count: int
    partial: Tensor  # [batch * heads * count * value_dim] fp32, at least
    lse: Tensor  # [batch * heads * count] fp32, at least


def decode_attention(
    query: Tensor,
    kv: LayerKv,
    tables: Tensor,
    table_rows: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    split: Split,
    order: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query token per sequence over its paged KV.

    Args:
        query: [sequences, heads, key_dim], last dimension contiguous.
        tables: [rows, max_blocks] int32; `table_rows` [sequences] int32 names each sequence's row.
        lengths: [sequences] int32, tokens attended to; 0 gives zeros.
        order: [sequences] int64, the longest first. More programs than the device holds at once are done sooner if the
            last to start are short: 185 us instead of 220 for 96 sequences of 680 to 3,400 tokens on an H200, 240
            instead of 280 for 128. Of equal lengths it makes no difference.
    Returns: [sequences, heads, value_dim].
    """
    num_sequences, num_heads, key_dim = query.shape
    assert query.stride(2) == 1, "the last dimension is contiguous"
    assert (key_dim, num_heads % kv.num_heads) == (kv.key_dim, 0)
    assert max(kv.key_dim, kv.value_dim) <= 256, "registers hold heads of at most 256"
    output = query.new_empty(num_sequences, num_heads, kv.value_dim)
    group = num_heads // kv.num_heads
    block_v = max(16, triton.next_power_of_2(kv.value_dim))
    sink = query if sinks is None else sinks
    wide = max(kv.key_dim, kv.value_dim) > 128 or query.element_size() == 4
    _decode_kernel[(kv.num_heads, split.count, num_sequences)](
        query, kv.elements, tables, table_rows, lengths, lengths if order is None else order, sink, output,
        split.partial, split.lse,
        scaling, softcap or 1.0, window or 0,
        query.stride(0), query.stride(1), kv.row, kv.key_offset, kv.value_offset, tables.stride(0),
        output.stride(0), output.stride(1),
        NUM_HEADS=num_heads, GROUP=group, BLOCK_G=max(16, triton.next_power_of_2(group)),
        KEY_DIM=kv.key_dim, BLOCK_K=max(16, triton.next_power_of_2(kv.key_dim)),
        VALUE_DIM=kv.value_dim, BLOCK_V=block_v,
        PAGE=kv.page, BLOCK_N=_TOKENS // 2 if wide else _TOKENS, NUM_SPLITS=split.count,
        SOFTCAP=softcap is not None, WINDOW=window is not None, SINKS=sinks is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", ORDERED=order is not None,
        num_warps=4 if wide else 2, num_stages=2 if wide else 3,
    )  # fmt: skip
    if split.count > 1:
        _combine_kernel[(num_sequences, num_heads)](
            split.partial, split.lse, sink, output, output.stride(0), output.stride(1),
            NUM_HEADS=num_heads, VALUE_DIM=kv.value_dim, BLOCK_V=block_v, NUM_SPLITS=split.count,
            SINKS=sinks is not None, num_warps=4,
        )  # fmt: skip
    return output


@triton.jit
def _prefill_kernel(
    query, pool, tables, tiles, sinks, output,
    scale, softcap, window,
    query_row, query_head, row, key_offset, value_offset, table_row, output_row, output_head,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr, BLOCK_K: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    packed_row = tl.load(tiles + 4 * tile).to(tl.int64)
    position = tl.load(tiles + 4 * tile + 1)  # of the tile's first query
    count = tl.load(tiles + 4 * tile + 2)
    table = tables + tl.load(tiles + 4 * tile + 3).to(tl.int64) * table_row
    if count <= 0:
        return
    m, n, dk, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    kv_head = head // GROUP
    q = tl.load(
        query + (packed_row + m)[:, None] * query_row + head * query_head + dk[None, :],
        mask=(m[:, None] < count) & (dk[None, :] < KEY_DIM), other=0.0,
    )  # fmt: skip
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    last = position + count
    first = 0
    if WINDOW:
        first = tl.maximum(position + 1 - window, 0) // BLOCK_N * BLOCK_N
    for start in range(first, last, BLOCK_N):
        token = start + n
        valid = token < last
        block = tl.load(tables_at(table, token, PAGE), mask=valid, other=0).to(tl.int64) * row
        within = kv_head * PAGE + token % PAGE
        k = tl.load(
            pool + key_offset + (block + within * KEY_DIM)[None, :] + dk[:, None],
            mask=valid[None, :] & (dk[:, None] < KEY_DIM), other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * scores / softcap)) - 1.0)
        seen = token[None, :] <= (position + m)[:, None]
        if WINDOW:
            seen = seen & (token[None, :] > (position + m)[:, None] - window)
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing yet
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(
            pool + value_offset + (block + within * VALUE_DIM)[:, None] + dv[None, :],
            mask=valid[:, None] & (dv[None, :] < VALUE_DIM), other=0.0,
        )  # fmt: skip
        acc = acc * rescale[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
        maximum = higher
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(maximum, sink)
        rescale = tl.exp2(maximum - higher)
        total = total * rescale + tl.exp2(sink - higher)
        acc = acc * rescale[:, None]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        output + (packed_row + m)[:, None] * output_row + head * output_head + dv[None, :],
        acc.to(output.dtype.element_ty), mask=(m[:, None] < count) & (dv[None, :] < VALUE_DIM),
    )  # fmt: skip


def tile_queries() -> int:
    """Query rows of one tile of `prefill_tiles`."""
    return _QUERIES


def prefill_tiles(chunks: list[tuple[int, int, int]]) -> list[list[int]]:
    """Work list of `prefill_attention` for chunks (packed row, start, end): [row, position, queries, chunk] each."""
    return [
        [row + at, start + at, min(_QUERIES, end - start - at), index]
        for index, (row, start, end) in enumerate(chunks)
        for at in range(0, end - start, _QUERIES)
    ]


def prefill_attention(
    query: Tensor,
    kv: LayerKv,
    tables: Tensor,
    tiles: Tensor,
    output: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Causal attention of packed chunks over their paged KV, which holds the chunks' own tokens already.

    Args:
        query: [tokens, heads, key_dim], last dimension contiguous.
        tables: [chunks, max_blocks] int32.
        tiles: [num_tiles, 4] int32 from `prefill_tiles`; rows with 0 queries do nothing.
        output: [tokens, heads, value_dim], written.
    """
    _, num_heads, key_dim = query.shape
    assert query.stride(2) == output.stride(2) == 1, "the last dimension is contiguous"
    assert key_dim == kv.key_dim
    assert max(kv.key_dim, kv.value_dim) <= 256, "registers hold heads of at most 256"
    wide = max(kv.key_dim, kv.value_dim) > 128 or query.element_size() == 4
    _prefill_kernel[(num_heads, tiles.shape[0])](
        query, kv.elements, tables, tiles, query if sinks is None else sinks, output,
        scaling, softcap or 1.0, window or 0,
        query.stride(0), query.stride(1), kv.row, kv.key_offset, kv.value_offset, tables.stride(0),
        output.stride(0), output.stride(1),
        GROUP=num_heads // kv.num_heads,
        KEY_DIM=kv.key_dim, BLOCK_K=max(16, triton.next_power_of_2(kv.key_dim)),
        VALUE_DIM=kv.value_dim, BLOCK_V=max(16, triton.next_power_of_2(kv.value_dim)),
        PAGE=kv.page, BLOCK_M=_QUERIES, BLOCK_N=32 if wide else _TOKENS,
        SOFTCAP=softcap is not None, WINDOW=window is not None, SINKS=sinks is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=8, num_stages=2 if wide else 3,
    )  # fmt: skip
