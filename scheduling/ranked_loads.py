"""Loads of a pool's workers, kept in order while they change, so that a policy looks at the few that can be chosen.

To a policy they are plain sequences, in the order in which the workers came. `by_rank` is for those that know better.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar, overload

from .decode_cost import least_cost_s
from .routing import DecodeLoad, PrefillLoad

L = TypeVar("L", PrefillLoad, DecodeLoad)


class RankedLoads(Sequence[L], Generic[L]):
    """Those that take work now, by worker. Also counts when something got better, for whoever waits for that."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # of every worker that ever was: its place in the order
        self._loads: dict[str, L] = {}
        self._in_order: list[tuple[int, L]] = []
        self._by_rank: list[tuple[float, int, L]] = []
        self._improved: dict[str, int] = {}  # open worker -> number of its last improvement; the newest stands last
        self.num_improvements = 0

    @property
    def last_improvement(self) -> int:
        """Number of the newest one among the workers that are still open; 0: there is none."""
        return next(reversed(self._improved.values()), 0)

    @property
    def any_open(self) -> bool:
        return bool(self._improved)

    def get(self, worker: str) -> L | None:
        return self._loads.get(worker)

    def by_rank(self) -> Iterator[L]:
        """The lowest rank first; of equal ones, who came first."""
        return (load for *_, load in self._by_rank)

    def put_all(self, loads: Mapping[str, L]) -> None:
        """The loads of all workers that take work now."""
        for worker in [worker for worker in self._loads if worker not in loads]:
            self.put(worker, None)
        for worker, load in loads.items():
            self.put(worker, load)

    def put(self, worker: str, load: L | None) -> None:
        """What the worker's load is now; None: it takes no work."""
        old = self._loads.get(worker)
        if load is old or load == old:
            return
        self._replace(old, load)
        number = self._numbers.setdefault(worker, len(self._numbers))
        if old is not None:
            del self._by_rank[bisect_left(self._by_rank, (self._sound_rank(old), number))]
            place = bisect_left(self._in_order, (number,))
            if load is None:
                del self._in_order[place], self._loads[worker]
            else:
                self._in_order[place] = (number, load)
        elif load is not None:
            insort(self._in_order, (number, load))
        if load is not None:
            self._loads[worker] = load
            insort(self._by_rank, (self._sound_rank(load), number, load))
        if load is None or not self._is_open(load):
            self._improved.pop(worker, None)
        elif old is None or worker not in self._improved or self._is_better(load, old):
            self.num_improvements += 1
            self._improved.pop(worker, None)
            self._improved[worker] = self.num_improvements

    def _sound_rank(self, load: L) -> float:
        """What is not a number has no place in an order; figures beyond any sense may end in that."""
        rank = self._rank(load)
        return math.inf if math.isnan(rank) else rank

    @abstractmethod
    def _replace(self, old: L | None, load: L | None) -> None:
        """Count one load for another; None is none."""
        ...

    @abstractmethod
    def _rank(self, load: L) -> float: ...

    @abstractmethod
    def _is_open(self, load: L) -> bool: ...

    @abstractmethod
    def _is_better(self, load: L, old: L) -> bool:
        """Whether somebody who would not go there before might now."""
        ...

    def __len__(self) -> int:
        return len(self._in_order)

    def __iter__(self) -> Iterator[L]:
        return (load for _, load in self._in_order)

    @overload
    def __getitem__(self, index: int) -> L: ...
    @overload
    def __getitem__(self, index: slice) -> list[L]: ...
    def __getitem__(self, index: int | slice) -> L | list[L]:
        if isinstance(index, slice):
            return [load for _, load in self._in_order[index]]
        return self._in_order[index][1]


class PrefillLoads(RankedLoads[PrefillLoad]):
    """Ranked by the time until a prompt would start.

    Args: bound_s: of work that an open worker has at most.
    """

    def __init__(self, bound_s: float) -> None:
        super().__init__()
        self._bound_s = bound_s
        self._speeds: list[float] = []  # in order

    @property
    def fastest(self) -> float:
        """Prompt tokens a second of the fastest worker. Raises: IndexError: there is none."""
        return self._speeds[-1]

    def _replace(self, old: PrefillLoad | None, load: PrefillLoad | None) -> None:
        if old is not None:
            del self._speeds[bisect_left(self._speeds, old.speed)]
        if load is not None:
            insort(self._speeds, load.speed)

    def _rank(self, load: PrefillLoad) -> float:
        return load.wait_s

    def _is_open(self, load: PrefillLoad) -> bool:
        return load.is_open(self._bound_s)

    def _is_better(self, load: PrefillLoad, old: PrefillLoad) -> bool:
        return load.wait_s < old.wait_s


class DecodeLoads(RankedLoads[DecodeLoad]):
    """Ranked by what its step and its KV in use cost whoever comes next, at least."""

    def __init__(self) -> None:
        super().__init__()
        self.num_placed = 0  # of whom is known where they stand

    def _replace(self, old: DecodeLoad | None, load: DecodeLoad | None) -> None:
        self.num_placed += (load is not None and load.place is not None) - (old is not None and old.place is not None)

    def _rank(self, load: DecodeLoad) -> float:
        return least_cost_s(load)

    def _is_open(self, load: DecodeLoad) -> bool:
        return True

    def _is_better(self, load: DecodeLoad, old: DecodeLoad) -> bool:
        return load.num_sequences < old.num_sequences or load.available_blocks > old.available_blocks
