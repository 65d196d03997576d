"""Every example of docs/api.md runs, against a cluster that serves the tiny model."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from splitserve.benchmarks.processes import ProcessCluster

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def examples(language: str) -> list[Any]:
    """Each block of the language, by the title above it."""
    found: list[Any] = []
    title, number = "", 0
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S):
        if match[1]:
            title, number = match[1], 0
        elif match[2] == language:
            number += 1
            found.append(pytest.param(match[3], id=f"{title} {number}"))
    return found


@pytest.fixture
def here(served: ProcessCluster, tiny: Path) -> dict[str, str]:
    """What the document's names are in this cluster."""
    return {
        "127.0.0.1:8000": served.router.http_address,
        "127.0.0.1:50051": served.router.address,
        "smollm2-135m": str(tiny),
    }


def for_here(text: str, here: dict[str, str]) -> str:
    for name, value in here.items():
        text = text.replace(name, value)
    return text


@pytest.mark.parametrize("text", examples("python"))
def test_a_python_example_runs(text: str, here: dict[str, str]) -> None:
    exec(compile(for_here(text, here), str(DOCUMENT), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", examples("sh"))
def test_a_curl_example_is_answered(text: str, here: dict[str, str]) -> None:
    script = for_here(text.replace("curl -s", "curl -fsS"), here)
    command = ["bash", "-euo", "pipefail", "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    if "stream" in text:
        *events, last = [line.removeprefix("data: ") for line in out.splitlines() if line]
        assert last == "[DONE]"
        assert all(json.loads(event)["id"] for event in events)
    else:
        decoder, rest = json.JSONDecoder(), out
        while rest:
            answer, end = decoder.raw_decode(rest)
            assert "error" not in answer
            rest = rest[end:].lstrip()
