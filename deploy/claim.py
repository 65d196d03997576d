"""One local cluster for each state file: a lock that its process holds for life, so that a dead one blocks nobody."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import ConfigError
from ..core.state import remove_state, state_path
from .ray_directory import remove_abandoned


def _lock_path() -> Path:
    return state_path().with_suffix(".lock")


class Claim:
    """On the name of a local cluster, while `claim_local_cluster` holds it."""

    def __init__(self) -> None:
        self.left = False

    def leave(self) -> None:
        """The cluster goes on without this process, and so does its state file."""
        self.left = True


@contextmanager
def claim_local_cluster() -> Iterator[Claim]:
    """Hold the lock; the state file is gone afterwards. Raises: ConfigError: another process holds it."""
    path = _lock_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"a local cluster already runs (process {_read_pid(path)}); stop it with `splitserve down`, "
                "or set XDG_RUNTIME_DIR to another directory to run a second one"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        claim = Claim()
        try:
            yield claim
        finally:
            if not claim.left:
                remove_state()
            lock.truncate(0)


def local_cluster_pid() -> int | None:
    """The process that runs the local cluster; None if there is none."""
    path = _lock_path()
    try:
        with path.open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return _read_pid(path)
    return None


def forget_killed_cluster() -> None:
    """Remove what a cluster leaves behind that was killed before it could clean up; fine if there is none."""
    remove_abandoned()
    with suppress(FileNotFoundError, BlockingIOError), _lock_path().open("r+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # or another one has started meanwhile
        remove_state()
        lock.truncate(0)


def _read_pid(path: Path) -> int | None:
    text = path.read_text(encoding="utf-8").strip()
    return int(text) if text.isdecimal() else None
