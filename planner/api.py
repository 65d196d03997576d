"""The planner from Python: `plan` answers a question, `workers_needed` only counts, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.errors import ConfigError
from .calibration import Calibration
from .candidates import fewest_workers
from .closed_form import estimate_decode, estimate_prefill
from .gpus import GpuSpec, link_bandwidth, load_gpu
from .judge import simulated_outcome
from .jury import Progress
from .load import Load
from .models import KvCacheDtype, ModelSpec, WeightDtype, load_model
from .question import Objective, Question
from .search import Plan, plan_question
from .traffic import SyntheticTraffic, mean_rate, parse_lengths, scale_rate
from .types import PoolSpec, SimRequest, Slo

DEFAULT_REQUESTS = 1_000


def plan(
    model: str | ModelSpec,
    gpu: str | GpuSpec | Sequence[str | GpuSpec],
    *,
    decode_gpu: str | GpuSpec | Sequence[str | GpuSpec] | None = None,
    requests: Sequence[SimRequest] | None = None,
    isl: float | str | None = None,
    osl: float | str | None = None,
    rate: float | None = None,
    arrival_cv: float = 1.0,
    num_requests: int = DEFAULT_REQUESTS,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    itl_s: float | None = None,
    percentile: float = 90.0,
    dtype: WeightDtype | None = None,
    kv_dtype: KvCacheDtype = "bfloat16",
    tp: Sequence[int] = (),
    max_gpus: int = 64,
    objective: Objective = "cost",
    headroom: float = 0.0,
    n_plus_one: bool = False,
    link: str = "ib400",
    chunk: int | None = None,
    max_running: int | None = None,
    num_kv_blocks: int | None = None,
    block_size: int = 16,
    prefix_cache: bool = False,
    router_s: float = 2e-3,
    engine: str = "splitserve",
    calibration: Calibration | None = None,
    seed: int = 0,
    traffic_flags: Sequence[str] = (),
    trace_rate: float | None = None,
    notes: Sequence[str] = (),
    fast: bool = False,
    on_progress: Progress = lambda what, number, of: None,
) -> Plan:
    """How many prefill and decode workers, of what kind, serve this traffic, and whether to split at all.

    Traffic is either `requests` (a trace) or `isl`, `osl` and `rate`; lengths are tokens (4000), mean and spread
    ("4000:0.5") or percentiles ("p50=2000,p90=8000"). `gpu` and `decode_gpu` take names, YAML files or
    specs; several let the search choose. `fast` judges by formulas alone.
    Raises: ConfigError: something contradicts itself, or a limit is below what one request alone takes.
    """
    if requests is None:
        if isl is None or osl is None or rate is None:
            raise ConfigError("traffic is missing: give requests, or isl, osl and rate")
        requests = synthetic_requests(
            isl=isl, osl=osl, rate=rate, arrival_cv=arrival_cv, num_requests=num_requests, seed=seed
        )
    spec = load_model(model) if isinstance(model, str) else model
    bandwidth, latency_s = link_bandwidth(link)
    question = Question(
        model=spec,
        prefill_gpus=_gpus(gpu),
        decode_gpus=_gpus(gpu if decode_gpu is None else decode_gpu),
        requests=tuple(requests),
        slo=Slo(ttft_s=ttft_s, tpot_s=tpot_s, itl_s=itl_s, percentile=percentile),
        dtype=dtype or spec.quantization or "bfloat16",
        kv_dtype=kv_dtype,
        tp=tuple(tp),
        max_gpus=max_gpus,
        objective=objective,
        headroom=headroom,
        n_plus_one=n_plus_one,
        link_bytes_per_s=bandwidth,
        link_latency_s=latency_s,
        chunk=chunk,
        max_running=max_running,
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        prefix_cache=prefix_cache,
        router_s=router_s,
        engine=engine,
        calibration=calibration,
        seed=seed,
        traffic_flags=tuple(traffic_flags),
        trace_rate=trace_rate,
        notes=tuple(notes),
    )
    return plan_question(question, judge=None if fast else simulated_outcome, on_progress=on_progress)


def workers_needed(
    prefill: PoolSpec, decode: PoolSpec, load: Load, slo: Slo, *, router_s: float = 2e-3, most: int = 1024
) -> tuple[int | None, int | None]:
    """Fewest prefill and decode workers that meet the limits under a load, by the closed form; None where none do.

    For controllers that scale: a few milliseconds, no search, no simulation.
    """
    needed_prefill = fewest_workers(
        lambda count: estimate_prefill(prefill.worker, count, load, router_s),
        replace(slo, tpot_s=None, itl_s=None),
        most,
    )
    needed_decode = fewest_workers(
        lambda count: estimate_decode(decode.worker, count, load), replace(slo, ttft_s=None), most
    )
    return needed_prefill, needed_decode


def synthetic_requests(
    *, isl: float | str, osl: float | str, rate: float, arrival_cv: float = 1.0, num_requests: int, seed: int = 0
) -> list[SimRequest]:
    """Requests whose rate is exactly the one asked for. Raises: ConfigError: a value is out of range."""
    traffic = SyntheticTraffic(
        rate=rate, isl=parse_lengths(str(isl)), osl=parse_lengths(str(osl)), arrival_cv=arrival_cv
    )
    requests = traffic.generate(num_requests, seed)
    return scale_rate(requests, rate / mean_rate(requests)) if num_requests > 1 else requests


def _gpus(given: str | GpuSpec | Sequence[str | GpuSpec]) -> tuple[GpuSpec, ...]:
    several = [given] if isinstance(given, str | GpuSpec) else given
    return tuple(load_gpu(one) if isinstance(one, str) else one for one in several)
