"""The ranks that hold one model together, and what they compute together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = timedelta(minutes=10)  # of one collective; a lost rank is noticed by its process, long before


@dataclass(slots=True, kw_only=True, eq=False)
class RankGroup:
    """This process's place among the ranks. Every rank calls the same collectives in the same order.

    `store` is a file that all ranks can reach, the meeting point; `meet` is called when this rank's weights are in
    place, and returns when the other ranks may be met.
    """

    rank: int
    size: int
    store: Path
    meet: Callable[[], None] = lambda: None
    device: torch.device = field(default=torch.device("cpu"), init=False)

    @property
    def leads(self) -> bool:
        """Whether this rank schedules and samples."""
        return self.rank == 0

    def connect(self, device: torch.device) -> None:
        """Meet the other ranks: NCCL between GPUs, gloo between CPUs, over loopback and NVLink only."""
        self.meet()
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")  # ranks share a host: nothing listens on other interfaces
        self.device = device
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{self.store}",
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's `part`, in its place; bitwise the same on every rank."""
        part = part.contiguous()
        dist.all_reduce(part)
        return part

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's `part` [..., n] side by side: [..., size * n]."""
        parts = part.new_empty(self.size, *part.shape)
        dist.all_gather(list(parts), part.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def copy_from_leader(self, values: Tensor) -> None:
        """Overwrite `values` with rank 0's."""
        dist.broadcast(values, 0)

    def least(self, value: int) -> int:
        """The smallest of every rank's `value`."""
        values = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return int(values.item())

    def close(self) -> None:
        """Leave, when the other ranks do and what was captured is gone; nothing happens before `connect`."""
        if dist.is_initialized():
            dist.destroy_process_group()
