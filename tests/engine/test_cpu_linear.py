"""Packed linear layers on a CPU: the same products for every number of tokens, and memory that stays."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from splitserve.engine.cpu_linear import MAX_COMPILED_PRODUCTS, num_computed_rows, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")

# Resident KiB after products of 16 numbers of tokens, and after 29 more that were never met.
_GROWTH = """
import random, torch
from splitserve.engine.cpu_linear import pack_linears

torch.set_num_threads(1)
layers = torch.nn.ModuleList(torch.nn.Linear(64, width) for width in range(16, 336, 16))
pack_linears(layers)

def resident_kib():
    return int(next(row for row in open("/proc/self/status") if row.startswith("VmRSS")).split()[1])

with torch.inference_mode():
    for tokens in range(8, 1608, 8):
        for layer in layers:
            layer(torch.ones(1, tokens, 64))
        if tokens in (128, 1600):
            print(resident_kib())
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 24, 31, 100, 130])
@torch.inference_mode()
def test_every_number_of_tokens_has_the_products_of_the_plain_layer(num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_tokens)
    layer = torch.nn.Linear(48, 40).to(dtype)
    x = torch.randn(2, num_tokens, 48, dtype=dtype)
    expected = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    pack_linears(torch.nn.Sequential(layer))
    got = layer(x)
    assert got.shape == expected.shape
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3)


def test_compiled_products_are_bounded() -> None:
    run = subprocess.run([sys.executable, "-c", _GROWTH], capture_output=True, text=True, timeout=240, check=True)
    early, late = map(int, run.stdout.split())
    # 320 products, then 580 more: unbounded, these take 0.3 MiB each.
    assert late - early < 100 * 1024, f"grew from {early:,} to {late:,} KiB"


def test_steps_of_any_size_share_products_that_the_caches_hold() -> None:
    computed = [num_computed_rows(rows) for rows in range(1, 1025)]
    assert all(rows <= padded for rows, padded in enumerate(computed, start=1))
    assert all(padded <= rows * 9 / 8 for rows, padded in enumerate(computed, start=1) if rows >= 64)
    assert 5 * len(set(computed)) <= MAX_COMPILED_PRODUCTS
