"""Between the scattered blocks of a GPU's pool and one canonical payload beside it: one kernel, either way."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_WORDS = 2048  # of a program


# Not compiled anew for numbers that happen to be 1 or whole multiples of 16.
@triton.jit(do_not_specialize=["first_token", "num_tokens", "first_head", "num_heads", "first_word"])
def _move_kernel(
    rows, table, flat, planes, row_words, block_size, first_token, num_tokens, first_head, num_heads, first_word,
    GATHER: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    plane = planes + tl.program_id(0) * 4
    offset, dim = tl.load(plane), tl.load(plane + 1)
    before, pool_head = tl.load(plane + 2) - first_word, first_head - tl.load(plane + 3)
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)  # of the plane's [head][token]
    there = line < num_heads * num_tokens
    head, token = pool_head + line // num_tokens, first_token + line % num_tokens
    block = tl.load(table + token // block_size, mask=there, other=0).to(tl.int64)
    in_row = (head * block_size + token % block_size) * dim + offset
    in_flat = before.to(tl.int64) * num_heads * num_tokens + line.to(tl.int64) * dim
    word = tl.arange(0, WIDTH)
    mask = there[:, None] & (word < dim)[None, :]
    paged = rows + (block * row_words + in_row)[:, None] + word[None, :]
    packed = flat + in_flat[:, None] + word[None, :]
    if GATHER:
        tl.store(packed, tl.load(paged, mask=mask), mask=mask)
    else:
        tl.store(paged, tl.load(packed, mask=mask), mask=mask)


def move(
    rows: Tensor,
    planes: Tensor,
    block_ids: Tensor,
    flat: Tensor,
    *,
    block_size: int,
    first_token: int,
    num_tokens: int,
    first_head: int,
    num_heads: int,
    first_word: int,
    width: int,
    gather: bool,
) -> None:
    """Gather blocks into `flat`, or scatter `flat` into them; queued on the current stream.

    Args:
        rows: [num_blocks, words of a row] of the pool.
        planes: [n, 4] int32, K and V of each layer: words before it in a row, words of a head's token, words of all
            such before it in the model, and the model's number of its first head.
        block_ids: [m] int32; `first_token` is counted from the first one's beginning.
        flat: [words], canonical.
        first_word: what the first plane has before it.
        width: words of the largest head's token.
    """
    width = triton.next_power_of_2(width)
    lines = max(1, _WORDS // width)
    grid = (planes.shape[0], triton.cdiv(num_heads * num_tokens, lines))
    _move_kernel[grid](
        rows, block_ids, flat, planes, rows.stride(0), block_size, first_token, num_tokens, first_head, num_heads,
        first_word, GATHER=gather, WIDTH=width, LINES=lines, num_warps=4,
    )  # fmt: skip
