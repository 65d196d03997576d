"""Subcommands run in this process, against no cluster but the one that a test names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from splitserve.client.testing import ScriptedRouter


@pytest.fixture(autouse=True)
def no_local_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("SPLITSERVE_ADDRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedRouter]:
    """A router with the default script, found through the environment."""
    with ScriptedRouter() as running:
        monkeypatch.setenv("SPLITSERVE_ADDRESS", running.address)
        yield running
