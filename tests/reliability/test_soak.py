"""The soak program, with fewer requests, and its slope test."""

from __future__ import annotations

import subprocess
import sys

import pytest
from splitserve.benchmarks.soak import KIB_PER_1000, slope_per_1000


def test_a_leak_has_a_slope_and_a_warm_up_has_none() -> None:
    requests = list(range(0, 20_000, 200))
    warm = [min(100_000 + 20 * number, 160_000) for number in requests]
    leak = [kib + number for kib, number in zip(warm, requests, strict=True)]  # one KiB a request
    assert abs(slope_per_1000(requests, warm)) < KIB_PER_1000
    assert slope_per_1000(requests, leak) > 3 * KIB_PER_1000


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_memory_and_descriptors_stay_flat_and_every_block_comes_back() -> None:
    command = [sys.executable, "-m", "splitserve.benchmarks.soak", "--requests", "40000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
