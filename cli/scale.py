"""`splitserve scale`: another number of workers in a pool of the running cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..core.config import WORKER_ROLES, WorkerRole
from ..core.errors import ConfigError
from .attached import Namespace, RayAddress, remember_routers, run
from .screen import Screen, follow

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.cluster_handle import ClusterHandle


def command(
    pools: Annotated[
        list[str], typer.Argument(help="POOL=N, such as prefill=4; several at once.", metavar="POOL=N...")
    ],
    wait: Annotated[bool, typer.Option(help="Wait until the workers serve, or are drained and gone.")] = True,
    ray_address: RayAddress = None,
    namespace: Namespace = "splitserve",
) -> None:
    """Change how many workers the pools of the running cluster have, within their min and max.

    New ones take work as soon as they serve; those that go finish what they run first. Where `scaling` is enabled,
    the controller goes on from the new number.

    $ splitserve scale prefill=4

    $ splitserve scale prefill=2 decode=6 --no-wait
    """
    counts = dict(_parse(text) for text in pools)

    async def scale(handle: ClusterHandle) -> None:
        await handle.scale(counts)
        if wait:
            remember_routers(await follow(handle, Screen()))
        sizes = (f"{pool.role} {pool.ready} of {pool.wanted}" for pool in (await handle.view()).pools)
        print("workers that serve: " + ", ".join(sizes))

    run(scale, ray_address, namespace)


def _parse(text: str) -> tuple[WorkerRole, int]:
    """Raises: ConfigError: it is not POOL=N."""
    name, sign, number = text.partition("=")
    role = next((role for role in WORKER_ROLES if role == name), None)
    if role is None or not sign or not number.isdecimal():
        raise ConfigError(f"got {text!r}, wanted POOL=N with one of {', '.join(WORKER_ROLES)}, such as prefill=4")
    return role, int(number)
