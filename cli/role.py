"""What the commands of single processes share: their own flags, and the way from options to a serving process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import typer

from ..core.errors import ConfigError, SplitserveError
from ..core.garbage import garbage
from ..deploy.process import report_ready

Host = Annotated[
    str,
    typer.Option(
        help="Address to listen on; loopback unless you say otherwise.",
        show_default="worker_host of the file, or 127.0.0.1",
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
MetricsPort = Annotated[int, typer.Option(min=0, max=65535, help="Port of Prometheus /metrics; 0 takes a free one.")]
WorkerId = Annotated[str, typer.Option(help="Name, unique in the cluster.", show_default="role and port")]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Where it stands, for routing: splitserve/rack=NAME, splitserve/nvlink=NAME; repeatable.",
        show_default="none",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="as PyTorch finds it")]
ReadyFile = Annotated[
    Path | None,
    typer.Option(help="Write one JSON line here once it serves: address, metrics_address, http_address, pid, boot_id."),
]


class Ready(Protocol):
    """What router and workers tell once they serve."""

    @property
    def address(self) -> str: ...
    @property
    def metrics_address(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def boot_id(self) -> str: ...
    @property
    def http_address(self) -> str: ...


Options = TypeVar("Options")


def read_labels(given: Sequence[str]) -> dict[str, str]:
    """Raises: ConfigError: one is not KEY=VALUE."""
    labels: dict[str, str] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not (key and separator and value):
            raise ConfigError(f"--label: got {text!r}, wanted KEY=VALUE, such as splitserve/rack=r1")
        labels[key] = value
    return labels


def run_role(
    name: str,
    serve: Callable[[Options, Callable[[Ready], None]], None],
    options: Options,
    ready_file: Path | None,
) -> None:
    """Serve until a signal. Raises: SplitserveError: it cannot start; the ready file holds the same error."""

    def ready(told: Ready) -> None:
        row = {"address": told.address, "metrics_address": told.metrics_address, "http_address": told.http_address}
        report_ready(ready_file, {**row, "pid": told.pid, "boot_id": told.boot_id})
        http = f"OpenAI API at http://{told.http_address}/v1, " if told.http_address else ""
        print(f"{name} at {told.address}, {http}metrics at http://{told.metrics_address}/metrics", flush=True)
        garbage.take_over()

    try:
        serve(options, ready)
    except SplitserveError as error:
        report_ready(ready_file, {"error": error.code, "message": error.message})
        raise
