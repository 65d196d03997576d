"""Which nodes a worker should rather go to: beside the other role's, or away from its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from ..core.config import Role
from .members import Member

_OTHER: dict[Role, Role] = {"prefill": "decode", "decode": "prefill"}


def preferred_nodes(
    role: Role, members: Iterable[Member], nodes: Sequence[str], pairs: Literal["any", "pack", "spread"]
) -> Sequence[str]:
    """Ids of nodes to try first for one more worker of a role; empty: no preference.

    pack: the nodes that hold more of the other role than of this one, since a pair on one host moves KV within it.
    spread: the nodes that hold fewest of this role. `nodes` are those that have what the worker needs.
    """
    if pairs == "any" or role == "router":
        return ()
    placed = [(m.role, m.endpoint.node) for m in members if m.endpoint is not None and m.endpoint.node in nodes]
    own = Counter(node for other, node in placed if other == role)
    if pairs == "spread":
        fewest = min((own[node] for node in nodes), default=0)
        chosen = [node for node in nodes if own[node] == fewest]
        return chosen if len(chosen) < len(nodes) else ()
    partners = Counter(node for other, node in placed if other == _OTHER.get(role))
    return [node for node in nodes if partners[node] > own[node]]
