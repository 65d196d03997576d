"""`--ca`, `--cert` and `--key` of every subcommand that calls a router or a worker."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

_HELP = {
    "ca": "Certificate of the authority that signed the router's; with it, connections are encrypted.",
    "cert": "Our own certificate, for routers that ask who calls; {role} stands for client or operator.",
    "key": "Its private key.",
}


def with_tls_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the three flags, which it finds where the SDK looks: in the environment."""

    def run(**given: Any) -> None:
        for name in _HELP:
            path = given.pop(name)
            if path is not None:
                os.environ[_variable(name)] = str(path)
        command(**given)

    own = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, typer.Option(f"--{name}", help=text, envvar=_variable(name))],
        )
        for name, text in _HELP.items()
    ]
    kept = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own.parameters.values()]
    signature = own.replace(parameters=[*kept, *added])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    run.__doc__ = command.__doc__
    return run


def _variable(name: str) -> str:
    return f"SPLITSERVE_TLS_{name.upper()}"
