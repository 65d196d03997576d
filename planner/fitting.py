"""Non-negative least squares on relative error, with a bootstrap interval: numpy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ROUNDS = 20  # of reweighting
_SMALL_ERROR = 0.03  # below this an error counts squared, above it by its size


def nnls(matrix: Array, target: Array) -> Array:
    """x >= 0 that minimises |matrix x - target|, by Lawson and Hanson's active set.

    Args: matrix: [num_rows, num_columns]; columns may be of any scale, all-zero ones get 0.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    num_columns = matrix.shape[1]
    x = np.zeros(num_columns)
    free = np.zeros(num_columns, dtype=bool)
    gradient = scaled.T @ target
    tolerance = 1e-10 * max(1e-300, float(np.abs(gradient).max(initial=0.0)))
    for _ in range(10 * num_columns):
        if free.all() or gradient[~free].max() <= tolerance:
            break
        free[np.argmax(np.where(free, -np.inf, gradient))] = True
        while free.any():
            trial = np.zeros(num_columns)
            trial[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            if trial[free].min() > 0:
                x = trial
                break
            negative = free & (trial <= 0)
            step = np.min(x[negative] / np.maximum(x[negative] - trial[negative], 1e-300))
            x = x + step * (trial - x)
            free &= x > 1e-14
            x[~free] = 0.0
        gradient = scaled.T @ (target - scaled @ x)
    return np.asarray(x / scale)


def fit_relative(matrix: Array, target: Array, floor: Array | None = None, *, robust: bool = True) -> Array:
    """Coefficients, each at least its floor, that minimise the mean relative error of `matrix @ x` against `target`.

    Reweighted least squares: an outlier counts by its size, not by its square. `robust` False leaves that out.
    """
    floor = np.zeros(matrix.shape[1]) if floor is None else floor
    relative = matrix / target[:, None]
    missing = 1 - relative @ floor  # what the excess over the floor has to explain
    weights = np.ones(len(target))
    x = floor
    for _ in range(_ROUNDS if robust else 1):
        x = floor + nnls(relative * weights[:, None], missing * weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative @ x - 1), _SMALL_ERROR))
    return np.asarray(x)


def relative_errors(matrix: Array, target: Array, x: Array) -> Array:
    """Signed: 0.1 is 10 % too high."""
    return np.asarray(matrix @ x / target - 1)


def bootstrap(
    matrix: Array, target: Array, floor: Array | None = None, *, rounds: int = 50, seed: int = 0
) -> tuple[Array, Array]:
    """5th and 95th percentile of each coefficient over fits of rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    fits = []
    for _ in range(rounds):
        rows = rng.integers(0, len(target), len(target))
        fits.append(fit_relative(matrix[rows], target[rows], floor))
    low, high = np.percentile(np.array(fits), [5, 95], axis=0)
    return low, high


def folds(num_rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` random folds of equal size each row is in."""
    return np.random.default_rng(seed).permutation(num_rows) % count


def held_out_errors(
    matrix: Array, target: Array, groups: NDArray[np.int64], floor: Array | None = None, *, robust: bool = True
) -> Array:
    """Relative error of every row under a fit that did not see its group."""
    errors = np.zeros(len(target))
    for group in np.unique(groups):
        held = groups == group
        x = fit_relative(matrix[~held], target[~held], floor, robust=robust)
        errors[held] = relative_errors(matrix[held], target[held], x)
    return errors
