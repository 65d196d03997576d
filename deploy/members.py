"""What the controller tells about its cluster: every process, every pool, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..client.results import RouterStatus
from ..core.config import WORKER_ROLES, Role, WorkerRole
from ..core.errors import SplitserveError
from .process import Endpoint, StartFailure


class Phase(Enum):
    """What the controller is doing with a process."""

    PLACING = "placing"
    UNPLACED = "no room"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    SWITCHING = "changing its role"
    WAITING = "waiting to restart"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of the cluster as the controller sees it."""

    name: str  # says what it was started as first
    role: Role
    phase: Phase = Phase.PLACING
    endpoint: Endpoint | None = None
    num_restarts: int = 0
    reason: str = ""  # why it is not ready, or is not where it should be

    @property
    def index(self) -> int:
        return int(self.name.rpartition("-")[2])

    @property
    def serving(self) -> Endpoint | None:
        """Where it takes new work."""
        return self.endpoint if self.phase is Phase.READY else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """The size of one pool."""

    role: WorkerRole
    wanted: int
    ready: int
    fewest: int  # what scaling may make of it
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """A snapshot. `routers` holds the answer of each router that answers."""

    members: tuple[Member, ...]
    routers: tuple[RouterStatus, ...]
    ready: bool  # everything served at least once
    settled: bool = False  # everything is as it should be: nothing starts, drains, or runs with old settings
    pools: tuple[PoolView, ...] = ()

    @property
    def router_addresses(self) -> tuple[str, ...]:
        return tuple(m.endpoint.address for m in self.members if m.role == "router" and m.endpoint)

    @property
    def http_addresses(self) -> tuple[str, ...]:
        """Of the routers that serve HTTP."""
        return tuple(m.endpoint.http_address for m in self.members if m.endpoint and m.endpoint.http_address)


def role_in(name: str) -> Role | None:
    """What a process of this name is started as; None: it is not one of the cluster's."""
    roles: tuple[Role, ...] = (*WORKER_ROLES, "router")
    return next((role for role in roles if role == name.rpartition("-")[0]), None)


class MemberFailed(SplitserveError):
    """A process did not come up; `log_tail` is the end of what it wrote, if it wrote anything."""

    code = "internal"

    def __init__(self, message: str, *, log_path: str = "", log_tail: str = "") -> None:
        super().__init__(message)
        self.log_path = log_path
        self.log_tail = log_tail

    @classmethod
    def of(cls, name: str, failure: StartFailure) -> MemberFailed:
        return cls(f"{name} did not start: {failure.message}", log_path=failure.log_path, log_tail=failure.log_tail)
