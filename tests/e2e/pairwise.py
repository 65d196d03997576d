"""Few combinations that hold every pair of values of any two parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any


def all_pairs(
    parameters: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Rows of values such that any two values of two parameters, unless `allowed` forbids them, meet in one of them."""
    names = list(parameters)
    missing = {
        (a, i, b, j)
        for a, b in combinations(names, 2)
        for i in range(len(parameters[a]))
        for j in range(len(parameters[b]))
        if allowed({a: parameters[a][i], b: parameters[b][j]})
    }
    rows: list[dict[str, Any]] = []
    while missing:
        first, i, second, j = min(missing)
        chosen = {first: i, second: j}
        for name in names:
            if name not in chosen:
                chosen[name] = max(
                    (k for k in range(len(parameters[name])) if allowed(_values(parameters, {**chosen, name: k}))),
                    key=lambda k, name=name: len(missing & _pairs({**chosen, name: k}, names)),
                )
        missing -= _pairs(chosen, names)
        rows.append(_values(parameters, chosen))
    return rows


def _values(parameters: Mapping[str, Sequence[Any]], chosen: Mapping[str, int]) -> dict[str, Any]:
    return {name: parameters[name][i] for name, i in chosen.items()}


def _pairs(chosen: Mapping[str, int], names: Sequence[str]) -> set[tuple[str, int, str, int]]:
    return {(a, chosen[a], b, chosen[b]) for a, b in combinations(names, 2) if a in chosen and b in chosen}
