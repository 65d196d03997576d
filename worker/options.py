"""Options of one worker process, whatever its role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..engine.options import EngineOptions
from ..proto.tls import Tls

Role = Literal["prefill", "decode", "colocated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """One worker process. `port` and `metrics_port` 0 take free ports."""

    engine: EngineOptions
    role: Role
    model_name: str = ""  # name that requests ask for; empty takes engine.model
    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    kv_address: str = ""  # where decode workers reach this prefill worker; empty: host and port
    labels: Mapping[str, str] = field(default_factory=dict)  # where it stands: splitserve/rack, splitserve/nvlink
    local_prefill: bool = False  # a decode worker computes short prompts by itself when a router tells it to
    worker_id: str = ""  # unique in the cluster; empty makes one
    transports: tuple[str, ...] = ("cuda_ipc", "shared_memory", "grpc")  # how KV may move, best first
    kv_codec: Literal["none", "fp8", "int8", "auto"] = "none"  # of KV that a decode worker fetches
    trace_dir: Path | None = None
    drain_timeout_s: float = 30.0  # how long SIGTERM waits for running requests
    lease_s: float = 30.0  # finished KV is held this long without a sign of life from its receiver
    tls: Tls | None = None  # of this worker, towards routers and other workers; None: plain text
    stall_bound_s: float = 8.0  # work queued and no step finished for this long: unhealthy; twice that: it ends itself
