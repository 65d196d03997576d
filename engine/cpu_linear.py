"""Faster matrix products on CPUs: weights packed once for oneDNN, and half precision where the CPU has none.

Measured on 2 cores of an AMD Zen 3 (AVX2, no bfloat16), 576 x 1,536, microseconds at 1 / 8 / 32 / 256 tokens:
float32 as PyTorch has it 315 / 461 / 727 / 2,880, packed 192 / 290 / 593 / 2,879; bfloat16 as PyTorch has it
122 / 840 / 2,917 / 23,983.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN compiles a product for each number of tokens that it meets, and PyTorch keeps 1,024 of them in each of two
# caches, 0.3 MiB apiece: with prompts of any length a worker grows by half a GiB, over 15,000 requests. So both caches
# are smaller, and few numbers of tokens are met: those up to 8, and eight from each power of two to the next, which
# pads by 4 % at the median. A step of up to 1,024 tokens has 47 forms, which fit (a layer and the head have about 5
# different products). What was not met yet costs 1 to 4 ms to compile, and memory where no room is left between others.
MAX_COMPILED_PRODUCTS = 256
_MULTIPLE = 8
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of PyTorch's layer above it


def bound_compiled_products() -> None:
    """Limit both caches of this process, unless its environment does; heeded before the first product only."""
    for name in _CACHES:
        os.environ.setdefault(name, str(MAX_COMPILED_PRODUCTS))


@cache
def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode()
def pack_linears(model: nn.Module) -> None:
    """Replace the forward pass of every plain linear layer by one over packed weights; the model's code stays as it is.

    float32 weights are replaced by their packed form, unless they are tied to an embedding. Half-precision weights stay
    for single tokens, where they are read faster; larger products use a packed float32 copy, which costs twice their
    memory and changes no weight. On a CPU with native bfloat16 such layers are left alone.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    bound_compiled_products()
    embeddings = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if type(module) is not nn.Linear or (module.weight.dtype == torch.bfloat16 and has_native_bfloat16()):
            continue
        packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.float())
        if module.weight.dtype == torch.float32:
            module.forward = _PackedLinear(packed, module.bias)  # type: ignore[method-assign, assignment]
            if module.weight.data_ptr() not in embeddings:
                module.weight = nn.Parameter(packed, requires_grad=False)
        else:
            module.forward = _WidenedLinear(  # type: ignore[method-assign, assignment]
                module.weight, packed, module.bias
            )


class _PackedLinear:
    """float32: one packed product for every number of tokens."""

    def __init__(self, packed: Tensor, bias: Tensor | None) -> None:
        self.packed = packed
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return _product(x, self.packed, self.bias)


class _WidenedLinear:
    """Half precision without hardware for it: single tokens as they are, more of them in float32."""

    def __init__(self, weight: Tensor, packed: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.packed = packed
        self.bias = bias
        self.wide_bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        return _product(x.float(), self.packed, self.wide_bias).to(x.dtype)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., width] float32 times packed weights, over a number of rows that was met before."""
    rows = x.numel() // x.shape[-1]
    padding = num_computed_rows(rows) - rows
    padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, padding)) if padding else x
    y: Tensor = torch.ops.mkldnn._linear_pointwise(padded, packed, bias, "none", [], "")
    return y[:rows].reshape(*x.shape[:-1], y.shape[-1]) if padding else y


def num_computed_rows(rows: int) -> int:
    """Of a product: a number that was probably met before."""
    if rows <= _MULTIPLE:
        return rows
    step = max(_MULTIPLE, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step
