"""How Ray authenticates is settled before it is imported: in processes of their own, for this one has imported it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_MODE = """
import os, sys
from splitserve.deploy.ray_environment import prepare_ray_environment
prepare_ray_environment(*sys.argv[1:])
print(os.environ["RAY_AUTH_MODE"])
"""


def mode(home: Path, **environment: str) -> str:
    """Of a process that joins another's Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", _MODE, "10.0.0.1:6379"],
        env={**kept, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_joined_ray_is_called_with_the_users_token_where_there_is_one(tmp_path: Path) -> None:
    assert mode(tmp_path) == "disabled"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert mode(tmp_path) == "token"
    assert mode(tmp_path, RAY_AUTH_MODE="disabled") == "disabled"


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_may_stand_in_the_environment(tmp_path: Path, name: str) -> None:
    assert mode(tmp_path, **{name: "secret"}) == "token"
