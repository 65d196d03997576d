"""`splitserve restart`: drains processes of the running cluster by name and starts them again, one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .attached import Namespace, RayAddress, run
from .screen import Screen, follow

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.cluster_handle import ClusterHandle


def command(
    names: Annotated[list[str], typer.Argument(help="As `splitserve status` shows them.", metavar="NAME...")],
    ray_address: RayAddress = None,
    namespace: Namespace = "splitserve",
) -> None:
    """Drain processes of the running cluster and start them again, each once the one before serves.

    $ splitserve restart decode-0

    $ splitserve restart prefill-0 prefill-1
    """

    async def restart(handle: ClusterHandle) -> None:
        screen = Screen()
        for name in names:
            await handle.drain(name, restart=True)
            await follow(handle, screen)
            print(f"{name} was drained and serves again")

    run(restart, ray_address, namespace)
