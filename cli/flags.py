"""Flags made from the configuration's fields, so that a key, its flag, its default and its help are one thing."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ..core.config import fields, load_config
from ..core.errors import ConfigError
from ..deploy.roles import flag

# The SDK and the commands that call a router read the same ones.
_ENVIRONMENT = {f"security.{name}": f"SPLITSERVE_TLS_{name.upper()}" for name in ("ca", "cert", "key")}


def config_flags(keys: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config FILE` and one flag for each key; it gets the merged configuration as `config`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(*, config_file: Path | None, **given: Any) -> None:
            overrides = {key: given.pop(_name(key)) for key in keys}
            try:
                config = load_config(config_file, overrides)
            except ConfigError as error:
                named = error.message
                for key in keys:
                    if overrides[key] is not None:
                        named = named.replace(f"{key}: ", f"{flag(key)}: ", 1)
                raise ConfigError(named) from error
            command(config=config, **given)

        known = dict(fields())
        file_flag = typer.Option("--config", help="YAML file; flags go over it.", show_default="none")
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        made = [_parameter("config_file", Annotated[Path | None, file_flag])]
        made += [_parameter(_name(key), _annotation(key, known[key])) for key in keys]
        signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *made)])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        run.__doc__ = command.__doc__
        return run

    return decorate


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _parameter(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _annotation(key: str, field: Any) -> object:
    """An optional flag: unset leaves the file's value. Pydantic parses and judges the text, so errors read alike."""
    default = "none" if field.default is None else str(field.default)
    kind = _kind(field.annotation)
    if kind is bool:
        names = f"{flag(key)}/--no-{flag(key)[2:]}"
        return Annotated[bool | None, typer.Option(names, help=field.description, show_default=default)]
    metavar = "|".join(get_args(kind)) if get_origin(kind) is Literal else getattr(kind, "__name__", "TEXT").upper()
    option = typer.Option(
        flag(key), help=field.description, show_default=default, metavar=metavar, envvar=_ENVIRONMENT.get(key)
    )
    return Annotated[str | None, option]


def _kind(annotation: Any) -> Any:
    """int of `int | None`."""
    if isinstance(annotation, types.UnionType) or (
        get_origin(annotation) is not None and type(None) in get_args(annotation)
    ):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation
