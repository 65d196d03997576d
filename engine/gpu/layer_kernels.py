"""What a transformer layer computes between its matrix products, each in one Triton kernel instead of five to ten."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, output, total, x_row, size, epsilon,
    BLOCK: tl.constexpr, ONE_PLUS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < size
    values = tl.load(x + row * x_row + at, mask=mask, other=0.0)
    if RESIDUAL:
        values = values + tl.load(residual + row * size + at, mask=mask, other=0.0)
        tl.store(total + row * size + at, values, mask=mask)
    dtype = values.dtype
    values = values.to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / size + epsilon)
    scale = tl.load(weight + at, mask=mask, other=0.0)
    if ONE_PLUS:
        values = values * (1.0 + scale.to(tl.float32))
    else:
        values = values.to(dtype).to(tl.float32) * scale.to(tl.float32)
    tl.store(output + row * size + at, values.to(output.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, one_plus: bool) -> Tensor:
    """Root-mean-square norm over the last dimension, times `weight` or (Gemma) one plus it; the shape of `x`."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(rows.shape[0],)](
        rows, rows, weight, output, output, rows.stride(0), size, epsilon,
        BLOCK=block, ONE_PLUS=one_plus, RESIDUAL=False, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return output


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, one_plus: bool
) -> tuple[Tensor, Tensor]:
    """`x + residual` and its norm in one pass, each of the shape of `x`; `residual` is contiguous."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    output, total = torch.empty_like(residual), torch.empty_like(residual)
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(rows.shape[0],)](
        rows, residual, weight, output, total, rows.stride(0), size, epsilon,
        BLOCK=block, ONE_PLUS=one_plus, RESIDUAL=True, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return total, output


@triton.jit
def _rotary_kernel(
    x, cos, sin, output, x_head, x_token, cos_token, output_head, output_token,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < HEADS) & (dim < HALF)
    low = tl.load(x + token * x_token + head * x_head + dim, mask=mask).to(tl.float32)
    high = tl.load(x + token * x_token + head * x_head + HALF + dim, mask=mask).to(tl.float32)
    cos_low = tl.load(cos + token * cos_token + dim, mask=dim < HALF).to(tl.float32)
    cos_high = tl.load(cos + token * cos_token + HALF + dim, mask=dim < HALF).to(tl.float32)
    sin_low = tl.load(sin + token * cos_token + dim, mask=dim < HALF).to(tl.float32)
    sin_high = tl.load(sin + token * cos_token + HALF + dim, mask=dim < HALF).to(tl.float32)
    at = output + token * output_token + head * output_head + dim
    tl.store(at, (low * cos_low - high * sin_low).to(output.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (high * cos_high + low * sin_high).to(output.dtype.element_ty), mask=mask)
    for start in tl.static_range(2 * HALF, DIM, BLOCK_D):  # a partial rotary embedding leaves the rest as it is
        rest = start + dim
        mask = (head < HEADS) & (rest < DIM)
        kept = tl.load(x + token * x_token + head * x_head + rest, mask=mask)
        tl.store(output + token * output_token + head * output_head + rest, kept, mask=mask)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the half-split kind: `x` [1, heads, tokens, dim], `cos` and `sin` [1, tokens, <= dim].

    Returns the shape of `x`, laid out token-major.
    """
    _, heads, tokens, dim = x.shape
    output = torch.empty(1, tokens, heads, dim, dtype=x.dtype, device=x.device).transpose(1, 2)
    half = cos.shape[-1] // 2
    block_h = min(triton.next_power_of_2(heads), 16)
    _rotary_kernel[(tokens, triton.cdiv(heads, block_h))](
        x, cos, sin, output, x.stride(1), x.stride(2), cos.stride(1), output.stride(1), output.stride(2),
        HEADS=heads, BLOCK_H=block_h, DIM=dim, HALF=half, BLOCK_D=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip
    return output


@triton.jit
def _silu_multiply_kernel(gate, up, output, gate_row, up_row, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(gate + row * gate_row + at, mask=mask).to(tl.float32)
    y = tl.load(up + row * up_row + at, mask=mask)
    activated = (x * tl.sigmoid(x)).to(y.dtype)
    tl.store(output + row * size + at, activated * y, mask=mask)


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., size]."""
    size = gate.shape[-1]
    gates, ups = gate.reshape(-1, size), up.reshape(-1, size)
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = min(4096, triton.next_power_of_2(size))
    _silu_multiply_kernel[(gates.shape[0], triton.cdiv(size, block))](
        gates, ups, output, gates.stride(0), ups.stride(0), size, BLOCK=block, num_warps=8
    )
    return output
