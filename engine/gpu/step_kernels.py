"""The two ends of a captured decode step: spread what the host sent, keep what was chosen."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# int32 per row: token, slot, position, block, top_k, the fp32 bits of temperature, top_p, min_p, two keys of the noise
FIELDS = 10


@triton.jit
def _unpack_kernel(
    rows, last_tokens, tables, table_row, input_ids, position_ids, kv_slots, lengths, table_rows,
    FIELDS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    token = tl.load(rows + row * FIELDS)
    slot = tl.load(rows + row * FIELDS + 1)
    position = tl.load(rows + row * FIELDS + 2)
    block = tl.load(rows + row * FIELDS + 3)
    if slot < 0:  # padding
        tl.store(input_ids + row, tl.zeros([], tl.int64))
        tl.store(position_ids + row, tl.zeros([], tl.int64))
        tl.store(kv_slots + row, tl.full([], -1, tl.int64))
        tl.store(lengths + row, 0)
        tl.store(table_rows + row, 0)
    else:
        known = tl.load(last_tokens + slot)
        tl.store(input_ids + row, tl.where(token < 0, known, token.to(tl.int64)))
        tl.store(position_ids + row, position.to(tl.int64))
        tl.store(kv_slots + row, block.to(tl.int64) * PAGE + position % PAGE)
        tl.store(lengths + row, position + 1)
        tl.store(table_rows + row, slot)
        tl.store(tables + slot.to(tl.int64) * table_row + position // PAGE, block)


def unpack_rows(
    rows: Tensor,
    last_tokens: Tensor,
    tables: Tensor,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    kv_slots: Tensor,
    lengths: Tensor,
    table_rows: Tensor,
    page: int,
) -> None:
    """`rows` [batch, FIELDS] int32 to the tensors of one decode step; a negative slot is padding.

    A negative token stands for the newest in `last_tokens` [slots]; each row's newest block enters `tables`.
    """
    _unpack_kernel[(rows.shape[0],)](
        rows, last_tokens, tables, tables.stride(0), input_ids, position_ids, kv_slots, lengths, table_rows,
        FIELDS=FIELDS, PAGE=page, num_warps=1,
    )  # fmt: skip
