"""Who a worker is to its transfer peers, and whether two of them can share memory."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """A worker process. A restarted worker keeps its id and has another boot id."""

    worker_id: str
    boot_id: str
    host_id: str  # equal on both sides: /proc/<pid>/fd of one means the same to the other


def current_host_id() -> str:
    """Host name, boot of the kernel, and the pid and mount name spaces that /proc/<pid>/fd depends on."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [socket.gethostname(), boot.read_text().strip() if boot.exists() else ""]
    for space in ("pid", "mnt"):
        path = f"/proc/self/ns/{space}"
        parts.append(str(os.stat(path).st_ino) if os.path.exists(path) else "")
    return "/".join(parts)
