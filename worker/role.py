"""What a role is to the host that it runs on, and how a host takes another one without loading its model again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..core.errors import InvalidRequest, Unavailable
from ..engine.attention import KvWritten
from ..engine.outputs import StepOutput
from .options import Role

if TYPE_CHECKING:
    from ..core.errors import Draining
    from .host import WorkerHost
    from .options import WorkerOptions

logger = logging.getLogger(__name__)

SWITCHABLE: tuple[Role, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who one sequence of the engine belongs to."""

    sequence_id: str  # the engine's name of the attempt
    request_id: str
    attempt: int
    router_id: str
    age_s: float  # since the worker was asked
    lease_left_s: float | None = None  # of KV that waits to be fetched


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleHooks:
    """What the host calls; on the event loop, but for `kv_written`."""

    services: tuple[str, ...]  # full names
    on_step: Callable[[StepOutput], None]  # after every engine step
    hand_over: Callable[[Draining], None]  # end every run with this error
    close: Callable[[], Awaitable[None]]  # free what is left; the host goes on
    holders: Callable[[], Iterable[Holder]]  # who asked for what it runs
    kv_written: KvWritten | None = None  # to send KV away; called on the device thread


class MakeRole(Protocol):
    """Puts a role, with its gRPC edge, on a host that has none."""

    def __call__(self, options: WorkerOptions, host: WorkerHost) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """How a change of role went."""

    switch_s: float  # after the drain, until the new role served
    num_handed_over: int


class RoleSwitch:
    """Changes what a host does. Model, KV pool and prefix cache stay; what names the old role does not.

    Args: roles: how each role is made; composed above the roles, which do not know each other.
    """

    def __init__(self, host: WorkerHost, roles: Mapping[Role, MakeRole]) -> None:
        self._host = host
        self._roles = roles
        self._one_at_a_time = asyncio.Lock()

    async def to(self, role: Role, grace_s: float) -> Switched:
        """Drain, then serve as `role`, under a new boot id; a worker that has this role already just goes on.

        Raises: InvalidRequest: it cannot. Unavailable: it could not let go of its requests; it goes on as it was.
        """
        host = self._host
        async with self._one_at_a_time:
            if role == host.options.role:
                return Switched(switch_s=0.0, num_handed_over=0)
            self._refuse(role)
            drained = await host.drain(grace_s)
            if drained.num_left:
                await host.undrain()
                raise Unavailable(
                    f"worker {host.identity.worker_id} still holds {drained.num_left} requests and stays a "
                    f"{host.options.role} worker; try again, or restart it"
                )
            began_s = time.monotonic()
            try:
                await host.leave_role(role)
                self._roles[role](host.options, host)
            except BaseException as error:
                host.fault = f"its change to {role} failed ({error!r}); restart it"
                raise
            await host.undrain()
            switch_s = time.monotonic() - began_s
            logger.info("a %s worker now, after %.3f s", role, switch_s)
            return Switched(switch_s=switch_s, num_handed_over=drained.num_handed_over)

    def _refuse(self, role: Role) -> None:
        options = self._host.options
        if role not in self._roles or role not in SWITCHABLE or options.role not in SWITCHABLE:
            raise InvalidRequest(
                f"a {options.role} worker cannot become a {role} worker: only prefill and decode workers change into "
                "each other",
                field="role",
            )
        if options.engine.tensor_parallel > 1:
            raise InvalidRequest(
                f"a worker of {options.engine.tensor_parallel} ranks cannot change its role: start it anew as {role}",
                field="role",
            )
