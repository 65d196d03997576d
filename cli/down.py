"""`splitserve down`: stops the local cluster that `splitserve up` started, in the foreground or not."""

from __future__ import annotations

import os
import select
import signal
from typing import Annotated

import typer

from ..core.errors import SplitserveError
from ..deploy.claim import forget_killed_cluster, local_cluster_pid


def command(
    timeout: Annotated[float, typer.Option(help="Seconds to wait; running requests are drained meanwhile.")] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="Kill it at once, without draining.")] = False,
) -> None:
    """Stop the cluster that `splitserve up` started on this machine, and wait until it is gone.

    $ splitserve down

    $ splitserve down --force
    """
    pid = local_cluster_pid()
    if pid is None:
        forget_killed_cluster()
        print("no local cluster is running")
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:  # it ended just now
        print("the cluster has stopped")
        return
    try:
        # The kernel ends Ray, and Ray the workers, when their parent is killed.
        signal.pidfd_send_signal(process, signal.SIGKILL if force else signal.SIGTERM)
        ended, _, _ = select.select([process], [], [], timeout)
    finally:
        os.close(process)
    if not ended:
        raise SplitserveError(f"process {pid} still runs after {timeout:g} s; `splitserve down --force` kills it")
    forget_killed_cluster()
    print("the cluster has stopped")
