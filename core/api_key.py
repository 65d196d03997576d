"""Who calls, as the router's key file says: what a key may do, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Scope(Enum):
    """What a key opens."""

    INFERENCE = "inference"  # requests, models, tokenising
    ADMIN = "admin"  # the router's status, its list of workers, its metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key without its secret. Requests carry it, so that admission knows whose they are."""

    name: str  # unique in its file; empty: the router asks for no key
    scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})
    weight: float = 1.0  # share of the cluster beside other keys while they compete for it
    max_requests_per_min: int | None = None  # None: no limit, also below
    max_tokens_per_min: int | None = None  # of prompts and answers together
    max_concurrent: int | None = None  # requests not ended


ANYBODY = ApiKey(name="", scopes=frozenset(Scope))
