"""The JSON that every benchmark writes: its figures with commit, command and machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def write_json(path: Path, figures: Mapping[str, object], *, device: str = "cpu") -> None:
    """Write `figures` together with what is needed to read or repeat them."""
    row = {
        "command": " ".join([Path(sys.executable).name, "-m", *sys.orig_argv[2:]]),
        "commit": _commit(),
        "device": device,
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **figures,
    }
    path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


def _commit() -> str:
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"
