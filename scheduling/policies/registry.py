"""Routing policies by name: those of this package, and those that other packages bring as entry points."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import cast

from ...core.errors import ConfigError
from ..routing import RoutingPolicy
from .least_loaded import least_loaded
from .power_of_two import power_of_two
from .prefix import prefix
from .round_robin import round_robin
from .session import session

ENTRY_POINTS = "splitserve.routing_policies"
DEFAULT_POLICY = "prefix"
POLICIES: Mapping[str, RoutingPolicy] = {
    "prefix": prefix,
    "least_loaded": least_loaded,
    "power_of_two": power_of_two,
    "round_robin": round_robin,
    "session": session,
}


def load_policy(name: str) -> RoutingPolicy:
    """A policy of this package, or of the entry point of that name in the group `splitserve.routing_policies`.

    Raises: ConfigError: there is no such policy, or it cannot be imported.
    """
    if (known := POLICIES.get(name)) is not None:
        return known
    others = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in others:
        raise ConfigError(
            f"router.policy: got {name!r}, wanted one of {', '.join([*POLICIES, *sorted(others)])}, or the name of an "
            f"installed entry point in the group {ENTRY_POINTS}"
        )
    try:
        policy = others[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"router.policy: {name!r} is {others[name].value}, which cannot be imported: {error}"
        ) from error
    if not callable(policy):
        raise ConfigError(f"router.policy: {name!r} is {others[name].value}, which is not a function of a snapshot")
    return cast(RoutingPolicy, policy)
