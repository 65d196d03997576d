"""Tokens per second of each worker, from two readings of the counters that its /metrics serves."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 0.3
_COUNTERS = frozenset({"splitserve_prompt_tokens_total", "splitserve_output_tokens_total"})


class Throughput:
    """Call `measure` now and then; `tokens_per_s` tells the rate between the last two calls."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, float]] = {}  # name -> (when, tokens computed or sampled since its start)
        self._rates: dict[str, float] = {}

    def tokens_per_s(self, name: str) -> float | None:
        """None until the worker was read twice."""
        return self._rates.get(name)

    async def measure(self, metrics_addresses: Mapping[str, str]) -> None:
        totals = await asyncio.gather(*(asyncio.to_thread(_read, a) for a in metrics_addresses.values()))
        now = time.monotonic()
        for name, total in zip(metrics_addresses, totals, strict=True):
            if total is None:
                continue
            before = self._totals.get(name)
            if before is not None and total >= before[1] and now > before[0]:  # fewer: it was restarted
                self._rates[name] = (total - before[1]) / (now - before[0])
            self._totals[name] = (now, total)


def _read(address: str) -> float | None:
    """None if it does not answer in time."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
    except OSError:
        return None
    families = text_string_to_metric_families(text)
    return sum(sample.value for family in families for sample in family.samples if sample.name in _COUNTERS)
