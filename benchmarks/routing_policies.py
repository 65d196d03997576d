"""Which routing policy serves most requests within their service level? Two recorded traffics, simulated, in one run.

python -m splitserve.benchmarks.routing_policies
python -m splitserve.benchmarks.routing_policies --traffic azure --policy prefix --policy round_robin --json out.json

The cluster is 16 H200 with Llama-3.1-8B. Each traffic is sped up until round robin answers 70 % of its requests within
the service level; at that rate, and at others around it, every policy gets the same requests, workers and caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..planner.gpus import load_gpu
from ..planner.models import load_model
from ..planner.published_traffic import published_traffic
from ..planner.question import Question, Role, worker_choices
from ..planner.simulation_result import SimulationResult
from ..planner.simulator import RouterLimits, simulate
from ..planner.traces import AZURE_TRACE, MOONCAKE_TRACE, data_directory, read_trace
from ..planner.types import ClusterSpec, PoolSpec, SimRequest, Slo
from ..scheduling.policies.registry import POLICIES, load_policy
from .report import write_json

_BASELINE = "round_robin"
_RATES = (0.8, 1.0, 1.2)  # of the rate at which the baseline attains what was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A trace, the cluster that it is sent to, and what its users expect."""

    file: str
    slo: Slo
    num_prefill: int
    num_decode: int


