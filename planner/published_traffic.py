"""Traffic with the statistics of two published traces, for those who do not have the files."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from .trace_statistics import STATISTICS
from .traffic import Lengths
from .types import SimRequest

_NEIGHBOURS = 128  # earlier requests of about the wanted age among which the continued one is chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStatistics:
    """What `scripts/measure_traces.py` found in a trace. `*_at` are values at `percents`."""

    rate: float  # requests per second
    profile: tuple[float, ...]  # of each of the trace's equal parts, relative to that
    part_s: float
    percents: tuple[float, ...]
    isl_new_at: tuple[float, ...]  # prompts that continue no earlier one
    isl_continued_at: tuple[float, ...]
    osl_at: tuple[float, ...]
    continued: float  # share of prompts that begin with more of an earlier one than everybody's first block
    shared_at: tuple[float, ...]  # of a continued prompt, the share that it has in common with the earlier one
    age_s_at: tuple[float, ...]  # time since that one
    block_tokens: int  # of a hash id; 0: the trace has none


def published_traffic(name: str, num_requests: int | None = None, *, seed: int = 0) -> list[SimRequest]:
    """Requests like those of "mooncake" (conversations, shared prefixes) or "azure" (short prompts, none shared).

    Arrivals, prompt and answer lengths, and how much of a prompt an earlier one had, follow the trace's statistics;
    None takes as many requests as an hour of it has. Raises: ConfigError: there is no such trace.
    """
    if name not in STATISTICS:
        raise ConfigError(f"there are no statistics of a trace {name!r}; known: {', '.join(STATISTICS)}")
    statistics = TraceStatistics(**STATISTICS[name])
    if num_requests is None:
        num_requests = round(statistics.rate * statistics.part_s * len(statistics.profile))
    rng = np.random.default_rng(seed)
    arrivals = _arrivals(statistics, num_requests, rng)
    continued = rng.uniform(size=num_requests) < statistics.continued
    isl = np.where(
        continued,
        _lengths(statistics, statistics.isl_continued_at).sample(rng, num_requests),
        _lengths(statistics, statistics.isl_new_at).sample(rng, num_requests),
    )
    osl = _lengths(statistics, statistics.osl_at).sample(rng, num_requests)
    hash_ids = _hash_ids(statistics, arrivals, isl, continued, rng)
    return [
        SimRequest(
            arrival_s=float(arrivals[index]),
            isl=int(isl[index]),
            osl=int(osl[index]),
            hash_ids=hash_ids[index],
            hash_block_tokens=statistics.block_tokens or 16,
        )
        for index in range(num_requests)
    ]


def _lengths(statistics: TraceStatistics, tokens: tuple[float, ...]) -> Lengths:
    return Lengths(percents=statistics.percents, tokens=tokens)


def _arrivals(statistics: TraceStatistics, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Poisson at the profile's rate; after its end it begins again."""
    expected = np.cumsum(rng.exponential(size=count))  # in requests
    per_part = np.array(statistics.profile) * statistics.rate * statistics.part_s
    rounds = int(expected[-1] // per_part.sum()) + 1
    ends = np.concatenate(([0.0], np.cumsum(np.tile(per_part, rounds))))
    arrivals: NDArray[np.float64] = np.interp(expected, ends, np.arange(len(ends)) * statistics.part_s)
    return arrivals


def _hash_ids(
    statistics: TraceStatistics,
    arrivals: NDArray[np.float64],
    isl: NDArray[np.int64],
    continued: NDArray[np.bool_],
    rng: np.random.Generator,
) -> list[tuple[int, ...]]:
    """Block ids: everybody begins with block 0; a continued prompt takes over the beginning of an earlier one."""
    size = statistics.block_tokens
    if not size:
        return [()] * len(isl)
    shared = np.interp(rng.uniform(0, 100, len(isl)), statistics.percents, statistics.shared_at)
    ages = np.interp(rng.uniform(0, 100, len(isl)), statistics.percents, statistics.age_s_at)
    times = arrivals.tolist()
    prompts: list[tuple[int, ...]] = []
    next_id = 1
    for index in range(len(isl)):
        num_blocks = -(-int(isl[index]) // size)
        head: tuple[int, ...] = (0,)
        if continued[index] and index:
            wanted = max(1, round(float(shared[index]) * num_blocks))
            middle = bisect_left(times, times[index] - float(ages[index]), 0, index)
            around = prompts[max(0, middle - _NEIGHBOURS // 2) : middle + _NEIGHBOURS // 2]
            # The shortest that is long enough, or else the longest: a turn goes on where the last one ended.
            earlier = min(around, key=lambda blocks: (len(blocks) < wanted, abs(len(blocks) - wanted)), default=head)
            head = earlier[: min(wanted, num_blocks)]
        num_new = num_blocks - len(head)
        prompts.append(head[:num_blocks] + tuple(range(next_id, next_id + num_new)))
        next_id += max(0, num_new)
    return prompts
