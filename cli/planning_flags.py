"""Flags that `splitserve plan` and `splitserve simulate` share: the traffic, and what serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..planner.models import KvCacheDtype, WeightDtype

Isl = Annotated[str | None, typer.Option(help="Prompt tokens: 4000, mean:CV as 4000:0.5, or p50=2000,p90=8000.")]
Osl = Annotated[str | None, typer.Option(help="Answer tokens, in the same forms.")]
Rate = Annotated[float | None, typer.Option(help="Requests a second; a trace is sped up or slowed down to it.")]
Trace = Annotated[
    str | None,
    typer.Option(help="Trace instead: Mooncake .jsonl, Azure or timestamp,isl,osl .csv; or mooncake, azure: alike."),
]
ArrivalCv = Annotated[float, typer.Option(help="Burstiness of arrivals; 1 is Poisson.")]
NumRequests = Annotated[
    int | None, typer.Option(min=2, help="Requests to simulate.", show_default="1000, or the whole trace")
]
TrafficSeed = Annotated[int, typer.Option(min=0, help="Of the traffic.")]

Dtype = Annotated[
    WeightDtype | None, typer.Option(help="Of the weights.", show_default="the checkpoint's, or bfloat16")
]
KvDtype = Annotated[KvCacheDtype, typer.Option(help="Of the KV cache.")]
Link = Annotated[
    str, typer.Option(help="Between the pools: nvlink, ib400, eth100, eth25, eth10, shared-memory or GB/s.")
]
MaxRunning = Annotated[int | None, typer.Option(min=1, help="Sequences a worker runs.", show_default="256")]
NumKvBlocks = Annotated[
    int | None, typer.Option(min=1, help="KV blocks of a worker.", show_default="what its memory holds")
]
Engine = Annotated[
    str, typer.Option(help="Whose measured coefficients: splitserve, vllm, trtllm, sglang, or roofline.")
]
Calibrations = Annotated[
    list[Path] | None,
    typer.Option("--calibration", help="File of `splitserve calibrate` instead; one for each pool."),
]
RouterMs = Annotated[float, typer.Option(min=0, help="What router and RPCs add to a first token.")]
