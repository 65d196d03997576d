"""What a run showed: the counts that must be 0, and how fast each class of fault was noticed and survived."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ...core.events import Event
from .followed import Followed
from .strike import Struck


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Each of the first five must be 0."""

    lost: int  # failed, although a pair of workers and a router lived all the time
    duplicated_tokens: int
    wrong_tokens: int
    orphaned_blocks: int
    hung: int
    requests: int
    answered: int
    aborted: int
    retried: int  # answered by another attempt than the first of their router
    faults: int
    corrupted: int  # frames of KV that were changed on their way
    seconds: float
    complaints: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return not (self.lost or self.duplicated_tokens or self.wrong_tokens or self.orphaned_blocks or self.hung)

    def table(self) -> Table:
        table = Table("lost", "duplicated tokens", "wrong tokens", "orphaned blocks", "hung", title="Must be 0")
        table.add_row(
            *map(str, (self.lost, self.duplicated_tokens, self.wrong_tokens, self.orphaned_blocks, self.hung))
        )
        return table


def judge(followed: Sequence[Followed], orphaned: dict[str, int], live: dict[str, int], **counts: Any) -> Verdict:
    """Args: orphaned: blocks of each worker that nobody gave back. live: requests that a router still thinks live."""
    by_outcome = defaultdict(list)
    for request in followed:
        by_outcome[request.outcome].append(request)
    complaints = [
        f"request {request.planned.number} ({request.request_id}, case {request.planned.case}): {request.outcome}, "
        f"{len(request.token_ids)} tokens; {request.error or 'wrong tokens'}"
        for request in followed
        if request.outcome in ("failed", "hung", "running") or request.num_wrong or request.num_duplicates
    ]
    complaints += [f"{name}: {count} blocks are neither free nor cached" for name, count in orphaned.items() if count]
    complaints += [f"{name}: {count} requests have no end" for name, count in live.items() if count]
    return Verdict(
        lost=len(by_outcome["failed"]),
        duplicated_tokens=sum(request.num_duplicates for request in followed),
        wrong_tokens=sum(request.num_wrong for request in followed),
        orphaned_blocks=sum(orphaned.values()),
        hung=len(by_outcome["hung"]) + len(by_outcome["running"]) + sum(live.values()),
        requests=len(followed),
        answered=len(by_outcome["answered"]),
        aborted=len(by_outcome["aborted"]),
        retried=sum(request.attempts > 1 for request in followed),
        complaints=tuple(complaints),
        **counts,
    )


@dataclass(slots=True)
class FaultTimes:
    """Seconds of one class of faults, one value a fault where there was something to measure."""

    num_faults: int = 0
    notice_s: list[float] = field(default_factory=list)  # until a router first gave up an attempt
    recover_s: list[float] = field(default_factory=list)  # longest silence that a client met meanwhile
    whole_s: list[float] = field(default_factory=list)  # from the healing until the target is used again


def fault_times(struck: Iterable[Struck], followed: Sequence[Followed], traces: Path) -> dict[str, FaultTimes]:
    """By class, in the order of the alphabet."""
    retries_s = _retries(traces)
    found: defaultdict[str, FaultTimes] = defaultdict(FaultTimes)
    for row in struck:
        times = found[row.fault.label]
        times.num_faults += 1
        noticed = [at_s for at_s in retries_s if row.struck_s < at_s < (row.healed_s or row.struck_s)]
        times.notice_s += [min(noticed) - row.struck_s] if noticed else []
        silences = [request.silence_s(row.struck_s, row.whole_s or row.struck_s) for request in followed]
        times.recover_s += [max(silences)] if any(silences) else []
        times.whole_s += [row.whole_s - row.healed_s] if row.whole_s and row.healed_s else []
    return dict(sorted(found.items()))


def _retries(traces: Path) -> list[float]:
    """When routers gave up an attempt: the host's monotonic clock is the same for all processes."""
    rows = (json.loads(line) for path in traces.glob("*.jsonl") for line in _whole_lines(path))
    return sorted(row["at_s"] for row in rows if row["type"] == "event" and row["event"] == Event.RESUMED.value)


def _whole_lines(path: Path) -> Iterable[str]:
    """A killed process may leave half a line."""
    return (line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n"))


def times_table(times: dict[str, FaultTimes]) -> Table:
    table = Table("fault", "n", "noticed p50", "max", "recovered p50", "max", "in use again p50", "max")
    for label, row in times.items():
        cells = [f"{f(v):.2f}" if v else "" for v in (row.notice_s, row.recover_s, row.whole_s) for f in (_p50, max)]
        table.add_row(label, str(row.num_faults), *cells)
    table.title = "Seconds"
    table.caption = "noticed: until a router gave up an attempt; recovered: longest silence that a client met meanwhile"
    return table


def times_figures(times: dict[str, FaultTimes]) -> dict[str, object]:
    return {label: asdict(row) for label, row in times.items()}


def _p50(values: Sequence[float]) -> float:
    return statistics.median(values)
