"""`splitserve certs`: what a directory of certificates holds."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

Directory = Annotated[Path, typer.Argument(help="Directory of the certificates.")]

_SOON_DAYS = 14


def command(directory: Directory = Path("certs")) -> None:
    """Show the certificates of a directory: roles, hosts, and when they expire; `splitserve certs init` makes some.

    Exit code 1: one has expired.

    $ splitserve certs

    $ splitserve certs init certs --host 10.0.0.5 --host router.example.org
    """
    from ..deploy.certificates import read_certificates

    table = Table(header_style="bold", box=None)
    for title in ("file", "roles", "hosts", "expires"):
        table.add_column(title)
    now, expired = datetime.now(UTC), False
    for each in read_certificates(directory):
        left = each.expires_at - now
        expired |= left.total_seconds() <= 0
        style = "red" if left.total_seconds() <= 0 else "yellow" if left.days < _SOON_DAYS else "default"
        when = f"[{style}]{each.expires_at:%Y-%m-%d %H:%M} UTC[/]"
        table.add_row(each.path.name, ", ".join(each.roles), ", ".join(each.hosts), when)
    Console().print(table)
    if expired:
        raise typer.Exit(1)
