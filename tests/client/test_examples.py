"""Every example runs as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from splitserve.client.testing import ScriptedRouter

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example: Path) -> None:
    with ScriptedRouter() as router:
        done = subprocess.run(
            [sys.executable, str(example)],
            env={**os.environ, "SPLITSERVE_ADDRESS": router.address},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "0 1 2 " in done.stdout
        assert router.requests
