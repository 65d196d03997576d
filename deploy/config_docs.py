"""Writes the tables of docs/configuration.md: `python -m splitserve.deploy.config_docs docs/configuration.md`."""

from __future__ import annotations

import sys
import types
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from ..core.config import fields

BEGIN = "<!-- made by `python -m splitserve.deploy.config_docs`; edit core/config.py -->"


def tables() -> str:
    """One Markdown table for each section of the file."""
    lines: list[str] = []
    for section, rows in groupby(fields(), key=lambda row: row[0].rpartition(".")[0]):
        lines += ["", f"## `{section}`" if section else "## Top level", "", "| key | type | default | meaning |"]
        lines.append("|---|---|---|---|")
        for key, field in rows:
            lines.append(f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def _type(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType) or type(None) in get_args(annotation):
        return " or ".join(_type(kind) for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path"}
    return names.get(annotation, "labels")


def _default(field: Any) -> str:
    value = field.default if field.default_factory is None else field.default_factory()
    assert value is not PydanticUndefined, "every key has a default"
    if value is None:
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    """Replace everything after the marker in the file."""
    path = Path(sys.argv[1])
    head, marker, _ = path.read_text(encoding="utf-8").partition(BEGIN)
    if not marker:
        sys.exit(f"{path} has no line {BEGIN}")
    path.write_text(f"{head}{BEGIN}\n{tables()}", encoding="utf-8")


if __name__ == "__main__":
    main()
