"""Reads the log of a process piece by piece, as `splitserve logs` shows it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

_POLL_S = 0.2  # a file says nothing when it grows


async def read_log(path: Path, offset: int, max_bytes: int, wait_s: float) -> tuple[int, bytes]:
    """The piece from `offset` (from the end if negative), and where the next one begins.

    Waits for something to be there for at most `wait_s`. A file that has become shorter is read from its beginning.
    """
    until = time.monotonic() + wait_s
    while True:
        offset, piece = await asyncio.to_thread(_read, path, offset, max_bytes)
        if piece or time.monotonic() >= until:
            return offset, piece
        await asyncio.sleep(_POLL_S)


def _read(path: Path, offset: int, max_bytes: int) -> tuple[int, bytes]:
    try:
        with path.open("rb") as log:
            size = log.seek(0, 2)
            start = max(0, size + offset) if offset < 0 else offset if offset <= size else 0
            log.seek(start)
            piece = log.read(max_bytes)
    except FileNotFoundError:
        return 0, b""
    return start + len(piece), piece
