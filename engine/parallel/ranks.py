"""The other ranks as child processes of rank 0: started, told each step, watched, ended."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from ...core.errors import EngineFailed, SplitserveError, from_code
from ..options import EngineOptions
from .group import RankGroup
from .messages import write_message

logger = logging.getLogger(__name__)

ENTRY = "splitserve.engine.parallel.follower"
EXIT_RANK_LOST = 3  # exit code of a worker whose ranks cannot go on
_GRACE_S = 5.0
_PIPE_BYTES = 1 << 20


def start_ranks(
    options: EngineOptions, *, entry: str = ENTRY, mover: Mapping[str, object] | None = None
) -> Ranks | None:
    """Start the other ranks of `options.tensor_parallel`; None where this process holds the whole model.

    Args:
        entry: module whose `main` a rank runs: the follower's, with whatever moves its KV.
        mover: settings for that, which JSON can hold.
    Raises: ConfigError: there are too few devices.
    """
    if options.tensor_parallel == 1:
        return None
    from ..loading import device_of  # it imports this package

    device_of(options, 0)
    return Ranks(options, entry=entry, mover=mover)


def end_process(reason: str) -> None:
    """End this process at once: its other threads may wait for a rank that is gone, inside a collective."""
    logger.critical("%s; this worker ends, since no rank can go on alone", reason)
    for handler in logging.getLogger("splitserve").handlers:
        handler.flush()
    os._exit(EXIT_RANK_LOST)


class Ranks:
    """Ranks 1 to N - 1. A rank that ends takes this process with it, through `lost`, once `group` has met."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        entry: str = ENTRY,
        mover: Mapping[str, object] | None = None,
        lost: Callable[[str], None] = end_process,
    ) -> None:
        self._lost = lost
        self._entry = entry
        self._mover = mover
        self._directory = Path(tempfile.mkdtemp(prefix="splitserve-ranks-"))
        self._closing = threading.Event()
        self._met = False
        self._loaded: queue.SimpleQueue[tuple[int, SplitserveError | None]] = queue.SimpleQueue()
        self._children: list[subprocess.Popen[bytes]] = []
        self._pipes: list[int] = []
        self.links: list[socket.socket] = []  # to ranks 1 to N - 1, for what is no step
        self.group = RankGroup(
            rank=0, size=options.tensor_parallel, store=self._directory / "store", meet=self._wait_until_loaded
        )
        for rank in range(1, self.group.size):
            self._start(rank, options)

    def tell(self, message: bytes) -> None:
        for pipe in self._pipes:
            write_message(pipe, message)

    def fail(self, error: Exception) -> None:
        self._end(f"rank 0 failed in the middle of a step: {type(error).__name__}: {error}")

    def close(self) -> None:
        """End the other ranks; returns when they have ended."""
        self._closing.set()
        for pipe in self._pipes:
            os.close(pipe)
        self._pipes.clear()
        for link in self.links:
            link.close()
        for child in self._children:
            try:
                child.wait(timeout=_GRACE_S if self._met else 0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if self.group.device.type == "cpu":  # leaving NCCL waits for the others; it ends with this process
            self.group.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, rank: int, options: EngineOptions) -> None:
        messages_read, messages_write = os.pipe()
        status_read, status_write = os.pipe()
        own_link, its_link = socket.socketpair()
        its_fds = (messages_read, status_write, its_link.fileno())
        child = subprocess.Popen(
            # Not -m: the package may be on the path without being installed, as in deploy.
            [sys.executable, "-c", f"from {self._entry} import main; main()", *map(str, (os.getpid(), *its_fds))],
            stdin=subprocess.DEVNULL,
            pass_fds=its_fds,
        )
        os.close(messages_read)
        os.close(status_write)
        its_link.close()
        self.links.append(own_link)
        _widen(messages_write)
        self._children.append(child)
        self._pipes.append(messages_write)
        start = {
            "rank": rank,
            "size": self.group.size,
            "store": str(self.group.store),
            "options": asdict(options if self._mover is not None else replace(options, shared_pool=False)),
            "mover": self._mover,
            "log_level": logging.getLogger("splitserve").getEffectiveLevel(),
        }
        with suppress(BrokenPipeError):  # it is dead already: its watcher says so
            write_message(messages_write, json.dumps(start).encode())
        threading.Thread(
            target=self._watch, args=(rank, child, status_read), name=f"rank-{rank}-watch", daemon=True
        ).start()

    def _watch(self, rank: int, child: subprocess.Popen[bytes], status: int) -> None:
        with os.fdopen(status, "rb") as lines:
            for line in lines:
                row = json.loads(line)
                if "error" not in row:
                    self._loaded.put((rank, None))
                elif not self._met:
                    self._loaded.put((rank, from_code(row["error"], row["message"])))
                elif not self._closing.wait(_GRACE_S):  # this rank did not fail like the other one
                    self._end(f"rank {rank} failed: {row['message']}")
        returncode = child.wait()
        how = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exited with {returncode}"
        reason = f"rank {rank} (process {child.pid}) of the tensor-parallel group {how}"
        if self._met:
            self._end(reason)
        else:
            self._loaded.put((rank, EngineFailed(f"{reason} while it loaded the model; see its log above")))

    def _end(self, reason: str) -> None:
        if not self._closing.is_set():
            self._closing.set()
            for child in self._children:
                child.kill()
            shutil.rmtree(self._directory, ignore_errors=True)
            self._lost(reason)

    def _wait_until_loaded(self) -> None:
        """Raises: SplitserveError: a rank could not load its share."""
        missing = set(range(1, self.group.size))
        while missing:
            rank, error = self._loaded.get()
            if error is not None:
                raise error
            missing.discard(rank)
        self._met = True


def _widen(pipe: int) -> None:
    """Room for a step of many tokens, so that rank 0 need not wait for the readers."""
    with suppress(OSError):  # over the user's limit: the default works too
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
