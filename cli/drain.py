"""`splitserve drain`: takes one worker out of service without losing a request."""

from __future__ import annotations

from typing import Annotated

import grpc
import typer
from rich.console import Console

from ..core.errors import Unavailable
from ..proto import worker_pb2
from . import options
from .workers import find_worker, worker_admin

_RPC_TIMEOUT_S = 5.0
LETTING_GO_S = 10.0  # beyond the grace period
_LOOK_S = 0.5

Worker = Annotated[str, typer.Argument(help="Its name, as `splitserve status` shows it, or HOST:PORT.")]


def command(
    worker: Worker,
    timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that what it runs may go on; the rest is handed over.")
    ] = 30.0,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take work again.")] = False,
    address: options.Address = None,
) -> None:
    """Take a worker out of service: it gets no new work, and what it runs ends there or goes on at another worker.

    It stays up, so that it can be stopped, or put back with --undo. Exit code 1: something could not be let go of.

    $ splitserve drain decode-0

    $ splitserve drain 10.0.0.7:7002 --timeout 0

    $ splitserve drain decode-0 --undo
    """
    at = find_worker(worker, address)
    console = Console(stderr=True)
    with worker_admin(at) as admin:
        if undo:
            admin.Undrain(worker_pb2.UndrainRequest(), timeout=_RPC_TIMEOUT_S)
            print(f"{worker} takes work again")
            return
        draining = admin.Drain.future(worker_pb2.DrainRequest(timeout_s=timeout), timeout=timeout + LETTING_GO_S)
        with console.status(f"draining {worker}") as shown:
            while True:
                try:
                    drained = draining.result(_LOOK_S)
                    break
                except grpc.FutureTimeoutError:
                    status = admin.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=_RPC_TIMEOUT_S).status
                    left = f"{status.num_running} running, {status.num_waiting} waiting, {status.num_held} held"
                    shown.update(f"draining {worker}: {left}")
    if drained.num_left:
        raise Unavailable(f"{worker} still holds {drained.num_left} requests; see its log, or stop it")
    print(f"{worker} is drained; {drained.num_handed_over} requests went on elsewhere. Stop it, or `--undo`")
