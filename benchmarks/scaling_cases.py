"""What the scaling benchmark compares, and on which traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ..planner.api import workers_needed
from ..planner.gpus import load_gpu
from ..planner.load import Load
from ..planner.models import load_model
from ..planner.overlaid_traffic import overlay
from ..planner.published_traffic import published_traffic
from ..planner.question import Question, Role, worker_choices
from ..planner.simulated_scaling import ScalingTimes
from ..planner.traces import AZURE_TRACE, MOONCAKE_TRACE, data_directory, read_trace
from ..planner.types import ClusterSpec, PoolSpec, SimRequest, Slo
from ..scheduling.gpu_budget import PoolBounds
from ..scheduling.pool_needs import ServiceLevel, WorkerLimits
from ..scheduling.scaling import SloScaling
from ..scheduling.scaling_config import ScalingConfig, ScalingPolicy
from .utilisation_scaling import UtilisationScaling

# The load, in parts of the peak: (part of the run, load at its end); straight lines between.
DAY = (
    *((0.0, 0.35), (0.15, 0.35), (0.4, 1.0), (0.52, 1.0), (0.57, 0.5), (0.7, 0.5)),
    *((0.7, 0.95), (0.8, 0.95), (0.8, 0.35), (1.0, 0.35)),  # a step up, and one down
)
_FULL = 0.9  # of the GPU budget, that the peak needs
_TRACES = {"mooncake": MOONCAKE_TRACE, "azure": AZURE_TRACE}
LEVELS = {
    "mooncake": Slo(ttft_s=4.0, tpot_s=0.04),
    "azure": Slo(ttft_s=0.5, tpot_s=0.025),
    "shift": Slo(ttft_s=4.0, tpot_s=0.04),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One traffic and the cluster it meets."""

    name: str
    source: str
    requests: tuple[SimRequest, ...]
    slo: Slo
    max_gpus: int
    num_tenants: int
    cluster: Callable[[int, int], ClusterSpec]  # of so many prefill and decode workers
    planned: Mapping[str, tuple[int, int]]  # prefill and decode workers for the "peak", the "mean" and the "start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to size the pools."""

    name: str
    prefill: int  # workers at the start
    decode: int
    scaling: ScalingPolicy | None


def load_at(profile: Sequence[tuple[float, float]], part: float) -> float:
    """Straight between the knots; at a step, the later one."""
    for (start, low), (end, high) in reversed(list(pairwise(profile))):
        if start <= part and end > start:
            return low + (high - low) * min(1.0, (part - start) / (end - start))
    return profile[0][1]


def trace_of(name: str) -> tuple[list[SimRequest], str]:
    """The public trace, or traffic with its statistics where the file is absent."""
    path: Path = data_directory() / _TRACES[name]
    if path.exists():
        return list(read_trace(path).requests), path.name
    return published_traffic(name), f"traffic like {name}'s trace"


def scenario(name: str, *, max_gpus: int, duration_s: float, seed: int) -> Scenario:
    """As many tenants as need nine tenths of the GPUs at the peak."""
    parts = ("mooncake", "azure") if name == "shift" else (name,)
    traces = {part: trace_of(part) for part in parts}
    slo, cluster = LEVELS[name], _cluster()
    loads = {part: Load.of(trace, prefix_cache=False) for part, (trace, _) in traces.items()}

    def needs(part: str, rate: float) -> tuple[int, int]:
        one = cluster(1, 1)
        assert one.prefill is not None
        found = workers_needed(one.prefill, one.decode, loads[part].at(rate), slo)
        return found[0] or 10**6, found[1] or 10**6

    tenants = {part: _most(lambda n, p=part: sum(needs(p, n * loads[p].rate)) <= _FULL * max_gpus) for part in parts}  # type: ignore[misc]

    def load(part: str, at_s: float) -> float:
        if name != "shift":
            return load_at(DAY, at_s / duration_s)
        shifted = min(1.0, max(0.0, (at_s / duration_s - 0.25) / 0.5))  # all prompts at first, then all answers
        return 0.85 * (shifted if part == "azure" else 1 - shifted)

    requests = [
        request
        for part, (trace, _) in traces.items()
        for request in overlay(
            trace,
            num_tenants=tenants[part],
            duration_s=duration_s,
            load=lambda at_s, p=part: load(p, at_s),  # type: ignore[misc]
            seed=seed,
        )
    ]
    requests.sort(key=lambda request: request.arrival_s)
    mean = sum(load(parts[-1], duration_s * (n + 0.5) / 200) for n in range(200)) / 200
    first = parts[0]
    rate = tenants[first] * loads[first].rate
    planned = {
        "peak": _larger(*(needs(part, tenants[part] * loads[part].rate) for part in parts)),
        "mean": _larger(*(needs(part, tenants[part] * loads[part].rate * mean) for part in parts)),
        "start": needs(first, rate * load(first, 0.0)),
    }
    return Scenario(
        name=name,
        source=" to ".join(source for _, source in traces.values()),
        requests=tuple(requests),
        slo=slo,
        max_gpus=max_gpus,
        num_tenants=sum(tenants.values()),
        cluster=cluster if name != "azure" else lambda p, d: replace(cluster(p, d), prefix_cache=False),
        planned=planned,
    )


