"""A tiny model loaded once, and engines over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from splitserve.engine.engine import Engine
from splitserve.engine.loading import LoadedModel, load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.testing import make_tiny_model

MakeEngine = Callable[..., Engine]


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
