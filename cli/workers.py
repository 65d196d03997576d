"""Which worker an operator means, by address or by name, and the way to its WorkerAdmin service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from ..client import Client
from ..client.address import find_routers
from ..client.routers import find_tls
from ..core.errors import ConfigError
from ..proto import worker_pb2_grpc
from ..proto.rpc import from_rpc_error
from ..proto.tls import PeerRole, open_blocking_channel


def find_worker(worker: str, routers: str | None = None) -> str:
    """The address of `worker`: HOST:PORT as it is, a name as the router knows it.

    Raises: ConfigError: no worker has this name.
    """
    if ":" in worker:
        return worker
    router = find_routers(routers)[0]
    with Client(router, tls=find_tls(role=PeerRole.OPERATOR)) as client:
        known = {view.worker_id: view.address for view in client.status().workers if view.worker_id}
    if worker not in known:
        names = ", ".join(sorted(known)) or "none"
        raise ConfigError(f"the router at {router} knows no worker {worker!r}; it knows: {names}; or give HOST:PORT")
    return known[worker]


@contextmanager
def worker_admin(address: str) -> Iterator[worker_pb2_grpc.WorkerAdminStub]:
    """The admin service of the worker there. Raises: SplitserveError: a call of it failed."""
    tls = find_tls(role=PeerRole.OPERATOR)
    with open_blocking_channel(address, tls, PeerRole.WORKER) as channel:
        try:
            yield worker_pb2_grpc.WorkerAdminStub(channel)
        except grpc.RpcError as error:
            typed = from_rpc_error(error)
            raise type(typed)(f"the worker at {address}: {typed.message}") from error
