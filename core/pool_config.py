"""The sections of the YAML file about pools: how many workers, what each needs of its node, and when to change that."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from .config_section import File, Section

MAX_REPLICAS = 1024


class PoolConfig(Section):
    """`prefill`, `decode`, `colocated`: one pool of workers."""

    replicas: int | None = Field(
        default=None,
        ge=0,
        le=MAX_REPLICAS,
        description="Workers at first; empty: min, else 1 prefill and 1 decode, or none if there are colocated ones",
    )
    min: int | None = Field(
        default=None,
        ge=0,
        le=MAX_REPLICAS,
        description="Fewest that scaling leaves; empty: 1, or replicas if 0",
    )
    max: int | None = Field(
        default=None, ge=0, le=MAX_REPLICAS, description="Most that scaling makes of it; empty: no bound of its own"
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of each of its processes; empty: the host's cores shared out"
    )
    tensor_parallel: int | None = Field(
        default=None, ge=1, le=64, description="Processes that hold each worker's model; empty: engine.tensor_parallel"
    )
    gpus: int = Field(default=0, ge=0, description="GPUs of each worker: one for each of its processes, or 0 for none")
    accelerator_type: str | None = Field(
        default=None,
        min_length=1,
        description="GPU type of its node: Ray's label ray.io/accelerator-type",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Ray node labels that its node must have: x, !x, in(x,y) or !in(x,y)",
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="Ray resources of each besides CPU and GPU, such as memory",
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of its processes")
    cpu_fallback: bool = Field(
        default=False,
        description="Run on a CPU, anywhere, while no node has the GPUs and labels that it needs",
    )

    def like(self, other: PoolConfig) -> bool:
        """Whether a worker of the one pool may be one of the other: all but their numbers is equal."""
        numbers = {"replicas", "min", "max"}
        return self.model_dump(exclude=numbers) == other.model_dump(exclude=numbers)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        numbers = [(name, getattr(self, name)) for name in ("min", "replicas", "max")]
        stated = [(name, number) for name, number in numbers if number is not None]
        for (lower_name, lower), (upper_name, upper) in pairwise(stated):
            if lower > upper:
                raise ValueError(f"{lower_name} is {lower} and {upper_name} is {upper}, wanted: min <= replicas <= max")
        return self


class PlacementConfig(Section):
    """`placement`: which node a worker goes to, among those that have what it needs."""

    pairs: Literal["any", "pack", "spread"] = Field(
        default="any",
        description="pack: prefill and decode workers share nodes, so that KV stays on a host; spread: each pool on "
        "many nodes; any: as Ray likes. A wish, not a condition",
    )
    wait_for_nodes_s: float = Field(
        default=3.0,
        ge=0,
        description="Seconds to wait for a node that can hold a worker; minutes where Ray's autoscaler adds nodes",
    )


class SloConfig(Section):
    """`slo`: what users were promised; scaling keeps it."""

    ttft_s: float = Field(default=1.0, gt=0, description="Seconds to the first token")
    tpot_s: float = Field(default=0.1, gt=0, description="Seconds a token after the first")


class ScalingSection(Section):
    """`scaling`: whether the controller changes the size of the pools by itself, and how quickly."""

    enabled: bool = Field(
        default=False, description="Scale prefill and decode between their min and max, each by its own load"
    )
    period_s: float = Field(default=5.0, gt=0, description="Seconds between two decisions")
    max_gpus: int | None = Field(
        default=None, ge=1, description="GPUs of both pools together; on CPUs a worker counts as one; empty: no bound"
    )
    percentile: float = Field(default=90.0, gt=0, le=100, description="Percent of the requests that must meet the slo")
    calibration: File = Field(
        default=None,
        description="File of `splitserve calibrate`: what steps take; empty: what the workers measure themselves",
    )
    startup_s: float = Field(default=60.0, gt=0, description="Seconds until a new worker serves: how far to look ahead")
    cold_start_s: float = Field(default=10.0, ge=0, description="Seconds in which what a new worker reports is ignored")
    margin: float = Field(
        default=0.15, ge=0, description="A pool shrinks only to what would carry so much more traffic"
    )
    down_after_s: float = Field(default=120.0, ge=0, description="A pool shrinks to the most it needed for so long")
    up_cooldown_s: float = Field(default=5.0, ge=0, description="Seconds between two growths of a pool")
    down_cooldown_s: float = Field(default=30.0, ge=0, description="Seconds from a pool's change to its shrinking")
    role_switch: bool | None = Field(
        default=None,
        description="A worker that one pool can spare changes its role before one is started in the other; empty: "
        "where both pools ask for the same nodes, and without TLS, whose certificates may prove one role only",
    )
