"""What must be in the environment before Ray is imported: it reads its authentication mode only then."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from ..core.errors import ConfigError


class NoRay(ConfigError):
    """Nobody answers at Ray's address."""


def prepare_ray_environment(address: str | None, token: str = "") -> None:
    """For a Ray of our own (`address` None) a random token, unless the user chose a mode; usage reports off.

    Another's Ray is joined with the user's token where there is one: a Ray that asks for none takes it too.
    `token`: of the Ray of our own that is to be joined.
    """
    assert "ray" not in sys.modules, "Ray was imported too early to be told how to authenticate"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if token:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    elif address is not None:
        os.environ.setdefault("RAY_AUTH_MODE", "token" if _has_token() else "disabled")
    elif os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        # Ray listens on every interface: without a token, anyone who reaches the machine could run code on it.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _has_token() -> bool:
    """Whether Ray would find a token where it looks for one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    file = Path.home() / ".ray" / "auth_token"
    return file.is_file() and file.stat().st_size > 0
