"""Documents stay true: the commands, flags, files, functions and links that they name exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import struct
from pathlib import Path

import pytest
import typer
from splitserve.cli.main import app
from splitserve.core.events import Event
from splitserve.kv_transfer.codecs import WireFormat
from splitserve.kv_transfer.frames import HEADER_BYTES, VERSION, FrameHeader, FrameKind, KvPart

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

GROUP = typer.main.get_command(app)

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def shell_commands(text: str) -> list[list[str]]:
    """Words of each command in the fenced shell blocks; leading environment settings and `$` are left out."""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.M | re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(re.sub(r"^(\w+=\S* )+", "", line), comments=True) for line in lines if line.strip()]
    return [words for words in commands if words]


@document
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = path.read_text()
    named = {words[1] for words in shell_commands(text) if words[0] == "make"} | set(
        re.findall(r"`make ([a-z-]+)", text)
    )
    assert named <= targets


@document
def test_subcommands_and_their_flags_exist(path: Path) -> None:
    commands = [words for words in shell_commands(path.read_text()) if words[0] == "splitserve" and len(words) > 1]
    for _, name, *words in commands:
        if name.startswith("-"):
            continue
        _, command, _ = GROUP.resolve_command(typer.Context(GROUP), [name, *words])
        options = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= options | {"--help"}, name


@document
def test_python_examples_import_what_exists(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@document
def test_files_and_links_exist(path: Path) -> None:
    text = path.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (path.parent / link).exists()] == []
    files = re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|proto|md|toml|txt))\b", text)
    assert [name for name in files if not (ROOT / name).exists()] == []


@document
def test_functions_named_with_their_file_exist(path: Path) -> None:
    """`folder/file.py:Class.method` is how the documents name a function."""
    for file, name in re.findall(r"`((?:\w+/)+\w+\.py):([\w.]+)`", path.read_text()):
        scope: ast.AST = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            found = [node for node in ast.iter_child_nodes(scope) if getattr(node, "name", None) == part]
            assert found, f"{file} has no {name}"
            scope = found[0]


def test_glossary_lists_every_life_cycle_event_in_order() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    assert rows == [event.value for event in Event]


def test_frame_layout_in_the_documents_is_the_real_one() -> None:
    header = FrameHeader(
        kind=FrameKind.DATA,
        grant_id="ab" * 16,
        attempt=3,
        epoch=4,
        part=KvPart(layer_start=5, layer_end=6, head_start=7, head_end=8, token_start=9, token_end=10),
        wire=WireFormat(codec="int8", dtype="bfloat16"),
        sequence=11,
        payload_bytes=12,
        checksum=13,
        turn=14,
        round=15,
    ).pack()
    formats = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
    text = (ROOT / "docs" / "kv_transfer.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.M)
    values = [struct.unpack_from("<" + formats.get(kind, kind), header, int(offset))[0] for offset, kind in rows]
    assert values == [b"SSKV", VERSION, 2, 2, b"\xab" * 16, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 1, 15, b"\0\0"]
    assert sum(struct.calcsize("<" + formats.get(kind, kind)) for _, kind in rows) == len(header) == HEADER_BYTES
