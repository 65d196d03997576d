"""What a person sees of a cluster that starts or changes: a live table on a terminal, one line a change elsewhere."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.live import Live

from ..core.errors import Unavailable
from .absent import stuck
from .status import Row, cluster_table, member_row, worker_row

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.cluster_handle import ClusterHandle
    from ..deploy.members import ClusterView, MemberFailed
    from ..deploy.throughput import Throughput

REFRESH_S = 0.5
_STUCK_LOOKS = 6  # so often the same before a process is said to have no room


class Screen:
    """What a person sees: a live table on a terminal, one line for each change elsewhere."""

    def __init__(self) -> None:
        self._console = Console()
        self._started = time.monotonic()
        self._live: Live | None = None
        self._seen: dict[str, str] = {}

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        self._console.print(
            f"[dim]{time.monotonic() - self._started:6.1f} s[/]  {text}", highlight=False, soft_wrap=True
        )

    def announce(self, model: str, view: ClusterView, log_dir: Path | str) -> None:
        self.say(f"[green]ready[/]: {model} at [bold]{', '.join(view.router_addresses)}[/], logs in {log_dir}")
        if view.http_addresses:
            urls = ", ".join(f"http://{address}/v1" for address in view.http_addresses)
            self.say(f"OpenAI API at [bold]{urls}[/]")
        self.say('try: [bold]splitserve generate "The capital of France is"[/]')

    def show(self, view: ClusterView, throughput: Throughput | None = None) -> None:
        rows = _rows(view, throughput)
        if self._live is not None:
            self._live.update(cluster_table(rows, view.routers), refresh=True)
            return
        for row in rows:
            if self._seen.get(row.name) != row.state:
                self._seen[row.name] = row.state
                self.say(" ".join(filter(None, (row.name, row.state, row.address, row.note))))

    def know(self, view: ClusterView) -> None:
        """Do not tell what is so already."""
        self._seen.update({row.name: row.state for row in _rows(view, None)})

    def show_log(self, error: MemberFailed) -> None:
        if error.log_tail:
            self._console.print(f"[dim]the end of {error.log_path}:[/]", highlight=False)
            self._console.print(error.log_tail.rstrip(), markup=False, highlight=False)
        typer.secho(f"error: {error.message}", fg="red", err=True)


async def follow(handle: ClusterHandle, screen: Screen) -> ClusterView:
    """Show how the cluster changes until everything is as it should be, or cannot become so; returns the last view.

    Raises: Unavailable: a process has no room, or stays down.
    """
    looks = 0
    screen.know(await handle.view())
    with screen:
        while True:
            view = await handle.view()
            screen.show(view)
            if view.settled:
                return view
            rest = [m for m in view.members if m.phase.value != "ready"]
            stay_down = stuck(view)
            looks = looks + 1 if stay_down and len(stay_down) == len(rest) else 0
            if looks == _STUCK_LOOKS:
                raise Unavailable("; ".join(f"{m.name}: {m.reason}" for m in stay_down))
            await asyncio.sleep(REFRESH_S)


def check_none_is_stuck(view: ClusterView) -> None:
    """Raises: Unavailable: a process stays down until somebody does something."""
    if stay_down := stuck(view):
        down = [f"{m.name}: {m.phase.value}, {m.reason}" for m in stay_down]
        failed = " ".join(m.name for m in stay_down if m.phase.value == "failed")
        raise Unavailable("; ".join([*down, *([f"`splitserve restart {failed}` tries again"] if failed else [])]))


def _rows(view: ClusterView, throughput: Throughput | None) -> list[Row]:
    """One row a process: the router's word on a worker once it has one, the controller's before."""
    seen = {worker.address: worker for router in view.routers for worker in router.workers}
    rows = []
    for member in view.members:
        note = f"restarted {member.num_restarts} times" if member.num_restarts else ""
        worker = seen.get(member.endpoint.address) if member.endpoint else None
        rate = throughput.tokens_per_s(member.name) if throughput is not None else None
        if worker is not None and member.phase.value == "ready":
            rows.append(worker_row(member.name, worker, rate, note))
        else:
            rows.append(member_row(member, note))
    return rows
