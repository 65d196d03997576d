"""Where this user keeps what was made once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(kind: str) -> Path:
    """By kind: compiled code, converted models. Nobody has made it yet, perhaps."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "splitserve" / kind
