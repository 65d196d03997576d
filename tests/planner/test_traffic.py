"""Synthetic traffic has the rate, burstiness and lengths that were asked for."""

import numpy as np
import pytest
from splitserve.core.errors import ConfigError
from splitserve.planner.traffic import (
    SyntheticTraffic,
    fixed_lengths,
    lengths_by_percentile,
    mean_rate,
    parse_lengths,
    scale_rate,
    spread_lengths,
)

COUNT = 40_000


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_arrivals_have_the_rate_and_the_cv(cv: float) -> None:
    traffic = SyntheticTraffic(rate=8.0, isl=fixed_lengths(100), osl=fixed_lengths(10), arrival_cv=cv)
    gaps = np.diff([request.arrival_s for request in traffic.generate(COUNT)])
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.04)


@pytest.mark.parametrize(("mean", "cv"), [(4000, 0.3), (500, 1.0), (2000, 1.5)])
def test_spread_lengths_have_the_mean_and_the_cv(mean: float, cv: float) -> None:
    lengths = spread_lengths(mean, cv).sample(np.random.default_rng(0), 200_000)
    assert lengths.mean() == pytest.approx(mean, rel=0.02)
    assert lengths.std() / lengths.mean() == pytest.approx(cv, rel=0.05)


def test_lengths_by_percentile_hit_them() -> None:
    lengths = parse_lengths("p50=2000,p90=8000,p99=20000").sample(np.random.default_rng(0), COUNT)
    assert np.percentile(lengths, [50, 90, 99]) == pytest.approx([2000, 8000, 20000], rel=0.03)
    assert lengths.max() == 20000


def test_lengths_are_written_in_three_ways() -> None:
    assert set(parse_lengths("4000").sample(np.random.default_rng(0), 10)) == {4000}
    assert parse_lengths("4000:0.5") == spread_lengths(4000, 0.5)
    assert parse_lengths("p10=5, p90=9") == lengths_by_percentile({10: 5, 90: 9})
    assert fixed_lengths(300).mean == 300
    assert spread_lengths(300, 0.7).mean == pytest.approx(300)
    assert spread_lengths(300, 0.7).scaled(2).mean == pytest.approx(600)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "lengths are 'many'"),
        ("0", "at least 1"),
        ("-5", "at least 1"),
        ("4000:-1", "coefficient of variation of a length is -1"),
        ("p50=2000,p90=1000", "fall"),
        ("p150=2000", "p150 is no percentile"),
        ("50=2000", "lengths are"),
        ("nan", "at least 1"),
    ],
)
def test_bad_lengths_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_lengths(text)


@pytest.mark.parametrize(("rate", "cv", "message"), [(0.0, 1.0, "rate is 0"), (-3.0, 1.0, "rate"), (1.0, -0.1, "CV")])
def test_bad_traffic_is_named(rate: float, cv: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticTraffic(rate=rate, isl=fixed_lengths(1), osl=fixed_lengths(1), arrival_cv=cv)


def test_the_seed_decides_and_arrivals_do_not_depend_on_lengths() -> None:
    traffic = SyntheticTraffic(rate=2.0, isl=spread_lengths(1000, 1), osl=spread_lengths(100, 1))
    assert traffic.generate(50, seed=1) == traffic.generate(50, seed=1)
    assert traffic.generate(50, seed=1) != traffic.generate(50, seed=2)
    other = SyntheticTraffic(rate=2.0, isl=fixed_lengths(9), osl=fixed_lengths(9))
    assert [r.arrival_s for r in traffic.generate(50)] == [r.arrival_s for r in other.generate(50)]


def test_scaling_changes_the_rate_alone() -> None:
    requests = SyntheticTraffic(rate=2.0, isl=fixed_lengths(9), osl=fixed_lengths(9)).generate(1000)
    scaled = scale_rate(requests, 2.5)
    assert mean_rate(scaled) == pytest.approx(2.5 * mean_rate(requests))
    assert scaled[0].arrival_s == requests[0].arrival_s
    with pytest.raises(ConfigError, match="factor"):
        scale_rate(requests, 0.0)
