"""A position-keyed 64-bit checksum of KV blocks, computed where they are: one read at memory speed, no copy."""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # words at a time
_TILES = 4  # per program, so that few programs meet at the one counter
_MASK = 2**64 - 1


@triton.jit
def _checksum_kernel(
    rows, block_ids, out, row_words, first_word, num_words, TILE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(block_ids + index).to(tl.int64) * row_words + first_word
    total = tl.zeros([TILE], tl.uint64)
    for tile in range(TILES):
        word = (tl.program_id(1) * TILES + tile) * TILE + tl.arange(0, TILE)
        inside = word < num_words
        value = tl.load(row + word, mask=inside, other=0).to(tl.uint64, bitcast=True)
        # An odd key per position: a changed bit, and words or blocks in another order, change the sum.
        key = (index * num_words + word).to(tl.uint64) * 0x9E3779B97F4A7C15
        key = ((key ^ (key >> 32)) * 0xD6E8FEB86659FD93) | 1
        total += value * key
    tl.atomic_add(out, tl.sum(total, 0).to(tl.int64, bitcast=True))


class _Totals(threading.local):
    """Of the calling thread: a counter on each device that all its checksums are added to, and its value."""

    def __init__(self) -> None:
        self.of_device: dict[torch.device, tuple[Tensor, int]] = {}


_totals = _Totals()


def device_checksum(rows: Tensor, block_ids: Tensor, first_byte: int, num_bytes: int) -> int:
    """Checksum of bytes [first_byte, first_byte + num_bytes) of each of the blocks, in order.

    Waits for it, behind whatever the current stream has to do. It is what a counter grows by: a fresh one each time
    would be one more kernel and one more turn of the interpreter, just where a token waits.

    Args: rows: [num_blocks, row_bytes] uint8 on a GPU. block_ids: [n] int32 there.
    """
    words = rows.view(torch.int64)
    assert first_byte % 8 == num_bytes % 8 == 0, "a part of a row that is not whole words"
    known = _totals.of_device.pop(rows.device, None)  # gone, if this fails
    total, before = known or (torch.zeros(1, dtype=torch.int64, device=rows.device), 0)
    num_words = num_bytes // 8
    grid = (block_ids.shape[0], triton.cdiv(num_words, _TILE * _TILES))
    _checksum_kernel[grid](
        words, block_ids, total, words.stride(0), first_byte // 8, num_words, TILE=_TILE, TILES=_TILES, num_warps=4
    )
    after = int(total.item()) & _MASK
    _totals.of_device[rows.device] = total, after
    return (after - before) & _MASK
