"""What a chaos run does, as a pure function of its seed: which requests arrive when, and which faults strike when."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

NUM_CASES = 48
PREFILLS, DECODES, ROUTERS = ("prefill-0", "prefill-1"), ("decode-0", "decode-1"), ("router-0", "router-1")
POOLS: Mapping[str, Sequence[str]] = {"prefill": PREFILLS, "decode": DECODES, "router": ROUTERS}


class FaultKind(StrEnum):
    """The classes that the report has a row for."""

    KILL = "kill"  # SIGKILL, then a new process
    HANG = "hang"  # SIGSTOP, later SIGCONT
    SLOW = "slow"  # stopped 99 % of the time
    DRAIN = "drain"  # no new work, end when idle, then a new process
    PARTITION = "partition"  # the link passes nothing and ends nothing
    CUT = "cut"  # the link's connections are reset, for a while new ones too
    DELAY = "delay"  # the link takes 50 ms for every piece
    CORRUPT = "corrupt"  # bytes of KV frames are changed


PROCESS_KINDS = (FaultKind.KILL, FaultKind.HANG, FaultKind.SLOW)  # of any process
WORKER_KINDS = (*PROCESS_KINDS, FaultKind.DRAIN)
SESSION_KINDS = (FaultKind.PARTITION, FaultKind.CUT, FaultKind.DELAY)  # router to worker
KV_KINDS = (*SESSION_KINDS, FaultKind.CORRUPT)  # decode worker to prefill worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. It waits until `at_s` and until the pool of its target is whole again, so that a pair always lives."""

    number: int
    at_s: float
    kind: FaultKind
    target: str  # a process
    link: str = ""  # "session" or "kv": of the target's links, not of the target itself
    routers: tuple[str, ...] = ROUTERS  # whose sessions with it
    duration_s: float = 0.0  # until it is healed; a killed process stays away so long
    same_address: bool = True  # where the next process is found

    @property
    def pool(self) -> str:
        """One fault at a time in each."""
        return self.target.partition("-")[0]

    @property
    def label(self) -> str:
        """Its row in the report."""
        return f"{self.kind} {self.pool}" if not self.link else f"{self.kind} {self.pool} {self.link} link"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt with options, whose answer is known."""

    prompt: tuple[int, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request: what is asked, when, and whether its client goes away."""

    number: int
    at_s: float
    case: int
    abort_after: int | None = None  # chunks that the client reads before it leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """A run. Equal seeds and sizes make equal plans."""

    seed: int
    rate: float  # requests a second, Poisson
    aborts: float  # share of requests whose client goes away
    cases: tuple[Case, ...]
    faults: tuple[Fault, ...]

    def requests(self) -> Iterator[PlannedRequest]:
        """Without end: a run takes what it needs."""
        rng = random.Random(f"{self.seed}/requests")
        at_s = 0.0
        for number in itertools.count():
            at_s += rng.expovariate(self.rate)
            abort_after = rng.choice((0, 1, 2, 5, 20)) if rng.random() < self.aborts else None
            yield PlannedRequest(number=number, at_s=at_s, case=rng.randrange(NUM_CASES), abort_after=abort_after)


def make_plan(*, seed: int, seconds: float, rate: float, num_faults: int, aborts: float) -> ChaosPlan:
    """Args: seconds: over which the faults are spread."""
    rng = random.Random(f"{seed}/cases")
    cases = tuple(_case(rng, number) for number in range(NUM_CASES))
    faults = _faults(random.Random(f"{seed}/faults"), num_faults, seconds)
    return ChaosPlan(seed=seed, rate=rate, aborts=aborts, cases=cases, faults=faults)


def _case(rng: random.Random, number: int) -> Case:
    """Long enough that every fault finds requests in each phase; the short ones end with their first token."""
    prompt = tuple(rng.randrange(256) for _ in range(rng.choice((3, 20, 100, 300, 600))))
    options: dict[str, Any] = {"max_tokens": rng.choice((1, 12, 100, 300, 500)), "seed": rng.randrange(1 << 32)}
    match number % 6:
        case 0:  # greedy, ending by itself
            pass
        case 1:
            options |= {"regex": "[a-f0-9]{30,60}", "temperature": 1.0}
        case 2:
            options |= {"stop": ["e", "th"], "temperature": 1.0, "ignore_eos": True}
        case 3:
            options |= {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "ignore_eos": True}
        case _:
            options |= {"temperature": 1.0, "ignore_eos": True}
    return Case(prompt=prompt, options=options)


def _faults(rng: random.Random, count: int, end_s: float) -> tuple[Fault, ...]:
    """Every class in turn before any comes again, evenly over the run's time with some jitter."""
    kinds: Iterator[tuple[FaultKind, str, str]] = iter(())
    faults = []
    for number in range(count):
        chosen = next(kinds, None)
        if chosen is None:
            kinds = iter(rng.sample(_CLASSES, len(_CLASSES)))
            chosen = next(kinds)
        kind, pool, link = chosen
        faults.append(
            Fault(
                number=number,
                at_s=end_s * (number + rng.uniform(0.2, 0.8)) / (count + 1),
                kind=kind,
                target=rng.choice(POOLS[pool]),
                link=link,
                routers=rng.choice((ROUTERS, ROUTERS[:1], ROUTERS[1:])) if link == "session" else ROUTERS,
                duration_s=rng.uniform(*_DURATIONS_S[kind]),
                same_address=pool == "router" or rng.random() < 0.5,  # clients keep their list of routers
            )
        )
    return tuple(faults)


_CLASSES: tuple[tuple[FaultKind, str, str], ...] = (
    *((kind, pool, "") for kind in WORKER_KINDS for pool in ("prefill", "decode")),
    *((kind, "router", "") for kind in PROCESS_KINDS),
    *((kind, pool, "session") for kind in SESSION_KINDS for pool in ("prefill", "decode")),
    *((kind, "prefill", "kv") for kind in KV_KINDS),
)
_DURATIONS_S: Mapping[FaultKind, tuple[float, float]] = {
    FaultKind.KILL: (0.0, 1.0),
    FaultKind.HANG: (1.0, 8.0),  # shorter and longer than it takes to be noticed
    FaultKind.SLOW: (2.0, 4.0),
    FaultKind.DRAIN: (0.0, 0.5),
    FaultKind.PARTITION: (1.0, 8.0),
    FaultKind.CUT: (0.0, 1.0),
    FaultKind.DELAY: (1.0, 3.0),
    FaultKind.CORRUPT: (1.0, 4.0),
}
