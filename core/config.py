"""The cluster's YAML file and every flag that overrides it: names, types, defaults and what they mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from .config_section import File, Section
from .errors import ConfigError
from .pool_config import MAX_REPLICAS, PlacementConfig, PoolConfig, ScalingSection, SloConfig
from .security_config import SecurityConfig

DEFAULT_HTTP_PORT = 8000
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_size(value: object) -> object:
    """Bytes of "1.5GiB", "512MiB" or "2GB"; anything else is left for pydantic to judge."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmg]i?)?b?\s*", value.lower())
    if match is None:
        raise ValueError("a size is bytes or a number with KiB, MiB or GiB, such as 512MiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


Size = Annotated[int, BeforeValidator(parse_size)]
Dtype = Literal["float32", "bfloat16", "float16"]
Role = Literal["router", "prefill", "decode", "colocated"]
WorkerRole = Literal["prefill", "decode", "colocated"]
WORKER_ROLES: tuple[WorkerRole, ...] = ("prefill", "decode", "colocated")


class EngineConfig(Section):
    """`engine`: the model runner of every worker."""

    device: str | None = Field(
        default=None, description="cpu, cuda or cuda:N; empty: cuda for pools that have GPUs, else cpu"
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that hold each worker's model together, one a GPU; it must divide the attention heads",
    )
    dtype: Dtype | None = Field(
        default=None, description="Number type of weights and KV; empty: float32 on a CPU, bfloat16 on a GPU"
    )
    random_weights: bool = Field(
        default=False,
        description="Random weights instead of the model's, to measure speed; answers are noise",
    )
    block_size: int = Field(default=16, ge=1, description="Tokens in a KV block")
    num_kv_blocks: int | None = Field(
        default=None, ge=2, description="KV blocks of the pool; empty: what kv_memory holds, or a GPU has left"
    )
    kv_memory: Size = Field(
        default=1 << 30, gt=0, description="Memory of the KV pool of each worker on a CPU: bytes, or 512MiB, 2GiB"
    )
    gpu_memory_fraction: float = Field(
        default=0.9, gt=0, le=1, description="Of a GPU's memory: weights, graphs, activations and the KV pool"
    )
    cuda_graphs: bool = Field(default=True, description="Capture decode and short prefill steps on a GPU")
    max_model_len: int | None = Field(
        default=None, ge=2, description="Most tokens of prompt and answer together; empty: the model's own limit"
    )
    max_running: int | None = Field(
        default=None, ge=1, description="Sequences in the running batch; empty: 64 on a CPU, 256 on a GPU"
    )
    max_waiting: int = Field(default=1024, ge=1, description="Sequences waiting for the engine; more are refused")
    max_step_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Prefill tokens of one step, the chunk size; empty: 256 on a CPU, 8192 on a GPU",
    )
    decode_headroom_tokens: int = Field(default=64, ge=0, description="Tokens reserved past the prompt by a grant")
    prefix_cache: bool = Field(default=True, description="Keep KV of finished prompts for prompts that begin alike")
    local_prefill: bool = Field(
        default=True,
        description="Decode workers compute short prompts by themselves for routers with local_prefill_itl_s",
    )
    self_check: bool = Field(default=True, description="Compare logits with plain transformers before serving")


class RouterConfig(Section):
    """`router`: the front door."""

    replicas: int = Field(default=1, ge=1, le=64, description="Routers to start, on consecutive ports")
    host: str = Field(
        default="127.0.0.1", description="Address that clients connect to; loopback unless you say otherwise"
    )
    port: int = Field(default=50051, ge=0, le=65535, description="Port of the first router; 0 takes a free one")
    http_port: int | None = Field(
        default=None,
        ge=-1,
        le=65535,
        description="Port of the first router's OpenAI API; empty: 8000, or a free one where port is 0; -1: none",
    )
    api_key_file: File = Field(
        default=None,
        description="File of API keys (`splitserve keys new`), asked of every caller; empty: everybody may call",
    )
    policy: str = Field(
        default="prefix",
        min_length=1,
        description="How workers are chosen: prefix, least_loaded, power_of_two, round_robin, session, or the name of "
        "an installed entry point (docs/routing.md)",
    )
    max_queued: int = Field(default=256, ge=1, description="Requests waiting for dispatch; more are refused")
    max_live: int = Field(default=8_192, ge=1, description="Requests not ended, queued ones included; more are refused")
    admission: Literal["refuse", "queue"] = Field(
        default="refuse",
        description="What happens to a request whose first token would come too late by prediction: refused at once, "
        "with the time to try again, or queued all the same",
    )
    ttft_target_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds from arrival after which a first token is too late; empty: the request's own deadline",
    )
    tpot_target_s: float | None = Field(
        default=None,
        gt=0,
        description="No decode worker gets more sequences than it gives a token within so many seconds; empty: any",
    )
    ageing_s: float = Field(default=10.0, gt=0, description="Seconds of waiting that are worth one step of priority")
    prefill_bound_s: float = Field(
        default=0.2,
        gt=0,
        description="Seconds of prefill work that a prefill worker may have outstanding; a second prompt always may",
    )
    local_prefill_itl_s: float | None = Field(
        default=None,
        gt=0,
        description="Longest gap between tokens, by prediction, that a prompt computed on its decode worker may cause; "
        "empty: every prompt goes to a prefill worker",
    )
    max_attempts: int = Field(default=3, ge=1, description="Attempts at a request before its error goes to the client")
    max_worker_deaths: int = Field(
        default=2, ge=1, description="Workers that may die computing one request; then it fails as their likely cause"
    )
    retry_ratio: float = Field(
        default=1.0, ge=0, description="Retries allowed in a minute for each request of that minute"
    )
    retry_floor: int = Field(default=64, ge=0, description="Retries allowed in a minute however few requests it had")
    keep_answers_s: float = Field(
        default=30.0, ge=0, description="Seconds for which a finished answer can be had again by its idempotency key"
    )
    default_timeout_s: float = Field(
        default=600.0, gt=0, description="Seconds until a request without a deadline fails"
    )
    no_worker_wait_s: float = Field(
        default=4.0, ge=0, description="Seconds that a request waits while nobody can serve it"
    )

    def http_port_of(self, index: int) -> int:
        """Port of router number `index`: consecutive ones, 0 for a free one, -1 for none."""
        first = self.http_port
        if first is None:
            first = DEFAULT_HTTP_PORT if self.port else 0
        return first + index if first > 0 else first


