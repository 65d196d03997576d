"""A second rank in a process of its own; it serves one model after another, since importing torch takes longest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.parallel.group import RankGroup
from splitserve.engine.parallel.messages import write_message

OpenSplit = Callable[[EngineOptions], AbstractContextManager[Engine]]


class _Pipe:
    """The way to rank 1."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def tell(self, message: bytes) -> None:
        write_message(self._fd, message)

    def fail(self, error: Exception) -> None:
        raise AssertionError("rank 0 failed in the middle of a step") from error


@pytest.fixture(scope="session")
def open_split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSplit]:
    """An engine over two ranks, the other one in the child."""
    read, write = os.pipe()
    script = Path(__file__).with_name("rank_process.py")
    child = subprocess.Popen([sys.executable, str(script), str(read)], pass_fds=(read,))
    os.close(read)
    pipe = _Pipe(write)

    @contextmanager
    def open_(options: EngineOptions) -> Iterator[Engine]:
        group = RankGroup(rank=0, size=2, store=tmp_path_factory.mktemp("store") / "store")
        pipe.tell(json.dumps({"store": str(group.store), "options": asdict(options)}).encode())
        try:
            yield Engine(load_model(options, group), options, others=pipe)
        finally:
            pipe.tell(b"")
            group.close()

    try:
        yield open_
    finally:
        os.close(write)
        try:
            child.wait(timeout=10)
        finally:
            child.kill()
            child.wait()
