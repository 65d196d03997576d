"""The directory of a local cluster's own Ray, and the removal of those whose cluster was killed."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/tmp")  # short: Ray puts unix sockets below it, whose paths must not exceed 107 bytes
_PREFIX = "splitserve-ray-"
_OWNER = "owner.lock"  # its cluster's process holds the lock for life


@contextmanager
def ray_directory() -> Iterator[Path]:
    """A fresh directory, gone afterwards, together with those that killed clusters left."""
    remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_ROOT))
    try:
        with (directory / ".owner").open("w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            (directory / ".owner").rename(directory / _OWNER)  # nobody sees it unlocked
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def remove_abandoned() -> None:
    """Remove the directories whose process is gone; those of other users and of the living stay."""
    for path in _ROOT.glob(f"{_PREFIX}*/{_OWNER}"):
        try:
            with path.open("r+") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, somebody else's, or removed just now
            continue
        shutil.rmtree(path.parent, ignore_errors=True)