class RayConfig(Section):
    """`ray`: where workers are placed."""

    address: str | None = Field(
        default=None,
        description="host:port of a Ray cluster to join; auto: one that runs on this machine, or RAY_ADDRESS; empty: a "
        "local one is started",
    )
    namespace: str = Field(default="splitserve", min_length=1, description="Ray namespace; one cluster in each")


class RestartConfig(Section):
    """`restart`: what happens when a process dies."""

    max_restarts: int = Field(
        default=5, ge=0, description="Restarts of one process within window_s; then it stays down"
    )
    window_s: float = Field(default=600.0, gt=0, description="Seconds after which a restart no longer counts")
    backoff_s: float = Field(
        default=0.5, ge=0, description="Wait before the second restart in a row; doubles, up to 30 s"
    )
    unhealthy_s: float = Field(
        default=7.0, gt=0, description="Seconds after which a worker that does not answer is killed and started again"
    )


class ClusterConfig(Section):
    """A whole cluster."""

    model: str = Field(
        default="smollm2-135m",
        min_length=1,
        description="smollm2-135m (built in), a directory, a .gguf file or a hub id",
    )
    transport: Literal["auto", "grpc", "shared-memory", "cuda-ipc", "gloo", "nccl"] = Field(
        default="auto",
        description="How KV moves; auto: CUDA IPC or shared memory within a host, else gRPC; nccl (between GPUs) and "
        "gloo: over connections of their own, which nobody encrypts, for trusted networks",
    )
    kv_codec: Literal["none", "fp8", "int8", "auto"] = Field(
        default="none",
        description="How KV is coded where its bytes travel; fp8 and int8 take a byte a value and lose precision "
        "(docs/kv_transfer.md); auto: int8 on links that are measured to be slow; never within a host",
    )
    worker_host: str | None = Field(
        default=None,
        description="Address that workers listen on; empty: loopback, or the node's address on a joined Ray",
    )
    trace_dir: File = Field(default=None, description="Directory for step records and request events as JSON lines")
    log_dir: File = Field(default=None, description="Directory for the processes' logs; empty: beside the state file")
    startup_timeout_s: float = Field(default=300.0, gt=0, description="Seconds for a process to serve")
    lease_s: float = Field(default=30.0, gt=0, description="Seconds that finished KV waits to be fetched")
    drain_timeout_s: float = Field(
        default=10.0, ge=0, description="Seconds that running requests get when a process is stopped"
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="The model runner of every worker")
    router: RouterConfig = Field(default_factory=RouterConfig, description="The front door")
    prefill: PoolConfig = Field(default_factory=PoolConfig, description="Workers that compute prompts")
    decode: PoolConfig = Field(default_factory=PoolConfig, description="Workers that stream answers")
    colocated: PoolConfig = Field(default_factory=PoolConfig, description="Workers that do both")
    slo: SloConfig = Field(default_factory=SloConfig, description="What users were promised")
    scaling: ScalingSection = Field(
        default_factory=ScalingSection, description="Whether and how pools change their size"
    )
    placement: PlacementConfig = Field(default_factory=PlacementConfig, description="Which nodes workers go to")
    ray: RayConfig = Field(default_factory=RayConfig, description="Where workers are placed")
    restart: RestartConfig = Field(default_factory=RestartConfig, description="What happens when a process dies")
    security: SecurityConfig = Field(default_factory=SecurityConfig, description="Certificates of every process")

    @model_validator(mode="after")
    def _serves_something(self) -> Self:
        prefill, decode, colocated = (self.replicas(role) for role in WORKER_ROLES)
        if decode + colocated == 0 or (decode > 0 and prefill + colocated == 0):
            raise ValueError(
                f"{prefill} prefill, {decode} decode and {colocated} colocated workers cannot serve a request; "
                "start at least one prefill and one decode worker, or one colocated worker"
            )
        return self

    @model_validator(mode="after")
    def _scaling_has_bounds(self) -> Self:
        if not self.scaling.enabled:
            return self
        for role in ("prefill", "decode"):
            if self.pool(role).max is None or self.bounds(role)[0] < 1:
                raise ValueError(
                    f"scaling.enabled needs {role}.max, and at least one {role} worker; say how far it may scale"
                )
        return self

    @model_validator(mode="after")
    def _gpus_fit_ranks(self) -> Self:
        for role in WORKER_ROLES:
            if 0 < self.pool(role).gpus < self.tensor_parallel(role):
                raise ValueError(
                    f"{role}.gpus: got {self.pool(role).gpus}, wanted: at least its tensor_parallel, "
                    f"{self.tensor_parallel(role)}"
                )
        return self

    @model_validator(mode="after")
    def _roles_can_be_switched(self) -> Self:
        if self.scaling.role_switch and not self._are_pools_alike:
            raise ValueError(
                "scaling.role_switch: got true, wanted: prefill and decode with the same threads, gpus, labels, "
                "resources and env, and tensor_parallel 1; make the pools alike, or leave it empty"
            )
        return self

    @property
    def _are_pools_alike(self) -> bool:
        return self.prefill.like(self.decode) and self.tensor_parallel("prefill") == 1

    @property
    def switches_roles(self) -> bool:
        """Whether scaling lets a worker change its role."""
        stated = self.scaling.role_switch
        return self._are_pools_alike and self.security.cert is None if stated is None else stated

    def pool(self, role: WorkerRole) -> PoolConfig:
        return {"prefill": self.prefill, "decode": self.decode, "colocated": self.colocated}[role]

    def replicas(self, role: WorkerRole) -> int:
        """Workers of a pool; 1 prefill and 1 decode if nothing was said."""
        pool = self.pool(role)
        if pool.replicas is not None:
            return pool.replicas
        least = 0 if role == "colocated" or self.colocated.replicas or self.colocated.min else 1
        return max(least, pool.min or 0) if pool.max is None else min(max(least, pool.min or 0), pool.max)

    def bounds(self, role: WorkerRole) -> tuple[int, int]:
        """Fewest and most workers that a pool may be scaled to."""
        pool = self.pool(role)
        least = pool.min if pool.min is not None else min(1, self.replicas(role))
        return least, pool.max if pool.max is not None else MAX_REPLICAS

    def tensor_parallel(self, role: WorkerRole) -> int:
        """Processes that hold the model of each worker of a pool."""
        return self.pool(role).tensor_parallel or self.engine.tensor_parallel

    def scaled(self, counts: Mapping[WorkerRole, int]) -> ClusterConfig:
        """The same cluster with other numbers of workers. Raises: ConfigError: out of bounds, or nobody could serve."""
        tree = self.model_dump()
        for role, replicas in counts.items():
            least, most = self.bounds(role)
            if not least <= replicas <= most:
                raise ConfigError(
                    f"{role}: got {replicas} workers, wanted: {least} to {most}; change {role}.min or {role}.max to "
                    "allow more or fewer"
                )
            tree[role]["replicas"] = replicas
        return _validate(tree, "")


