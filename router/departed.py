"""Workers that were lost and then taken off the list: the operator still sees them for a while, and why they went."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

KEPT_S = 600.0
MAX_KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DepartedWorker:
    """One of them."""

    address: str
    role: str
    worker_id: str
    reason: str
    gone_at: float  # monotonic


class Departed:
    """The last of them, oldest first. One that serves again, by its name or at its address, is forgotten."""

    def __init__(self) -> None:
        self._workers: dict[str, DepartedWorker] = {}  # by address

    def add(self, *, address: str, role: str, worker_id: str, reason: str, now: float) -> None:
        self._workers.pop(address, None)
        self._workers[address] = DepartedWorker(
            address=address, role=role, worker_id=worker_id, reason=reason, gone_at=now
        )
        if len(self._workers) > MAX_KEPT:
            del self._workers[next(iter(self._workers))]

    def shown(self, *, addresses: Collection[str], worker_ids: Collection[str], now: float) -> list[DepartedWorker]:
        """Those to show beside workers of these addresses and names."""
        self._workers = {
            at: worker
            for at, worker in self._workers.items()
            if at not in addresses and worker.worker_id not in worker_ids and now - worker.gone_at < KEPT_S
        }
        return list(self._workers.values())
