"""What moving KV between two workers costs, by where they stand: one host, NVLink, one rack, or further apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RACK_LABEL = "splitserve/rack"
NVLINK_LABEL = "splitserve/nvlink"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker stands. What is empty is unknown, and equal to nobody's."""

    host: str = ""
    rack: str = ""
    nvlink: str = ""  # name of the NVLink domain; one host, or a rack of them

    @classmethod
    def of(cls, host: str, labels: Mapping[str, str]) -> Place:
        """From a worker's host and its labels."""
        return cls(host=host, rack=labels.get(RACK_LABEL, ""), nvlink=labels.get(NVLINK_LABEL, ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCost:
    """Of one kind of link."""

    bytes_per_s: float
    latency_s: float

    def transfer_s(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


# Orders of magnitude, to rank pairs by; measured or sold: CUDA IPC over NVLink 380 GB/s, one copy through shared memory
# at memcpy speed, a 400 Gbit/s port within a rack, and half of it across an oversubscribed spine.
NVLINK = LinkCost(bytes_per_s=300e9, latency_s=1e-3)
SAME_HOST = LinkCost(bytes_per_s=10e9, latency_s=1e-3)
SAME_RACK = LinkCost(bytes_per_s=45e9, latency_s=3e-3)
FAR = LinkCost(bytes_per_s=20e9, latency_s=5e-3)


def link_between(first: Place | None, second: Place | None) -> LinkCost:
    """The best link that two workers have."""
    if first is None or second is None:
        return FAR
    if first.nvlink and first.nvlink == second.nvlink:
        return NVLINK
    if first.rack and first.rack == second.rack and first.host != second.host:
        return SAME_RACK
    if first.host and first.host == second.host:
        return SAME_HOST
    return FAR
