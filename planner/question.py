"""What is asked of the planner, and the workers that could answer it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ..core.errors import ConfigError
from .calibration import Calibration
from .gpus import GpuSpec
from .latency import Provenance, StepLatency, engine_names, latency_for
from .load import Load
from .models import WEIGHT_BYTES, KvCacheDtype, ModelSpec, WeightDtype
from .terms import Deployment
from .types import SimRequest, Slo, WorkerSpec

Objective = Literal["cost", "goodput"]
Role = Literal["prefill", "decode", "colocated"]

_MEMORY_FRACTION = 0.9  # engine.gpu_memory_fraction
_RESERVED_BYTES = 2e9  # of a device: activations and graphs; at most a twentieth of it
GPU_PACKED_TOKENS = 512  # the engine lets no further prompt join a step on a GPU that has so many prefill tokens
COLOCATED_CHUNKS = (512, 2048, 8192)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Model, devices, traffic and service levels. Raises: ConfigError: they contradict each other."""

    model: ModelSpec
    prefill_gpus: tuple[GpuSpec, ...]
    decode_gpus: tuple[GpuSpec, ...]
    requests: tuple[SimRequest, ...] = field(repr=False)
    slo: Slo
    dtype: WeightDtype = "bfloat16"
    kv_dtype: KvCacheDtype = "bfloat16"
    tp: tuple[int, ...] = ()  # degrees to try; empty: powers of two up to the device's most
    max_gpus: int = 64
    objective: Objective = "cost"
    headroom: float = 0.0  # of the rate, on top
    n_plus_one: bool = False  # one worker more in each pool than the load needs
    link_bytes_per_s: float = 45e9
    link_latency_s: float = 3e-3
    chunk: int | None = None  # prefill tokens of a step; None: 8192, and for colocated workers the best of a few
    max_running: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None  # of a worker; None: what its memory holds
    prefix_cache: bool = False
    router_s: float = 2e-3
    engine: str = "splitserve"
    calibration: Calibration | None = None
    seed: int = 0
    traffic_flags: tuple[str, ...] = ()  # of `splitserve bench`, to send the same; empty: rate and mean lengths
    trace_rate: float | None = None  # requests a second of the trace that these flags name, as it was recorded
    notes: tuple[str, ...] = ()  # what was done to the traffic, for the reader

    def __post_init__(self) -> None:
        slo = self.slo
        for flag, value in (("--ttft-ms", slo.ttft_s), ("--tpot-ms", slo.tpot_s), ("--itl-ms", slo.itl_s)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag} is {value * 1e3:g}; it must be above 0")
        if not 0 < slo.percentile < 100:
            raise ConfigError(f"--percentile is {slo.percentile:g}; it must be between 0 and 100")
        if any(degree < 1 for degree in self.tp):
            raise ConfigError(f"--tp is {min(self.tp)}; it must be at least 1")
        if self.max_gpus < 1:
            raise ConfigError(f"--max-gpus is {self.max_gpus}; it must be at least 1")
        if not 0 <= self.headroom < math.inf:
            raise ConfigError(f"--headroom is {self.headroom:g}; it must be a number and not negative")
        if len(self.requests) < 2:
            raise ConfigError(f"the traffic holds {len(self.requests)} requests; a rate needs at least 2")
        if self.engine not in engine_names():
            raise ConfigError(f"--engine: unknown {self.engine!r}; known: {', '.join(engine_names())}")
        longest = max(request.isl + request.osl for request in self.requests)
        if longest > self.model.max_model_len:
            raise ConfigError(
                f"the longest request has {longest:,} tokens in and out, {self.model.name} takes "
                f"{self.model.max_model_len:,}; shorten --isl or --osl, or take a model with a longer context"
            )

    @cached_property
    def load(self) -> Load:
        """The traffic in figures, headroom included."""
        load = Load.of(self.requests, prefix_cache=self.prefix_cache)
        return load.at(load.rate * (1 + self.headroom))

    @property
    def kv_bytes_per_token(self) -> float:
        return self.model.kv_bytes_per_token(self.kv_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerChoice:
    """A kind of worker that the model fits on."""

    gpu: GpuSpec
    tp: int
    spec: WorkerSpec
    provenance: Provenance

    @property
    def cost_per_hour(self) -> float:
        return self.gpu.price_per_hour * self.tp


def worker_choices(question: Question, role: Role) -> list[WorkerChoice]:
    """Every device, degree and, for colocated workers, chunk that the model fits on.

    Raises: ConfigError: it fits on none; says what the largest one lacks.
    """
    gpus = question.prefill_gpus if role == "prefill" else question.decode_gpus
    choices: list[WorkerChoice] = []
    refused: dict[str, str] = {}  # the largest of each device
    for gpu in gpus:
        for tp in question.tp or _degrees(gpu, question):
            reason = question.model.refuse_tp(tp)
            if reason is None and tp > gpu.max_tp:
                reason = f"a host holds {gpu.max_tp}"
            blocks = 0 if reason else num_blocks(question, gpu, tp)
            if reason is None and blocks < 2:
                weights = question.model.weight_bytes(question.dtype) / 1e9
                reason = (
                    f"{weights:,.0f} GB of {question.dtype} weights, {tp * gpu.memory_bytes / 1e9:,.0f} GB of memory"
                )
            if reason is not None:
                refused[gpu.name] = f"{tp} x {gpu.name}: {reason}"
                continue
            choices += _with_chunks(question, role, gpu, tp, blocks)
    if not choices:
        raise ConfigError(
            f"{question.model.name} fits on none of the workers for {role}: {'; '.join(refused.values())}; "
            f"use a larger GPU, more --tp, or --dtype {_smaller(question.dtype)}"
        )
    return choices


def _with_chunks(question: Question, role: Role, gpu: GpuSpec, tp: int, blocks: int) -> list[WorkerChoice]:
    on_cpu = gpu.name == "cpu"
    latency, provenance = worker_latency(question, gpu, tp)
    measured = question.calibration.max_step_tokens if question.calibration else None
    if (chunk := question.chunk or measured) is not None:
        chunks: Sequence[int] = (chunk,)
    elif on_cpu:
        chunks = (256,)
    else:
        chunks = COLOCATED_CHUNKS if role == "colocated" else (8192,)
    return [
        WorkerChoice(
            gpu=gpu,
            tp=tp,
            spec=WorkerSpec(
                latency=latency,
                num_blocks=blocks,
                block_size=question.block_size,
                max_step_tokens=chunk,
                max_running=question.max_running or (64 if on_cpu else 256),
                max_packed_tokens=None if on_cpu or question.engine != "splitserve" else GPU_PACKED_TOKENS,
            ),
            provenance=provenance,
        )
        for chunk in chunks
    ]


def worker_latency(question: Question, gpu: GpuSpec, tp: int) -> tuple[StepLatency, Provenance]:
    """The calibration if there is one, whatever the device; else the engine's coefficients."""
    if question.calibration is not None:
        return question.calibration.latency, question.calibration.provenance
    deployment = Deployment(model=question.model, gpu=gpu, tp=tp, dtype=question.dtype, kv_dtype=question.kv_dtype)
    return latency_for(deployment, question.engine)


def num_blocks(question: Question, gpu: GpuSpec, tp: int) -> int:
    """KV blocks of a worker: what weights and activations leave of its memory."""
    measured = question.calibration.num_kv_blocks if question.calibration else None
    if (stated := question.num_kv_blocks or measured) is not None:
        return stated
    reserved = min(_RESERVED_BYTES, gpu.memory_bytes / 20)
    free = (gpu.memory_bytes * _MEMORY_FRACTION - reserved) * tp - question.model.weight_bytes(question.dtype)
    per_token = question.kv_bytes_per_token * question.model.kv_copies(tp)
    return max(0, int(free / per_token / question.block_size))


def _degrees(gpu: GpuSpec, question: Question) -> tuple[int, ...]:
    """Powers of two; a calibration is of one worker, whose degree is not varied."""
    if question.calibration is not None:
        return (1,)
    return tuple(tp for tp in (1, 2, 4, 8, 16, 32, 64) if tp <= gpu.max_tp)


def _smaller(dtype: str) -> str:
    smaller = [name for name in ("fp8", "int4") if WEIGHT_BYTES[name] < WEIGHT_BYTES[dtype]]
    return smaller[0] if smaller else "of fewer bits"
