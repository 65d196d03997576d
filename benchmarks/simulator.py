"""How long does it take to simulate an hour of conversations? CPU seconds of one candidate, split and colocated.

python -m splitserve.benchmarks.simulator
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..planner.gpus import load_gpu
from ..planner.models import load_model
from ..planner.published_traffic import published_traffic
from ..planner.question import Question, Role, worker_choices
from ..planner.simulator import simulate
from ..planner.traces import MOONCAKE_TRACE, data_directory, read_trace
from ..planner.types import ClusterSpec, PoolSpec, SimRequest, Slo
from .report import write_json

NUM_REQUESTS = 12_031


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Simulations of each cluster; the fastest counts.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """CPU seconds to simulate the Mooncake trace, or traffic like it where the file is absent."""
    requests, source = _requests()
    table = Table(title=f"{len(requests):,} requests of {source}", title_justify="left", header_style="bold")
    for name in ("cluster", "CPU s", "us a request", "output tokens", "cached share", "TTFT p50 / p99, ms"):
        table.add_column(name, justify="left" if name == "cluster" else "right")
    rows = []
    for name, cluster in _clusters(requests).items():
        took_s = []
        for _ in range(rounds):
            started_s = time.process_time()
            result = simulate(cluster, requests)
            took_s.append(time.process_time() - started_s)
        cached = float(result.cached_tokens.sum()) / sum(request.isl for request in requests)
        ttft_s = result.percentile("ttft", 50), result.percentile("ttft", 99)
        table.add_row(
            name,
            f"{min(took_s):.2f}",
            f"{min(took_s) / len(requests) * 1e6:,.0f}",
            f"{result.output_tokens.sum():,}",
            f"{cached:.3f}",
            f"{ttft_s[0] * 1e3:,.0f} / {ttft_s[1] * 1e3:,.0f}",
        )
        rows.append({"cluster": name, "cpu_s": took_s, "cached_share": cached, "ttft_s": ttft_s})
    Console().print(table)
    if json_file is not None:
        write_json(json_file, {"source": source, "num_requests": len(requests), "rounds": rounds, "rows": rows})


def _requests() -> tuple[list[SimRequest], str]:
    path = data_directory() / MOONCAKE_TRACE
    if path.exists():
        return list(read_trace(path).requests), "the Mooncake conversation trace"
    return published_traffic("mooncake", NUM_REQUESTS), "traffic like the Mooncake conversation trace"


def _clusters(requests: list[SimRequest]) -> dict[str, ClusterSpec]:
    question = Question(
        model=load_model("llama-3.1-8b"),
        prefill_gpus=(load_gpu("h200"),),
        decode_gpus=(load_gpu("h200"),),
        requests=tuple(requests),
        slo=Slo(),
        tp=(1,),
        chunk=8192,
        prefix_cache=True,
    )

    def pool(role: Role, num_workers: int) -> PoolSpec:
        (choice,) = worker_choices(question, role)
        return PoolSpec(worker=choice.spec, num_workers=num_workers)

    split = ClusterSpec(
        prefill=pool("prefill", 4),
        decode=pool("decode", 2),
        kv_bytes_per_token=question.kv_bytes_per_token,
        link_bytes_per_s=question.link_bytes_per_s,
        link_latency_s=question.link_latency_s,
        router_s=question.router_s,
        prefix_cache=True,
    )
    return {
        "4 prefill, 2 decode": split,
        "the same, no prefix cache": replace(split, prefix_cache=False),
        "6 colocated": replace(split, prefill=None, decode=pool("colocated", 6)),
    }


if __name__ == "__main__":
    typer.run(main)
