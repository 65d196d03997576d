"""The command line of each role, both ways: a flag to its key in the configuration, a configuration to a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from ..core.config import ClusterConfig, Role, WorkerRole, fields

_ENGINE = tuple(key for key, _ in fields() if key.startswith("engine."))
_ROUTER = tuple(key for key, _ in fields() if key.startswith("router.") and key != "router.replicas")

# glibc gives big buffers back to the kernel at once; keeping them makes bulk transfer 20 to 55 % faster.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


def flag(key: str) -> str:
    """--max-running of "engine.max_running"."""
    return "--" + key.rpartition(".")[2].replace("_", "-")


def role_keys(role: Role) -> tuple[str, ...]:
    """Keys of the configuration that a role's own process takes as flags."""
    if role == "router":
        return ("model", *_ROUTER, "drain_timeout_s", "trace_dir")
    return ("model", *_ENGINE, "transport", "lease_s", "drain_timeout_s", "trace_dir")


def role_command(
    config: ClusterConfig,
    role: Role,
    *,
    name: str,
    host: str,
    port: int,
    num_threads: int,
) -> Sequence[str]:
    """The command that starts one process; it can be pasted into a shell.

    `host` may be "{node_ip}": the node that runs it fills it in.
    """
    subcommand = {"router": "router", "prefill": "prefill-worker"}.get(role, "decode-worker")
    # Not the console script: the package may be on the path without being installed.
    command = [sys.executable, "-c", "from splitserve.cli.main import main; main()", "-v", subcommand]
    command += ["--host", host, "--port", str(port)]
    if role != "router":
        command += ["--worker-id", name, "--threads", str(num_threads)]
        command += ["--role", role] if role != "prefill" else []
    defaults = ClusterConfig()
    for key in role_keys(role):
        value = get(config, key)
        if value == get(defaults, key) or key in ("router.host", "router.port"):
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
    """Cores shared out among the workers of one host: oversubscribed threads make steps 50 times slower."""
    roles: tuple[WorkerRole, ...] = ("prefill", "decode", "colocated")
    num_workers = sum(config.replicas(role) for role in roles)
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


def get(config: ClusterConfig, key: str) -> object:
    """The value at a dotted path."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
