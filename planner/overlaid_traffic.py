"""A trace at a larger scale: many tenants, each replaying its own stretch of it at its own pace; they come and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..core.errors import ConfigError
from .types import SimRequest

_TENANT_IDS = 1 << 32  # hash ids of one tenant; tenants share no prompts


def overlay(
    trace: Sequence[SimRequest],
    *,
    num_tenants: int,
    duration_s: float,
    load: Callable[[float], float] = lambda at_s: 1.0,
    seed: int = 0,
) -> list[SimRequest]:
    """Requests of all tenants in order of arrival.

    Speeding a trace up would also shorten the pauses between the turns of a conversation; this keeps them. Tenant k
    begins at a random place of the trace, goes round at its end, and is silent while `load` (0 to 1) is at most
    k / num_tenants: so the rate follows `load`.
    """
    if not trace or num_tenants < 1 or duration_s <= 0:
        raise ConfigError(
            f"an overlay of {num_tenants} tenants over {duration_s:g} s of {len(trace)} requests is empty; all three "
            "must be above 0"
        )
    times = np.array([request.arrival_s for request in trace])
    order = np.argsort(times, kind="stable")
    times = times[order] - times[order[0]]
    span_s = float(times[-1]) * len(trace) / max(1, len(trace) - 1)  # with the gap from the last to the first again
    starts = np.random.default_rng(seed).uniform(0, span_s, num_tenants)
    found: list[SimRequest] = []
    for tenant, start_s in enumerate(starts.tolist()):
        share = tenant / num_tenants
        first, lap = int(np.searchsorted(times, start_s)), 0
        while True:
            if first == len(order):
                first, lap = 0, lap + 1
            at_s = float(times[first]) + lap * span_s - start_s
            if at_s >= duration_s:
                break
            if load(at_s) > share:
                request = trace[order[first]]
                base = (tenant * 1024 + lap) * _TENANT_IDS  # a second time round is another conversation
                ids = tuple(base + hash_id for hash_id in request.hash_ids)
                found.append(replace(request, arrival_s=at_s, hash_ids=ids))
            first += 1
    return sorted(found, key=lambda request: request.arrival_s)
