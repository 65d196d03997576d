"""`splitserve keys new`: make an API key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.api_key import ApiKey, Scope
from ..router.key_file import add_key
from .keys import KeyFile


def command(
    name: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, dots, dashes; shown in logs.")],
    file: KeyFile = Path("keys.yaml"),
    scope: Annotated[
        list[Scope] | None, typer.Option(help="What it opens; repeatable.", show_default="inference")
    ] = None,
    weight: Annotated[float, typer.Option(help="Share of the cluster beside other keys, while they compete.")] = 1.0,
    max_requests_per_min: Annotated[int | None, typer.Option(help="Requests a minute.", show_default="any")] = None,
    max_tokens_per_min: Annotated[
        int | None, typer.Option(help="Tokens of prompts and answers a minute.", show_default="any")
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests at once.", show_default="any")] = None,
) -> None:
    """Make a key, print it once, and add its SHA-256 to the file; routers that use the file take it at once.

    $ splitserve keys new alice --max-requests-per-min 60

    $ splitserve keys new operator --scope inference --scope admin --file /etc/splitserve/keys.yaml
    """
    key = ApiKey(
        name=name,
        scopes=frozenset(scope or (Scope.INFERENCE,)),
        weight=weight,
        max_requests_per_min=max_requests_per_min,
        max_tokens_per_min=max_tokens_per_min,
        max_concurrent=max_concurrent,
    )
    print(add_key(file, key))
    typer.secho(f"{file} holds its digest only: keep the line above, it is not shown again", err=True)
