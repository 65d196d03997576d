"""All that one process is started with, made from the configuration; equal launches need no restart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.config import ClusterConfig, Role
from .roles import Needs, role_environment, role_needs


class Command(Protocol):
    """Makes the command line of one process; see roles.role_command."""

    def __call__(
        self,
        config: ClusterConfig,
        role: Role,
        *,
        name: str,
        host: str,
        port: int,
        num_threads: int,
        http_port: int,
        on_cpu: bool,
    ) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One process to be."""

    command: Sequence[str]
    environment: Mapping[str, str]
    needs: Needs

    @property
    def digest(self) -> str:
        """Differs between two launches of one name exactly if their process must be another."""
        needs = [self.needs.bundle(), dict(self.needs.labels)]
        text = json.dumps([list(self.command), dict(self.environment), needs], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make_launch(
    config: ClusterConfig,
    role: Role,
    name: str,
    *,
    command: Command,
    on_cpu: bool = False,
    ports: tuple[int, int] | None = None,
) -> Launch:
    """`on_cpu`: a worker whose GPUs nobody has runs without, anywhere. `ports`: where the configuration has no say."""
    needs = role_needs(config, role)
    port, http_port = _ports(config, role, name)
    if ports is not None:
        port, http_port = port or ports[0], http_port or ports[1]
    words = command(
        config,
        role,
        name=name,
        host=_host(config, role),
        port=port,
        num_threads=needs.num_threads,
        http_port=http_port,
        on_cpu=on_cpu,
    )
    own = config.pool(role).env if role != "router" else {}
    return Launch(
        command=words,
        environment={**role_environment(needs.num_threads), **own},
        needs=needs.on_cpu() if on_cpu else needs,
    )


def _host(config: ClusterConfig, role: Role) -> str:
    if role == "router":
        return config.router.host
    return config.worker_host or ("{node_ip}" if config.ray.address else "127.0.0.1")


def _ports(config: ClusterConfig, role: Role, name: str) -> tuple[int, int]:
    """For gRPC and HTTP: routers have consecutive ports from the configured ones, workers take free ones."""
    if role != "router":
        return 0, -1
    index = int(name.rpartition("-")[2])
    return config.router.port + index if config.router.port else 0, config.router.http_port_of(index)