# Pools as the traffic wants them: Mooncake's prompts are long and its answers short, Azure's prompts are short.
TRAFFICS = {
    "mooncake": Traffic(file=MOONCAKE_TRACE, slo=Slo(ttft_s=3.0, tpot_s=0.05), num_prefill=12, num_decode=4),
    "azure": Traffic(file=AZURE_TRACE, slo=Slo(ttft_s=0.5, tpot_s=0.05), num_prefill=8, num_decode=8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy at one rate."""

    policy: str
    rate: float
    result: SimulationResult
    slo: Slo
    num_prompt_tokens: int

    @property
    def attainment(self) -> float:
        return float(self.result.met(self.slo).mean())

    @property
    def goodput(self) -> float:
        """Requests per second of arrivals that met every limit: a late last answer does not dilute it."""
        return self.attainment * self.rate

    @property
    def hit_rate(self) -> float:
        """Of the prompt tokens of answered requests, those that a cache served."""
        return float(self.result.cached_tokens.sum()) / self.num_prompt_tokens

    def figures(self) -> dict[str, Any]:
        ttft, tpot = self.result.percentiles("ttft"), self.result.percentiles("tpot")
        return {
            "policy": self.policy,
            "rate": self.rate,
            "ttft_s": [ttft.p50, ttft.p90, ttft.p99],
            "tpot_s": [tpot.p50, tpot.p90, tpot.p99],
            "hit_rate": self.hit_rate,
            "attainment": self.attainment,
            "goodput_rps": self.goodput,
            "errors": self.result.errors,
            "prefill_utilisation": self.result.utilisation,
        }


def main(
    traffic: Annotated[list[str] | None, typer.Option(help="mooncake or azure.", show_default="both")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Policies to compare with round robin.", show_default="all")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.01, help="Requests/s.", show_default="0.8, 1 and 1.2 of that at which round robin attains"),
    ] = None,
    attainment: Annotated[float, typer.Option(help="Share that round robin answers in time at rate 1.")] = 0.7,
    num_requests: Annotated[int | None, typer.Option(min=100, help="Of each trace.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(help="Of the policies' chance, and of generated traffic.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """TTFT, hit rate and goodput of each policy at the same rates."""
    policies = [_BASELINE, *(name for name in policy or POLICIES if name != _BASELINE)]
    console, figures = Console(), []
    for name in traffic or TRAFFICS:
        if name not in TRAFFICS:
            raise typer.BadParameter(f"unknown traffic {name!r}; known: {', '.join(TRAFFICS)}")
        spec = TRAFFICS[name]
        requests, source = _requests(name, spec, num_requests, seed)
        cluster = _cluster(spec, requests)
        with console.status("") as status:
            rates = rate
            if not rates:
                base = _rate_of(cluster, requests, spec.slo, attainment, seed, status.update)
                rates = [base * share for share in _RATES]
            rows = []
            for each in rates:
                for which in policies:
                    status.update(f"{name}: {which} at {each:.1f} requests/s")
                    rows.append(_row(which, each, cluster, requests, spec.slo, seed))
        _print(console, rows, spec, source, len(requests))
        figures.append({"traffic": name, "source": source, "rows": [row.figures() for row in rows]})
    if json_file is not None:
        write_json(json_file, {"attainment": attainment, "seed": seed, "traffics": figures}, device="simulated h200")


def _requests(name: str, spec: Traffic, limit: int | None, seed: int) -> tuple[list[SimRequest], str]:
    path = data_directory() / spec.file
    if path.exists():
        return list(read_trace(path, limit=limit).requests), path.name
    return published_traffic(name, limit, seed=seed), f"traffic like {path.name}"


def _cluster(spec: Traffic, requests: Sequence[SimRequest]) -> ClusterSpec:
    h200 = load_gpu("h200")
    question = Question(
        model=load_model("llama-3.1-8b"),
        prefill_gpus=(h200,),
        decode_gpus=(h200,),
        requests=tuple(requests),
        slo=spec.slo,
        tp=(1,),
        chunk=8192,
        prefix_cache=True,
    )

    def pool(role: Role, num_workers: int) -> PoolSpec:
        (choice,) = worker_choices(question, role)
        return PoolSpec(worker=choice.spec, num_workers=num_workers)

    return ClusterSpec(
        prefill=pool("prefill", spec.num_prefill),
        decode=pool("decode", spec.num_decode),
        kv_bytes_per_token=question.kv_bytes_per_token,
        link_bytes_per_s=question.link_bytes_per_s,
        link_latency_s=question.link_latency_s,
        router_s=question.router_s,
        prefix_cache=True,
    )


def _row(policy: str, rate: float, cluster: ClusterSpec, requests: Sequence[SimRequest], slo: Slo, seed: int) -> Row:
    result = simulate(
        cluster,
        _at_rate(requests, rate),
        seed=seed,
        limits=RouterLimits(admission="queue", ttft_target_s=slo.ttft_s),
        policy=load_policy(policy),
    )
    return Row(
        policy=policy, rate=rate, result=result, slo=slo, num_prompt_tokens=sum(request.isl for request in requests)
    )


def _at_rate(requests: Sequence[SimRequest], rate: float) -> list[SimRequest]:
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    factor = (len(requests) - 1) / span_s / rate
    return [replace(request, arrival_s=request.arrival_s * factor) for request in requests]


def _rate_of(
    cluster: ClusterSpec,
    requests: Sequence[SimRequest],
    slo: Slo,
    attainment: float,
    seed: int,
    tell: Callable[[str], object],
) -> float:
    """The highest rate at which the baseline attains so much, to 2 %."""

    def attains(rate: float) -> bool:
        tell(f"round robin at {rate:.1f} requests/s")
        return _row(_BASELINE, rate, cluster, requests, slo, seed).attainment >= attainment

    low, high = 0.0, 1.0
    while attains(high):
        low, high = high, 1.5 * high
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if attains(middle) else (low, middle)
    return low


def _print(console: Console, rows: Sequence[Row], spec: Traffic, source: str, count: int) -> None:
    assert spec.slo.ttft_s is not None
    assert spec.slo.tpot_s is not None
    title = (
        f"{count:,} requests of {source}; {spec.num_prefill} prefill and {spec.num_decode} decode workers; TTFT "
        f"{spec.slo.ttft_s * 1e3:,.0f} ms, TPOT {spec.slo.tpot_s * 1e3:,.0f} ms"
    )
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("req/s", "policy", "TTFT p50", "p90", "p99 ms", "hit rate", "in time", "goodput", "x round robin"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    baseline = {row.rate: row.goodput for row in rows if row.policy == _BASELINE}
    for row in rows:
        ttft = row.result.percentiles("ttft")
        table.add_row(
            f"{row.rate:.1f}",
            row.policy,
            *(f"{value * 1e3:,.0f}" for value in (ttft.p50, ttft.p90, ttft.p99)),
            f"{row.hit_rate:.3f}",
            f"{row.attainment:.3f}",
            f"{row.goodput:.2f}",
            f"{row.goodput / baseline[row.rate]:.2f}",
            end_section=row.policy == rows[-1].policy,
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
