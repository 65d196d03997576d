"""Traffic as `splitserve plan` and `splitserve simulate` are told it: lengths and a rate, or a trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from ..planner.api import DEFAULT_REQUESTS, synthetic_requests
from ..planner.published_traffic import published_traffic
from ..planner.trace_statistics import STATISTICS
from ..planner.traces import read_trace
from ..planner.traffic import mean_rate, scale_rate
from ..planner.types import SimRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests, and how `bench` sends the same."""

    requests: list[SimRequest]
    notes: tuple[str, ...] = ()  # what was done to them, for the reader
    bench_flags: tuple[str, ...] = ()  # empty: rate and mean lengths
    recorded_rate: float | None = None  # requests a second of the trace file, before it was sped up or slowed down


def read_traffic(
    trace: str | None,
    isl: str | None,
    osl: str | None,
    rate: float | None,
    arrival_cv: float,
    num_requests: int | None,
    seed: int,
) -> Traffic:
    """Raises: ConfigError: flags are missing or contradict each other, or the trace is wrong."""
    if trace is None:
        if isl is None or osl is None or rate is None:
            raise ConfigError("traffic is missing: give --isl, --osl and --rate, or --trace")
        made = synthetic_requests(
            isl=isl,
            osl=osl,
            rate=rate,
            arrival_cv=arrival_cv,
            num_requests=num_requests or DEFAULT_REQUESTS,
            seed=seed,
        )
        return Traffic(requests=made)
    if isl is not None or osl is not None:
        raise ConfigError("--trace and --isl or --osl both say how long requests are; choose one")
    notes: tuple[str, ...] = ()
    flags: list[str] = []
    if trace in STATISTICS and not Path(trace).exists():
        requests = published_traffic(trace, num_requests, seed=seed)
        notes = (f"the traffic follows the statistics of the {trace} trace; it is not the trace",)
    else:
        read = read_trace(Path(trace), seed=seed, limit=num_requests)
        requests, notes = list(read.requests), read.notes
        flags = ["--trace", trace]
        if num_requests is not None:
            flags += ["--num-requests", f"{num_requests}"]
        if seed:
            flags += ["--seed", f"{seed}"]
    recorded_rate = mean_rate(requests)
    if rate is not None:
        requests = scale_rate(requests, rate / recorded_rate)
    return Traffic(
        requests=requests, notes=notes, bench_flags=tuple(flags), recorded_rate=recorded_rate if flags else None
    )
