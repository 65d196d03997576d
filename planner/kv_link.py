"""The links that KV travels over: each worker has one side, shared by all its transfers, first come first served.

A side is never idle while it has work: transfers are cut into pieces and many are under way, so one that waits for its
other side does not hold up those behind it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Transit:
    """When some bytes were on the link."""

    started_s: float
    finished_s: float  # the last byte is there


class KvLinks:
    """A piece of KV passes its sender's and its receiver's side; each is busy with it for bytes / bandwidth."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s: defaultdict[str, float] = defaultdict(float)
        self.busy_s: defaultdict[str, float] = defaultdict(float)
        self.num_bytes = 0.0

    def send(self, source: str, target: str, num_bytes: float, *, from_s: float, until_s: float) -> Transit:
        """Send bytes that come into being, layer by layer, from `from_s` to `until_s`."""
        duration_s = num_bytes / self._bytes_per_s
        started_s = from_s
        for side in (source, target):
            begins_s = max(from_s, self._free_at_s[side])
            self._free_at_s[side] = begins_s + duration_s
            self.busy_s[side] += duration_s
            started_s = max(started_s, begins_s)
        self.num_bytes += num_bytes
        return Transit(started_s=started_s, finished_s=max(until_s, started_s + duration_s))