def fields(model: type[BaseModel] = ClusterConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key by its dotted path, with pydantic's field: ("engine.block_size", FieldInfo)."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def load_config(path: Path | None, overrides: Mapping[str, object]) -> ClusterConfig:
    """The file's keys with `overrides` (dotted path to value, None means unset) laid over them.

    Raises: ConfigError: the file is missing or not YAML, or a key or value is wrong.
    """
    tree = _read_yaml(path) if path is not None else {}
    for key, value in overrides.items():
        if value is None:
            continue
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{path}: {section}: got {place!r}, wanted keys and values")
        place[name] = value
    return _validate(tree, f"{path}: " if path is not None else "")


def _validate(tree: Mapping[str, Any], where: str) -> ClusterConfig:
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(where + "; ".join(_explain(row) for row in error.errors())) from error


class _EachKeyOnce(yaml.SafeLoader):
    """YAML would let the last one of equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} stands there twice", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, wanted keys and values; see docs/configuration.md")
    return tree


def _explain(row: Mapping[str, Any]) -> str:
    """One pydantic error as: key path, what was got, what was wanted."""
    key = ".".join(str(part) for part in row["loc"])
    if row["type"] == "extra_forbidden":
        names = [name for name, _ in fields()]
        sections = {name.rpartition(".")[0] for name in names if "." in name}
        near = difflib.get_close_matches(key, [*sections, *names], n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; see docs/configuration.md")
    wanted = row["msg"].removeprefix("Value error, ")
    if not key:
        return str(wanted)
    return f"{key}: got {row['input']!r}, wanted: {wanted.removeprefix('Input should be ')}"
