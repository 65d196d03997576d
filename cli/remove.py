"""`splitserve remove`: drains workers of the running cluster by name and takes them out of their pools."""

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
    """Drain workers of the running cluster and take them out: their pools are that much smaller afterwards.

    Use it before a node goes away; `splitserve scale` lets the controller choose the worker.

    $ splitserve remove decode-3
    """

    async def remove(handle: ClusterHandle) -> None:
        for name in names:
            await handle.drain(name, restart=False)
        await follow(handle, Screen())
        print(f"{', '.join(names)}: drained and removed")

    run(remove, ray_address, namespace)
