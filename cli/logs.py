"""`splitserve logs`: what the processes of the running cluster wrote, wherever they run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ConfigError, Unavailable
from .attached import Namespace, RayAddress, run

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.cluster_handle import ClusterHandle

_BYTES_PER_LINE = 200  # a guess, for how much of a file to fetch for its last lines


def command(
    name: Annotated[
        str | None, typer.Argument(help="A process, as `status` shows it, or controller.", show_default="all of them")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    tail: Annotated[int, typer.Option("--tail", "-n", min=0, help="Last lines of each log.")] = 20,
    ray_address: RayAddress = None,
    namespace: Namespace = "splitserve",
) -> None:
    """Show the end of a process's log, or of every one's, each line behind the name of its process.

    $ splitserve logs decode-0 --follow

    $ splitserve logs controller -n 100

    $ splitserve logs
    """

    async def show(handle: ClusterHandle) -> None:
        from ..deploy.controller_actor import NAME

        names = [NAME, *(member.name for member in (await handle.view()).members)]
        if name is not None:
            if name not in names:
                raise ConfigError(f"there is no {name!r}; the cluster has {', '.join(sorted(names))}")
            await _show(handle, name, "", tail, follow)
            return
        width = max(map(len, names))
        async with asyncio.TaskGroup() as group:
            for each in names:
                group.create_task(_show_if_there(handle, each, f"{each:{width}} | ", tail, follow))

    try:
        run(show, ray_address, namespace)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


async def _show_if_there(handle: ClusterHandle, name: str, prefix: str, tail: int, follow: bool) -> None:
    try:
        await _show(handle, name, prefix, tail, follow)
    except Unavailable as error:
        print(f"{prefix}({error.message})", file=sys.stderr)


async def _show(handle: ClusterHandle, name: str, prefix: str, tail: int, follow: bool) -> None:
    pieces = handle.log(name, last_bytes=max(1, tail) * _BYTES_PER_LINE, follow=follow)
    first = True
    async for text in _lines(pieces):
        lines = text.splitlines()
        for line in lines[len(lines) - min(tail, len(lines)) :] if first else lines:
            print(prefix + line, flush=True)
        first = False


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Whole lines, as many as there are at a time."""
    rest = b""
    async for piece in pieces:
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if newline:
            yield whole.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
