"""Overlaid tenants: rate, pace and prefixes of the trace are kept, and load switches tenants on and off."""

from __future__ import annotations

from itertools import pairwise

import pytest
from splitserve.core.errors import ConfigError
from splitserve.planner.overlaid_traffic import overlay
from splitserve.planner.types import SimRequest

TRACE = [
    SimRequest(arrival_s=float(n), isl=100 + n, osl=10, hash_ids=(0, n // 2), hash_block_tokens=64) for n in range(60)
]


def test_each_tenant_adds_the_traces_rate() -> None:
    requests = overlay(TRACE, num_tenants=20, duration_s=300.0, seed=1)
    assert len(requests) == pytest.approx(20 * 300, rel=0.02)
    assert [r.arrival_s for r in requests] == sorted(r.arrival_s for r in requests)
    assert requests == overlay(TRACE, num_tenants=20, duration_s=300.0, seed=1)
    assert requests != overlay(TRACE, num_tenants=20, duration_s=300.0, seed=2)


def test_a_tenant_keeps_its_pace_and_its_prefixes_and_shares_none() -> None:
    requests = overlay(TRACE, num_tenants=2, duration_s=30.0)
    tenants: dict[int, list[SimRequest]] = {}
    for request in requests:
        tenants.setdefault(request.hash_ids[0] >> 42, []).append(request)
    assert len(tenants) == 2
    for own in tenants.values():
        assert {round(b.arrival_s - a.arrival_s, 6) for a, b in pairwise(own)} == {1.0}
        by_turn = [request.hash_ids[1] for request in own]
        assert any(a == b for a, b in pairwise(by_turn))


def test_the_rate_follows_the_load() -> None:
    requests = overlay(TRACE, num_tenants=10, duration_s=200.0, load=lambda at_s: 0.2 if at_s < 100 else 0.9)
    first = sum(request.arrival_s < 100 for request in requests)
    assert first == pytest.approx(200, rel=0.05)
    assert len(requests) - first == pytest.approx(900, rel=0.05)


def test_nothing_to_overlay_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlay of 0 tenants"):
        overlay(TRACE, num_tenants=0, duration_s=1.0)
