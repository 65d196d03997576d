"""`splitserve status`, and the table of a cluster that `splitserve up` shows too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..client import Client
from ..client.results import RouterStatus, WorkerView
from ..client.routers import find_tls
from ..proto.tls import PeerRole
from . import options
from .absent import absent, find_view, reason_of

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.members import Member

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


def member_row(member: Member, note: str = "") -> Row:
    """A process as the controller sees it; of one that failed, why, and where to read more."""
    reason = reason_of(member)
    if member.phase.value == "failed":
        reason = f"{reason}; see `{_log(member)}`"
    address = member.endpoint.address if member.endpoint else ""
    return Row(name=member.name, role=member.role, state=member.phase.value, address=address, note=reason or note)


def _log(member: Member) -> str:
    return f"splitserve logs {member.name}"


def cluster_table(rows: Sequence[Row], routers: Sequence[RouterStatus]) -> Table:
    """Every process, and below them what the routers count."""
    table = Table(header_style="bold", box=None, caption=_counts(routers) if routers else None, caption_justify="left")
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
            *(row.address, escape(row.note)),
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

    Of the cluster that `up` started here, also the processes that do not run, and why, as its controller tells.

    $ splitserve status

    $ splitserve status --address 10.0.0.5:50051 --json
    """
    view = find_view() if address is None else None
    down = absent(view) if view is not None else []
    routers = options.find_routers(address) if view is None else view.router_addresses
    status = None
    if routers:  # otherwise the only one is down
        with Client(routers[0], tls=find_tls(role=PeerRole.OPERATOR)) as client:
            status = client.status()
    if as_json:
        report: Mapping[str, object] = {
            "router": routers[0] if routers else None,
            **(dataclasses.asdict(status) if status is not None else {"workers": []}),
            "not_running": [_report(member) for member in down] if view is not None else None,
        }
        print(json.dumps(report))
        return
    rows = []
    if status is not None:
        rows.append(Row(name=status.router_id or "router", role="router", state="ready", address=routers[0]))
        names = {member.name for member in down}  # a router may remember how one of them was lost
        rows += [worker_row(w.worker_id or "?", w) for w in status.workers if w.worker_id not in names]
        rows += [member_row(member) for member in down]
    elif view is not None:
        rows += [member_row(member) for member in view.members]
    Console().print(cluster_table(rows, [status] if status is not None else []))


def _report(member: Member) -> Mapping[str, object]:
    return {
        "name": member.name,
        "role": member.role,
        "state": member.phase.value,
        "reason": reason_of(member),
        "num_restarts": member.num_restarts,
        "log": _log(member),
    }
