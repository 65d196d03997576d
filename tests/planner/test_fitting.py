"""The least squares that coefficients and calibrations come from."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve.planner.fitting import bootstrap, fit_relative, folds, held_out_errors, nnls


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_nnls_meets_the_optimality_conditions(seed: int, num_columns: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(20, num_columns)) * 10 ** rng.uniform(-6, 6, num_columns)
    target = rng.normal(size=20)
    x = nnls(matrix, target)
    scale = np.linalg.norm(matrix, axis=0)
    gradient = matrix.T @ (target - matrix @ x) / scale
    assert (x >= 0).all()
    assert (gradient <= 1e-8).all()  # growing a coefficient cannot help
    assert np.abs(gradient[x > 0]).max(initial=0) <= 1e-8  # nor changing one that is free


def test_relative_fit_finds_the_coefficients_despite_outliers() -> None:
    rng = np.random.default_rng(1)
    matrix = np.stack([np.ones(200), rng.uniform(1, 1000, 200)], axis=1)
    target = matrix @ [2.0, 0.05] * rng.normal(1, 0.01, 200)
    target[:10] *= 30
    assert np.allclose(fit_relative(matrix, target), [2.0, 0.05], rtol=0.03)


def test_no_coefficient_falls_below_its_floor() -> None:
    matrix = np.stack([np.ones(50), np.arange(1.0, 51)], axis=1)
    target = matrix @ [1.0, 0.1]
    x = fit_relative(matrix, target, np.array([0.0, 0.2]))
    assert x[1] >= 0.2


def test_bootstrap_interval_holds_the_truth_and_narrows_with_data() -> None:
    rng = np.random.default_rng(3)
    widths = []
    for count in (30, 3000):
        matrix = np.stack([np.ones(count), rng.uniform(1, 100, count)], axis=1)
        low, high = bootstrap(matrix, matrix @ [1.0, 0.3] * rng.normal(1, 0.05, count))
        assert low[1] * 0.99 <= 0.3 <= high[1] * 1.01
        widths.append(high[1] - low[1])
    assert widths[1] < widths[0] / 4


def test_held_out_errors_are_of_fits_that_did_not_see_the_group() -> None:
    matrix = np.ones((20, 1))
    target = np.concatenate([np.full(10, 1.0), np.full(10, 2.0)])
    errors = held_out_errors(matrix, target, np.repeat([0, 1], 10))
    assert np.allclose(errors[:10], 1.0)  # predicted by the twos alone
    assert np.allclose(errors[10:], -0.5)
    assert set(np.bincount(folds(23, 5, 0))) == {4, 5}
