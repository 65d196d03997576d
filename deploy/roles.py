"""The command line of each role, both ways: a flag to its key in the configuration, a configuration to a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..core.config import WORKER_ROLES, ClusterConfig, Role, fields

_ENGINE = tuple(key for key, _ in fields() if key.startswith("engine."))
_SECURITY = ("security.ca", "security.cert", "security.key", "security.tls_required")
_ROUTER = tuple(key for key, _ in fields() if key.startswith("router.") and key != "router.replicas")

# glibc gives big buffers back to the kernel at once; keeping them makes bulk transfer 20 to 55 % faster.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one process asks of its node."""

    num_cpus: int
    num_gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)  # of its node; values as Ray's label selectors have them
    resources: Mapping[str, float] = field(default_factory=dict)  # besides CPU and GPU
    num_ranks: int = 1  # processes that share a worker's model

    @property
    def num_threads(self) -> int:
        """Of one process."""
        return self.num_cpus // self.num_ranks

    def bundle(self) -> dict[str, float]:
        resources = {"CPU": float(self.num_cpus), "GPU": float(self.num_gpus), **self.resources}
        return {name: amount for name, amount in resources.items() if amount}

    def on_cpu(self) -> Needs:
        """The same without GPUs, wherever there is a CPU."""
        return Needs(num_cpus=self.num_cpus, num_ranks=self.num_ranks)

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in self.bundle().items()]
        parts += [f"label {name}={value}" for name, value in self.labels.items()]
        return ", ".join(parts)


def role_needs(config: ClusterConfig, role: Role) -> Needs:
    """One core for each thread; a router is one thread. A worker's ranks are one bundle, so they share a node."""
    if role == "router":
        return Needs(num_cpus=1)
    pool, ranks = config.pool(role), config.tensor_parallel(role)
    threads = pool.threads or default_threads(config)
    labels = dict(pool.labels)
    if pool.accelerator_type is not None:
        labels["ray.io/accelerator-type"] = pool.accelerator_type
    return Needs(num_cpus=ranks * threads, num_gpus=pool.gpus, labels=labels, resources=pool.resources, num_ranks=ranks)


def flag(key: str) -> str:
    """--max-running of "engine.max_running"."""
    return "--" + key.rpartition(".")[2].replace("_", "-")


def role_keys(role: Role) -> tuple[str, ...]:
    """Keys of the configuration that a role's own process takes as flags."""
    if role == "router":
        return ("model", *_ROUTER, "drain_timeout_s", "trace_dir", *_SECURITY, "security.http_client_cert")
    # A prefill worker is told the codec too, which decode workers ask for: it may become one.
    return ("model", *_ENGINE, "transport", "kv_codec", "lease_s", "drain_timeout_s", "trace_dir", *_SECURITY)


def role_command(
    config: ClusterConfig,
    role: Role,
    *,
    name: str,
    host: str,
    port: int,
    num_threads: int,
    http_port: int = -1,
    on_cpu: bool = False,
) -> Sequence[str]:
    """The command that starts one process; it can be pasted into a shell.

    `host` may be "{node_ip}": the node that runs it fills it in. `http_port` is a router's. `on_cpu`: a worker that
    would have GPUs does without.
    """
    subcommand = {"router": "router", "prefill": "prefill-worker"}.get(role, "decode-worker")
    # Not the console script: the package may be on the path without being installed.
    command = [sys.executable, "-c", "from splitserve.cli.main import main; main()", "-v", subcommand]
    command += ["--host", host, "--port", str(port)]
    if role == "router":
        command += ["--router-id", name, "--http-port", str(http_port)]
    else:
        command += ["--worker-id", name, "--threads", str(num_threads)]
        command += ["--role", role] if role != "prefill" else []
    defaults = ClusterConfig()
    for key in role_keys(role):
        value = get(config, key)
        if role != "router" and key == "engine.tensor_parallel":
            value = config.tensor_parallel(role)
        if role != "router" and key == "engine.device" and config.pool(role).gpus:
            value = "cpu" if on_cpu else value or "cuda"  # the process itself knows nothing of its pool
        if value == get(defaults, key) or key in ("router.host", "router.port", "router.http_port"):
            continue
        if isinstance(value, bool):
            command.append(flag(key) if value else f"--no-{flag(key)[2:]}")
        else:
            command += [flag(key), str(value)]
    return tuple(command)


def role_environment(num_threads: int) -> Mapping[str, str]:
    """What a role's process needs in its environment before it starts."""
    threads = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    return {**_MALLOC, **threads, "TOKENIZERS_PARALLELISM": "false"}


def default_threads(config: ClusterConfig) -> int:
    """Cores shared out among the workers' processes on one host: oversubscribed threads make steps 50 times slower."""
    num_processes = sum(config.tensor_parallel(role) * config.replicas(role) for role in WORKER_ROLES)
    return max(1, len(os.sched_getaffinity(0)) // max(1, num_processes))


def with_threads(config: ClusterConfig, like: ClusterConfig | None = None) -> ClusterConfig:
    """The same with the threads of every pool stated: those that `like` has, or the host's cores shared out.

    Once stated they stay: another number of workers must not restart those that run.
    """
    shared = default_threads(config)
    changes: dict[str, object] = {}
    for role in WORKER_ROLES:
        pool = config.pool(role)
        if pool.threads is None:
            threads = like.pool(role).threads if like is not None else None
            changes[role] = pool.model_copy(update={"threads": threads or shared})
    return config.model_copy(update=changes)


def get(config: ClusterConfig, key: str) -> object:
    """The value at a dotted path."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
