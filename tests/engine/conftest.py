"""A tiny model loaded once, and engines over it, in one process or in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from splitserve.engine.engine import Engine
from splitserve.engine.loading import LoadedModel, load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.parallel.group import RankGroup
from splitserve.engine.parallel.messages import write_message
from splitserve.engine.testing import make_tiny_model

MakeEngine = Callable[..., Engine]
OpenSplit = Callable[[EngineOptions], AbstractContextManager[Engine]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path: Path = make_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    return load_model(EngineOptions(model=str(path)))


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load_model(EngineOptions(model="smollm2-135m"))


@pytest.fixture
def make_engine(tiny: LoadedModel) -> MakeEngine:
    def make(
        model: LoadedModel | None = None, *, recorder: Any = None, kv_written: Any = None, **options: Any
    ) -> Engine:
        options = {"num_kv_blocks": 64, **options}
        return Engine(model or tiny, EngineOptions(model="tiny", **options), recorder=recorder, kv_written=kv_written)

    return make


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
    """An engine over two ranks; the other one serves one model after another, since importing torch takes longest."""
    read, write = os.pipe()
    script = Path(__file__).with_name("rank_process.py")
    child = subprocess.Popen([sys.executable, str(script), str(read)], pass_fds=(read,))
    os.close(read)
    pipe = _Pipe(write)

    @contextmanager
    def open_(options: EngineOptions) -> Iterator[Engine]:
        group = RankGroup(rank=0, size=2, store=tmp_path_factory.mktemp("store") / "store")
        pipe.tell(json.dumps({"store": str(group.store), "options": asdict(options)}).encode())
        engine = None
        try:
            engine = Engine(load_model(options, group), options, others=pipe)
            yield engine
        finally:
            pipe.tell(b"")
            if engine is not None:
                engine.close()
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