def cases(found: Scenario, times: ScalingTimes, shrink_after_s: float = 120.0) -> list[Case]:
    """Static splits, naive autoscalers, and splitserve's policy; those that scale all begin alike."""
    half, start, most = found.max_gpus // 2, found.planned["start"], found.max_gpus - 1
    static = [
        Case(
            name=f"static, planned for the {what}",
            prefill=found.planned[what][0],
            decode=found.planned[what][1],
            scaling=None,
        )
        for what in ("peak", "mean")
    ]
    static.append(
        Case(name="static, all GPUs, half and half", prefill=half, decode=found.max_gpus - half, scaling=None)
    )
    scaled: dict[str, ScalingPolicy] = {
        "by GPU utilisation": UtilisationScaling("busy", max_workers=most, down_after_s=shrink_after_s),
        "by utilisation and KV": UtilisationScaling("kv", max_workers=most, down_after_s=shrink_after_s),
        "splitserve": slo_scaling(found, times, shrink_after_s),
    }
    return static + [Case(name=name, prefill=start[0], decode=start[1], scaling=one) for name, one in scaled.items()]


def slo_scaling(found: Scenario, times: ScalingTimes, shrink_after_s: float) -> SloScaling:
    worker = found.cluster(1, 1).decode.worker
    bounds = PoolBounds(min_workers=1, max_workers=found.max_gpus - 1)
    config = ScalingConfig(
        prefill=bounds,
        decode=bounds,
        level=ServiceLevel(ttft_s=found.slo.ttft_s, tpot_s=found.slo.tpot_s),
        limits=WorkerLimits(
            max_step_tokens=worker.max_step_tokens,
            max_packed_tokens=worker.max_packed_tokens,
            max_running=worker.max_running,
        ),
        max_gpus=found.max_gpus,
        startup_s=times.startup_s,
        up_cooldown_s=min(5.0, times.period_s),
        down_after_s=shrink_after_s,
        switch_after_s=min(60.0, shrink_after_s),
        down_cooldown_s=min(30.0, shrink_after_s / 4),
    )
    return SloScaling(config, worker.latency)


def _cluster() -> Callable[[int, int], ClusterSpec]:
    """Llama-3.1-8B on H200s, by the planner's coefficients for this engine."""
    gpu, traffic = load_gpu("h200"), tuple(SimRequest(arrival_s=float(n), isl=1, osl=1) for n in range(2))
    question = Question(
        model=load_model("llama-3.1-8b"), prefill_gpus=(gpu,), decode_gpus=(gpu,), requests=traffic, slo=Slo(), tp=(1,)
    )

    def pool(role: Role, num_workers: int) -> PoolSpec:
        (choice,) = worker_choices(question, role)
        return PoolSpec(worker=choice.spec, num_workers=num_workers)

    def cluster(prefill: int, decode: int) -> ClusterSpec:
        return ClusterSpec(
            prefill=pool("prefill", prefill),
            decode=pool("decode", decode),
            kv_bytes_per_token=question.kv_bytes_per_token,
            link_bytes_per_s=question.link_bytes_per_s,
            link_latency_s=question.link_latency_s,
            router_s=question.router_s,
            prefix_cache=True,
        )

    return cluster


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, at least 1."""
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _larger(*counts: tuple[int, int]) -> tuple[int, int]:
    return max(count[0] for count in counts), max(count[1] for count in counts)
