"""The command line of each role, both ways: a flag to its key in the configuration, a configuration to a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.config import WORKER_ROLES, ClusterConfig, Role, fields

_ENGINE = tuple(key for key, _ in fields() if key.startswith("engine."))
_ROUTER = tuple(key for key, _ in fields() if key.startswith("router.") and key != "router.replicas")

# glibc gives big buffers back to the kernel at once; keeping them makes bulk transfer 20 to 55 % faster.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one process asks of its node."""

    num_cpus: int
    num_gpus: int
    labels: Mapping[str, str]
    num_ranks: int = 1  # processes that share a worker's model

    @property
    def num_threads(self) -> int:
        """Of one process."""
        return self.num_cpus // self.num_ranks

    def bundle(self) -> dict[str, float]:
        resources = {"CPU": float(self.num_cpus), "GPU": float(self.num_gpus)}
        return {name: amount for name, amount in resources.items() if amount}

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in self.bundle().items()]
        parts += [f"label {name}={value}" for name, value in self.labels.items()]
        return ", ".join(parts)


def role_needs(config: ClusterConfig, role: Role) -> Needs:
    """One core for each thread; a router is one thread. A worker's ranks are one bundle, so they share a node."""
    if role == "router":
        return Needs(num_cpus=1, num_gpus=0, labels={})
    pool, ranks = config.pool(role), config.engine.tensor_parallel
    threads = pool.threads or default_threads(config)
    return Needs(num_cpus=ranks * threads, num_gpus=pool.gpus, labels=pool.labels, num_ranks=ranks)


def flag(key: str) -> str:
    """--max-running of "engine.max_running"."""
    return "--" + key.rpartition(".")[2].replace("_", "-")


def role_keys(role: Role) -> tuple[str, ...]:
    """Keys of the configuration that a role's own process takes as flags."""
    if role == "router":
        return ("model", *_ROUTER, "drain_timeout_s", "trace_dir")
    codec = () if role == "prefill" else ("kv_codec",)  # the decode worker asks for it, grant by grant
    return ("model", *_ENGINE, "transport", *codec, "lease_s", "drain_timeout_s", "trace_dir")


def role_command(
    config: ClusterConfig,
    role: Role,
    *,
    name: str,
    host: str,
    port: int,
    num_threads: int,
    http_port: int = -1,
) -> Sequence[str]:
    """The command that starts one process; it can be pasted into a shell.

    `host` may be "{node_ip}": the node that runs it fills it in. `http_port` is a router's.
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
    num_processes = config.engine.tensor_parallel * sum(config.replicas(role) for role in WORKER_ROLES)
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def get(config: ClusterConfig, key: str) -> object:
    """The value at a dotted path."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
