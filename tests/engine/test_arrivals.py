"""A sequence whose transfer is about to end: the engine notes it, and forgets it however it ends."""

from __future__ import annotations

import pytest
from splitserve.core.request import Request
from splitserve.engine.engine import Engine
from splitserve.engine.loading import LoadedModel
from splitserve.engine.options import EngineOptions


@pytest.mark.parametrize("end", ["started", "released"])
def test_an_expected_sequence_is_expected_until_it_starts_or_is_released(tiny: LoadedModel, end: str) -> None:
    engine = Engine(tiny, EngineOptions(model="tiny", num_kv_blocks=16))
    engine.reserve(Request(request_id="r", prompt_token_ids=tuple(range(3, 40)), max_tokens=4))
    engine.expect_reserved("r")
    assert engine.num_expected == 1
    if end == "started":
        engine.start_reserved("r", 9)
    else:
        engine.release("r")
    assert engine.num_expected == 0
