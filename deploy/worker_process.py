"""A worker process from its first line to its last: composed of the roles that it can have, served, drained, ended."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping

from ..decode_worker.server import DecodeServer
from ..prefill_worker.server import PrefillServer
from ..proto.server import Ready, run
from ..worker.host import WorkerHost
from ..worker.options import Role, WorkerOptions
from ..worker.role import MakeRole, RoleSwitch
from ..worker.watchdog import Watchdog

ROLES: Mapping[Role, MakeRole] = {"prefill": PrefillServer, "decode": DecodeServer, "colocated": DecodeServer}


async def serve_async(options: WorkerOptions, ready: Callable[[Ready], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called once the address answers."""
    host = WorkerHost(options)
    host.take_signals()
    host.switch = RoleSwitch(host, ROLES)
    watchdog = Watchdog(lambda: host.stuck, options.stall_bound_s)
    try:
        ROLES[options.role](options, host)
        told = await host.start()
        watchdog.start()
        if ready is not None:
            ready(told)
        await host.run_until_signalled()
    finally:
        await host.stop()
        watchdog.stop()


def serve(options: WorkerOptions, ready: Callable[[Ready], None] | None = None) -> None:
    """Run a worker in this process. Raises: SplitserveError: it cannot start."""
    run(serve_async(options, ready))
    if options.engine.tensor_parallel > 1:
        # Its ranks are gone, and on GPUs a communicator whose peers are gone may never close.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
