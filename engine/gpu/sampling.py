"""Choose the next token of each row on the device, with the semantics of ..sampler: one kernel for a mixed batch.

One program per row, so that a choice never depends on the batch. Thresholds of top-k and top-p are found by bisection
over the bits of the weights, which are positive floats and therefore ordered like integers: no sort, no loss.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192  # vocabulary entries of one iteration


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _noise(token_ids, first_key, second_key):
    """`..sampler.noise` in fp32, as precise for the smallest values as for the largest."""
    bits = _mix(_mix(token_ids.to(tl.uint32) * 0x9E3779B1 + first_key) ^ second_key)
    # -log(1 - u): below one half by the series of 2 atanh(u / (2 - u)), since 1 - u would round the smallest away;
    # above it 1 - u is small, and made from the bits directly.
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2 ** -32
    s = u / (2.0 - u)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.where(bits < 0x80000000, 2.0 * s * series, -tl.log(rest))


@triton.jit
def _sample_kernel(
    logits, parameters, slots, last_tokens, chosen,
    logits_row, vocab, parameters_row, slots_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * logits_row
    at = tl.arange(0, BLOCK)
    best = float("-inf")
    best_at = 0
    num_broken = 0
    for start in range(0, vocab, BLOCK):
        x = tl.load(values + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32)
        num_broken += tl.sum((x != x).to(tl.int32), 0)
        highest = tl.max(x, 0)
        if highest > best:  # the first of equals, as torch.argmax on the host
            best_at = start + tl.argmax(x, 0, tie_break_left=True)
            best = highest
    own = parameters + row * parameters_row  # top_k, temperature, top_p, min_p, two keys
    temperature = tl.load(own + 1).to(tl.float32, bitcast=True)
    if temperature > 0:
        top_k = tl.load(own)
        top_p = tl.load(own + 2).to(tl.float32, bitcast=True)
        min_p = tl.load(own + 3).to(tl.float32, bitcast=True)
        scale = 1.4426950408889634 / temperature
        threshold = 0  # bits of the least weight that is kept
        if (top_k > 0) & (top_k < vocab):
            low = 0
            high = 0x3F800001  # just over 1.0
            while high - low > 1:
                middle = (low + high) // 2
                count = 0
                for start in range(0, vocab, BLOCK):
                    x = tl.load(values + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32)
                    bits = tl.exp2((x - best) * scale).to(tl.int32, bitcast=True)
                    count += tl.sum((bits >= middle).to(tl.int32), 0)
                if count >= top_k:
                    low = middle
                else:
                    high = middle
            threshold = low
        if top_p < 1.0:
            mass = 0.0
            for start in range(0, vocab, BLOCK):
                x = tl.load(values + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32)
                weight = tl.exp2((x - best) * scale)
                mass += tl.sum(tl.where(weight.to(tl.int32, bitcast=True) >= threshold, weight, 0.0), 0)
            low = threshold
            high = 0x3F800001
            while high - low > 1:
                middle = (low + high) // 2
                kept = 0.0
                for start in range(0, vocab, BLOCK):
                    x = tl.load(values + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32)
                    weight = tl.exp2((x - best) * scale)
                    kept += tl.sum(tl.where(weight.to(tl.int32, bitcast=True) >= middle, weight, 0.0), 0)
                if kept >= top_p * mass:
                    low = middle
                else:
                    high = middle
            threshold = low
        first_key = tl.load(own + 4).to(tl.uint32, bitcast=True)
        second_key = tl.load(own + 5).to(tl.uint32, bitcast=True)
        fastest = float("-inf")  # one over the arrival of the race's winner so far
        for start in range(0, vocab, BLOCK):
            x = tl.load(values + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32)
            weight = tl.exp2((x - best) * scale)
            keep = (weight.to(tl.int32, bitcast=True) >= threshold) & (weight >= min_p) & (weight > 0)
            speed = tl.where(keep, weight / _noise(start + at, first_key, second_key), float("-inf"))
            highest = tl.max(speed, 0)
            if highest > fastest:
                best_at = start + tl.argmax(speed, 0, tie_break_left=True)
                fastest = highest
    sound = (num_broken == 0) & (best > float("-inf")) & (best < float("inf"))
    tl.store(chosen + row, tl.where(sound, best_at, -1).to(tl.int64))
    slot = tl.load(slots + row * slots_row)
    if slot >= 0:
        tl.store(last_tokens + slot, best_at.to(tl.int64))


def sample_rows(logits: Tensor, parameters: Tensor, slots: Tensor, *, last_tokens: Tensor, chosen: Tensor) -> None:
    """Write the chosen token of each row of `logits` [rows, vocab] to `chosen` [rows] int64.

    -1 where the logits say nothing, as None of `..sampler.sample`; `last_tokens` then gets some token, so that a step
    that follows has one to compute.

    Args:
        parameters: [rows, 6] int32: top_k, the bits of fp32 temperature (0: greedy), top_p, min_p, the two keys of the
            noise.
        slots: [rows] int32; the token is also written to `last_tokens` there, unless negative.
    """
    assert logits.stride(1) == parameters.stride(1) == 1, "the last dimension is contiguous"
    _sample_kernel[(logits.shape[0],)](
        logits, parameters, slots, last_tokens, chosen,
        logits.stride(0), logits.shape[1], parameters.stride(0), slots.stride(0),
        BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
