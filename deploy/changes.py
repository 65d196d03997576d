"""The difference between two configurations of a cluster, as people read it and as the controller carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.config import WORKER_ROLES, ClusterConfig, Role, fields
from ..core.errors import ConfigError
from .members import Member, Phase
from .roles import get, role_keys

NOTHING_CHANGES = "nothing changes"

# The controller, workers and routers must agree on these at every moment, or they belong to Ray: they change with the
# cluster.
_FIXED = (
    *("model", "ray.address", "ray.namespace", "engine.dtype", "log_dir"),
    *("security.ca", "security.cert", "security.key"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What applying another configuration does."""

    keys: tuple[tuple[str, object, object], ...]  # key, what it was, what it becomes
    added: Mapping[Role, int]
    removed: Mapping[Role, int]
    restarted: tuple[Role, ...]  # roles whose processes get other settings

    def __str__(self) -> str:
        lines = [f"{key}: {_text(before)} -> {_text(after)}" for key, before, after in self.keys]
        lines += [f"starts {_count(number, role)}" for role, number in self.added.items()]
        lines += [f"drains and removes {_count(number, role)}" for role, number in self.removed.items()]
        lines += [f"restarts every {_noun(role)}, one after another" for role in self.restarted]
        return "\n".join(lines) or NOTHING_CHANGES


def changes(running: ClusterConfig, wanted: ClusterConfig) -> Changes:
    """Raises: ConfigError: a key differs that cannot change while the cluster runs."""
    keys = []
    for key, _ in fields():
        before, after = get(running, key), get(wanted, key)
        if before == after:
            continue
        if key in _FIXED:
            raise ConfigError(
                f"{key} is {_text(before)} in the running cluster, and {_text(after)} is wanted; this cannot "
                "change while the cluster runs: `splitserve down`, then `splitserve up`"
            )
        keys.append((key, before, after))
    counts: dict[Role, tuple[int, int]] = {
        **{role: (running.replicas(role), wanted.replicas(role)) for role in WORKER_ROLES},
        "router": (running.router.replicas, wanted.router.replicas),
    }
    changed = {key for key, _, _ in keys}
    return Changes(
        keys=tuple(keys),
        added={role: after - before for role, (before, after) in counts.items() if after > before},
        removed={role: before - after for role, (before, after) in counts.items() if after < before},
        restarted=tuple(role for role, numbers in counts.items() if all(numbers) and changed & _keys_of(role)),
    )


def _keys_of(role: Role) -> set[str]:
    """Keys that a process of the role is started with."""
    if role == "router":
        return set(role_keys(role))
    own = ("threads", "tensor_parallel", "gpus", "accelerator_type", "labels", "resources", "env")
    return {*role_keys(role), "worker_host", *(f"{role}.{name}" for name in own)}


def least_useful(members: Sequence[Member], count: int, num_running: Mapping[str, int]) -> Sequence[Member]:
    """The members of a pool to remove: those that do not serve, then those that run least, then the newest.

    `num_running`: sequences by the worker's address.
    """

    def use(member: Member) -> tuple[bool, int, int]:
        running = num_running.get(member.endpoint.address, 0) if member.endpoint else 0
        return member.phase is Phase.READY, running, -member.index

    return sorted(members, key=use)[:count]


def _count(number: int, role: Role) -> str:
    return f"{number} {_noun(role)}{'s' if number > 1 else ''}"


def _noun(role: Role) -> str:
    return role if role == "router" else f"{role} worker"


def _text(value: object) -> str:
    return "empty" if value is None else str(value)
