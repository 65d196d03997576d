"""`splitserve doctor`: what every worker holds, for whom and since when, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..client import Client
from ..client.address import find_routers
from ..client.results import WorkerView
from ..client.routers import find_tls
from ..core.errors import SplitserveError
from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.tls import PeerRole
from .absent import find_view, stuck
from .diagnosis import Examination, Finding, diagnose, diagnose_stuck
from .workers import worker_admin

_RPC_TIMEOUT_S = 5.0
_PAGE = 500
_REASONS = {
    "waiting": "waits for blocks",
    "running": "being computed",
    "held": "waits to be fetched",
    "reserved": "granted, KV on its way",
}


def command(
    router: Annotated[
        str | None,
        typer.Option(
            envvar="SPLITSERVE_ADDRESS",
            help="Examine the workers of this router, HOST:PORT; left out: of the local cluster that `up` started.",
        ),
    ] = None,
    worker: Annotated[str | None, typer.Option(help="Examine this one worker alone, HOST:PORT.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most sequences to show of a worker, those with most blocks.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what KV blocks are held for, by whom and since when, and what is wrong. Exit code 1: something is.

    Of the cluster that `up` started here, processes that stay down are told too.

    $ splitserve doctor

    $ splitserve doctor --worker 10.0.0.7:7002 --json
    """
    cluster = find_view() if worker is None and router is None else None
    down = stuck(cluster) if cluster is not None else []
    if worker is not None:
        examined = [_examine(worker, worker)]
    else:
        routers = find_routers(router) if cluster is None else cluster.router_addresses
        names = {member.name for member in down}  # a router may remember how one of them was lost
        views = [view for view in _workers(routers) if view.worker_id not in names]
        examined = [_examine(view.worker_id or view.address, view.address, view.reason) for view in views]
    findings = [finding for each in examined for finding in diagnose(each)]
    findings += [diagnose_stuck(member) for member in down]
    if as_json:
        print(json.dumps(_report(examined, findings)))
    else:
        _show(examined, findings, limit)
    if findings:
        raise typer.Exit(1)


def _workers(routers: Sequence[str]) -> Sequence[WorkerView]:
    """As the first of the routers sees them; none where no router is up."""
    if not routers:
        return ()
    with Client(routers[0], tls=find_tls(role=PeerRole.OPERATOR)) as client:
        return client.status().workers


def _examine(name: str, address: str, reason: str = "") -> Examination:
    try:
        with worker_admin(address) as admin:
            told = admin.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=_RPC_TIMEOUT_S)
            pages = list(_pages(admin))
    except SplitserveError as error:
        return Examination(name=name, address=address, failure=reason or error.message)
    return Examination(
        name=told.info.worker_id,
        address=address,
        info=told.info,
        status=told.status,
        holdings=[holding for page in pages for holding in page.holdings],
        num_cached_blocks=pages[-1].num_cached_blocks,
        num_orphaned_blocks=pages[-1].num_orphaned_blocks,
    )


def _pages(admin: worker_pb2_grpc.WorkerAdminStub) -> Iterator[worker_pb2.ListHoldingsResponse]:
    token = ""
    while True:
        request = worker_pb2.ListHoldingsRequest(page_token=token, page_size=_PAGE)
        page = admin.ListHoldings(request, timeout=_RPC_TIMEOUT_S)
        yield page
        token = page.next_page_token
        if not token:
            return


def _show(examined: Sequence[Examination], findings: Sequence[Finding], limit: int) -> None:
    console = Console()
    for each in examined:
        if each.status is None or each.info is None:
            continue
        status, role = each.status, worker_pb2.Role.Name(each.info.role)[5:].lower()
        state = "draining" if status.draining else "stalled" if status.stalled else "serving"
        console.print(
            f"[bold]{each.name}[/] ({role}, {each.address}, {state}): {status.num_blocks:,} KV blocks, "
            f"{status.num_free_blocks:,} free, {each.num_cached_blocks:,} cached, {len(each.holdings):,} sequences"
        )
        if each.holdings:
            console.print(_table(each.holdings, limit))
    for finding in findings:
        console.print(f"[red]{finding.worker}[/]: {escape(f'{finding.what}; {finding.do}')}", soft_wrap=True)
    if not findings:
        console.print(f"{len(examined)} workers, nothing wrong")


def _table(holdings: Sequence[worker_pb2.Holding], limit: int) -> Table:
    shown = sorted(holdings, key=lambda holding: -holding.num_blocks)[:limit]
    rest = f"and {len(holdings) - limit:,} more" if len(holdings) > limit else None
    table = Table(header_style="bold", box=None, caption=rest, caption_justify="left")
    for title in ("request", "router", "why"):
        table.add_column(title, overflow="fold")
    for title in ("blocks", "tokens", "age s", "lease left s"):
        table.add_column(title, justify="right")
    for row in shown:
        table.add_row(
            *(f"{row.request_id or '?'} (attempt {row.attempt})", row.router_id or "?"),
            *(_REASONS.get(row.state, row.state), f"{row.num_blocks:,}", f"{row.num_tokens:,}", f"{row.age_s:.1f}"),
            f"{row.lease_left_s:.1f}" if row.HasField("lease_left_s") else "",
        )
    return table


def _report(examined: Sequence[Examination], findings: Sequence[Finding]) -> dict[str, object]:
    def plain(message: object) -> object:
        return MessageToDict(message, preserving_proto_field_name=True) if message is not None else None  # type: ignore[arg-type]

    return {
        "workers": [
            {
                "name": each.name,
                "address": each.address,
                "failure": each.failure,
                "info": plain(each.info),
                "status": plain(each.status),
                "holdings": [plain(holding) for holding in each.holdings],
                "num_cached_blocks": each.num_cached_blocks,
                "num_orphaned_blocks": each.num_orphaned_blocks,
            }
            for each in examined
        ],
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
