"""`splitserve down`: stops the cluster that `splitserve up` started, in the foreground or not."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import SplitserveError
from ..core.state import remove_state
from ..deploy.claim import forget_killed_cluster, local_cluster_pid
from ..deploy.ray_environment import NoRay
from .attached import Namespace, NoCluster, RayAddress, run, running_state

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.cluster_handle import ClusterHandle

_LOOK_S = 0.3


def command(
    timeout: Annotated[
        float, typer.Option(min=0.0, max=1e7, help="Seconds to wait; running requests are drained meanwhile.")
    ] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="Kill it at once, without draining.")] = False,
    ray_address: RayAddress = None,
    namespace: Namespace = "splitserve",
) -> None:
    """Stop the cluster that `splitserve up` started from this machine, and wait until it is gone.

    $ splitserve down

    $ splitserve down --force

    $ splitserve down --ray-address 10.0.0.5:6379
    """
    state = running_state() if ray_address is None else None
    if ray_address is not None or (state is not None and state.pid == 0):
        try:
            run(lambda handle: _stop(handle, timeout, force), ray_address, namespace)
            outcome = "the cluster has stopped"
        except (NoRay, NoCluster) as error:
            if state is None or (isinstance(error, NoRay) and not force):
                raise
            outcome = "no cluster is running any more"
        if state is not None:
            remove_state()
        print(outcome)
        return
    pid = local_cluster_pid()
    if pid is None:
        forget_killed_cluster()
        print("no cluster is running")
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


async def _stop(handle: ClusterHandle, timeout_s: float, force: bool) -> None:
    """A cluster on a Ray that others run. Raises: SplitserveError: it does not end in time."""
    await handle.stop()
    if force:
        await handle.stop()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                if await handle.outcome() is not None:
                    break
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise SplitserveError(
            f"the cluster still runs after {timeout_s:g} s; `splitserve down --force` does not wait for requests"
        ) from None
    await handle.dismiss()
