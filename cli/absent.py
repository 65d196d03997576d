"""Processes of the running cluster that no router lists, since they do not run: what its controller tells of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from ..core.errors import SplitserveError
from .attached import attached, running_state

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.cluster_handle import ClusterHandle
    from ..deploy.members import ClusterView, Member

_VIEW_S = 5.0  # a controller that was just killed answers later; routers can be asked meanwhile


def find_view() -> ClusterView | None:
    """The word of the controller of the cluster that `up` started here; None: there is none.

    None too, with a warning, where it cannot be asked: what routers tell does without it.
    """
    if running_state() is None:
        return None

    async def ask(handle: ClusterHandle) -> ClusterView:
        async with asyncio.timeout(_VIEW_S):
            return await handle.view()

    try:
        with attached() as handle:
            return asyncio.run(ask(handle))
    except SplitserveError as error:
        why = error.message
    except TimeoutError:
        why = f"it does not answer within {_VIEW_S:g} s"
    except ModuleNotFoundError as error:
        why = f"this needs {error.name}, which is not installed"
    typer.secho(f"warning: the controller cannot be asked for processes that are down: {why}", fg="yellow", err=True)
    return None


def absent(view: ClusterView) -> Sequence[Member]:
    """Those that start, wait or stay down."""
    return [member for member in view.members if member.endpoint is None]


def stuck(view: ClusterView) -> Sequence[Member]:
    """Those that stay down until somebody does something."""
    return [member for member in view.members if member.phase.value in ("no room", "failed")]


def reason_of(member: Member) -> str:
    """In one line: of what Ray says of a lost actor, the first."""
    return member.reason.partition("\n")[0]
