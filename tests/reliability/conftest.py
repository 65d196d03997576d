"""A small random model for tests that need a real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from splitserve.engine.testing import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
