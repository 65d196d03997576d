"""A cluster of plain processes without Ray, for benchmarks and tests: start, find addresses, stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.config import ClusterConfig, WorkerRole
from ..core.errors import SplitserveError
from ..deploy.process import Endpoint, Exit, RoleProcess, StartFailure
from ..deploy.roles import role_command, role_environment

WORKER_ROLES: tuple[WorkerRole, ...] = ("prefill", "decode", "colocated")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCluster:
    """Addresses of what runs; workers by name, such as "prefill-0"."""

    routers: tuple[Endpoint, ...]
    workers: dict[str, Endpoint]
    restart: Callable[[str, float], Awaitable[Exit]]
    """restart(name, grace_s): stop a worker with SIGTERM, start it anew at the same address; how the old one ended."""

    @property
    def router(self) -> Endpoint:
        """The first one."""
        return self.routers[0]


@asynccontextmanager
async def process_cluster(
    config: ClusterConfig, log_dir: Path, *, num_threads: int = 1, gpus: Mapping[str, int] | None = None
) -> AsyncIterator[ProcessCluster]:
    """Start every worker of `config` in parallel, then its routers; all are killed on the way out.

    Args: gpus: the GPU that each worker, by name, may see.
    Raises: SplitserveError: a process did not start; the end of its log is in the message.
    """
    processes: dict[str, RoleProcess] = {}
    workers: dict[str, Endpoint] = {}

    async def start(name: str, port: int = 0) -> Endpoint:
        command = role_command(config, names[name], name=name, host="127.0.0.1", port=port, num_threads=num_threads)
        devices = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": str(gpus[name])}
        processes[name] = process = RoleProcess(log_dir / f"{name}.log")
        return await _start(process, command, num_threads, config, devices)

    async def restart(name: str, grace_s: float) -> Exit:
        await processes[name].stop(grace_s)
        ended = await processes[name].wait()
        workers[name] = await start(name, int(workers[name].address.rpartition(":")[2]))
        return ended

    async def start_router(name: str) -> Endpoint:
        command = [*role_command(config, "router", name=name, host="127.0.0.1", port=0, num_threads=1, http_port=0)]
        for worker, endpoint in workers.items():
            command += ["--prefill" if names[worker] == "prefill" else "--decode", endpoint.address]
        processes[name] = process = RoleProcess(log_dir / f"{name}.log")
        return await _start(process, command, 1, config, {})

    names = {f"{role}-{index}": role for role in WORKER_ROLES for index in range(config.replicas(role))}
    try:
        workers.update(zip(names, await asyncio.gather(*map(start, names)), strict=True))
        routers = await asyncio.gather(*(start_router(f"router-{n}") for n in range(config.router.replicas)))
        yield ProcessCluster(routers=tuple(routers), workers=workers, restart=restart)
    finally:
        await asyncio.gather(*(process.stop(2.0) for process in processes.values()))


async def _start(
    process: RoleProcess,
    command: Sequence[str],
    threads: int,
    config: ClusterConfig,
    devices: Mapping[str, str],
) -> Endpoint:
    started = await process.start(command, {**role_environment(threads), **devices}, config.startup_timeout_s)
    if isinstance(started, StartFailure):
        raise SplitserveError(f"{started.message}\n{started.log_tail}")
    return started
