"""`splitserve keys`: what a file of API keys holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..router.key_file import read_keys

KeyFile = Annotated[
    Path, typer.Option("--file", envvar="SPLITSERVE_API_KEY_FILE", help="The routers' file (router.api_key_file).")
]


def command(file: KeyFile = Path("keys.yaml")) -> None:
    """List the keys of a file, with their scopes and limits; `splitserve keys new NAME` adds one.

    To revoke a key, delete its entry from the file: routers notice at the next call.

    $ splitserve keys --file keys.yaml

    $ splitserve keys new alice --max-concurrent 8
    """
    table = Table(header_style="bold", box=None)
    for title in ("name", "scopes"):
        table.add_column(title, no_wrap=True)
    for title in ("weight", "requests/min", "tokens/min", "concurrent"):
        table.add_column(title, justify="right", no_wrap=True)
    for key in read_keys(file).values():
        limits = (key.max_requests_per_min, key.max_tokens_per_min, key.max_concurrent)
        scopes = ", ".join(sorted(scope.value for scope in key.scopes))
        table.add_row(key.name, scopes, f"{key.weight:g}", *("" if each is None else f"{each:,}" for each in limits))
    Console().print(table)
