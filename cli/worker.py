"""What the two worker commands share: their own flags, and the way from configuration to a serving process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import SplitserveError
from ..deploy.process import report_ready
from ..worker.options import Ready, WorkerOptions

Host = Annotated[str, typer.Option(help="Address to listen on; loopback unless you say otherwise.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
MetricsPort = Annotated[int, typer.Option(help="Port of Prometheus /metrics; 0 takes a free one.")]
WorkerId = Annotated[str, typer.Option(help="Name, unique in the cluster.", show_default="role and port")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="as PyTorch finds it")]
ReadyFile = Annotated[
    Path | None, typer.Option(help="Write one JSON line here once it serves: address, metrics_address, pid, boot_id.")
]
Serve = Callable[[WorkerOptions, Callable[[Ready], None] | None], None]


def run_worker(serve: Serve, options: WorkerOptions, ready_file: Path | None) -> None:
    """Serve until a signal. Raises: SplitserveError: it cannot start; the ready file holds the same error."""

    def ready(told: Ready) -> None:
        report_ready(ready_file, asdict(told))
        typer.echo(f"{options.role} worker serves at {told.address}, metrics at http://{told.metrics_address}/metrics")

    try:
        serve(options, ready)
    except SplitserveError as error:
        report_ready(ready_file, {"error": error.code, "message": error.message})
        raise
