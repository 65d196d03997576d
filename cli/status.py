"""`splitserve status`, and the table of a cluster that `splitserve up` shows too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..client import Client
from ..client.results import RouterStatus, WorkerView
from ..client.routers import find_tls
from ..proto.tls import PeerRole
from . import options

_STATE_STYLES = {"ready": "green", "failed": "red", "refused": "red", "gone": "red", "waiting to restart": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One process in the table; None where it does not apply or is not known."""

    name: str
    role: str
    state: str
    address: str = ""
    num_running: int | None = None
    num_waiting: int | None = None
    kv_use: float | None = None  # 0 to 1
    tokens_per_s: float | None = None
    note: str = ""


def worker_row(name: str, view: WorkerView, tokens_per_s: float | None = None, note: str = "") -> Row:
    """A worker as a router sees it."""
    used = 1 - view.num_available_blocks / view.num_blocks if view.num_blocks else None
    return Row(
        name=name,
        role=view.role,
        state=view.state,
        address=view.address,
        num_running=view.num_running,
        num_waiting=view.num_waiting,
        kv_use=used,
        tokens_per_s=tokens_per_s,
        note=view.reason or note,
    )


def cluster_table(rows: Sequence[Row], routers: Sequence[RouterStatus]) -> Table:
    """Every process, and below them what the routers count."""
    table = Table(header_style="bold", box=None, caption=_counts(routers), caption_justify="left")
    for title in ("process", "role", "state"):
        table.add_column(title, no_wrap=True)
    has_rates = any(row.tokens_per_s is not None for row in rows)  # a router does not count them
    for title in ("running", "waiting", "KV use", *(["tokens/s"] if has_rates else [])):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("address", no_wrap=True)
    table.add_column("")
    for row in rows:
        style = _STATE_STYLES.get(row.state, "yellow")
        table.add_row(
            *(row.name, row.role, f"[{style}]{row.state}[/]"),
            *(_text(row.num_running, "d"), _text(row.num_waiting, "d"), _text(row.kv_use, ".0%")),
            *([_text(row.tokens_per_s, ",.0f")] if has_rates else []),
            *(row.address, row.note),
        )
    return table


def _counts(routers: Sequence[RouterStatus]) -> str:
    names = ("num_queued", "num_live", "num_finished", "num_failed", "num_cancelled")
    queued, live, finished, failed, cancelled = (sum(getattr(router, name) for router in routers) for name in names)
    return (
        f"requests: {live} live, {queued} of them queued, {finished} finished, {failed} failed, {cancelled} cancelled"
    )


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def command(
    address: options.Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the workers of a running cluster as its router sees them, and what it counts.

    $ splitserve status

    $ splitserve status --address 10.0.0.5:50051 --json
    """
    router = options.find_routers(address)[0]
    with Client(router, tls=find_tls(role=PeerRole.OPERATOR)) as client:
        status = client.status()
    if as_json:
        report: Mapping[str, object] = {"router": router, **dataclasses.asdict(status)}
        print(json.dumps(report))
        return
    rows = [Row(name=status.router_id or "router", role="router", state="ready", address=router)]
    rows += [worker_row(view.worker_id or "?", view) for view in status.workers]
    Console().print(cluster_table(rows, [status]))
