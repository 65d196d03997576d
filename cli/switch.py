"""`splitserve switch`: makes a prefill worker a decode worker, or back, without loading its model again."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from ..proto import worker_pb2
from . import options
from .drain import LETTING_GO_S, Worker
from .workers import find_worker, worker_admin

_ROLES = {"prefill": worker_pb2.ROLE_PREFILL, "decode": worker_pb2.ROLE_DECODE}


def command(
    worker: Worker,
    role: Annotated[Literal["prefill", "decode"], typer.Option(help="What it is to be.")],
    timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that what it runs may go on; the rest is handed over.")
    ] = 30.0,
    address: options.Address = None,
) -> None:
    """Change the role of a prefill or decode worker: it drains, keeps its model and its KV pool, and serves on.

    Its routers find it in its new role by themselves, at the same address.

    $ splitserve switch prefill-1 --role decode

    $ splitserve switch 10.0.0.7:7001 --role decode --timeout 0
    """
    at = find_worker(worker, address)
    request = worker_pb2.SwitchRoleRequest(role=_ROLES[role], timeout_s=timeout)
    with worker_admin(at) as admin, Console(stderr=True).status(f"draining {worker}"):
        switched = admin.SwitchRole(request, timeout=timeout + LETTING_GO_S)
    if not switched.switch_s:
        print(f"{worker} was a {role} worker already")
        return
    moved = f"; {switched.num_handed_over} requests went on elsewhere" if switched.num_handed_over else ""
    print(f"{worker} is a {role} worker, {switched.switch_s * 1e3:.0f} ms after it was drained{moved}")
