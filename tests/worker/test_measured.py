"""What a worker says of its speed, fed with steps whose speed is known."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from splitserve.core.events import StepKind, StepRecord
from splitserve.core.metrics import WorkerMetrics
from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.outputs import StepOutput
from splitserve.engine.testing import make_tiny_model
from splitserve.worker.measured import Measured
from splitserve.worker.options import Role


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("models") / "llama"
    options = EngineOptions(model=str(make_tiny_model("llama", path)), num_kv_blocks=16, self_check=False)
    return Engine(load_model(options), options)


class Steps:
    """Of a worker of one role."""

    def __init__(self, engine: Engine, role: Role) -> None:
        self.measured = Measured(engine, WorkerMetrics(CollectorRegistry(), role))
        self._role = role

    def step(self, kind: StepKind, seconds: float, num_prefill_tokens: int = 0, num_sequences: int = 4) -> None:
        record = StepRecord(
            step=1,
            at_s=0.0,
            kind=kind,
            num_sequences=num_sequences,
            num_prefill_tokens=num_prefill_tokens,
            num_decode_tokens=0,
            num_context_tokens=0,
            num_new_tokens=0,
            schedule_s=0.0,
            run_s=seconds,
            total_s=seconds,
            num_waiting=0,
            num_free_blocks=0,
        )
        output = StepOutput(record=record, tokens=[], started=[], preempted=[], resumed=[], failed=[])
        self.measured.step(output, self._role)


def test_the_first_step_of_each_kind_says_nothing(engine: Engine) -> None:
    """Five seconds of it were the compiler's, and nobody gave the worker work to show otherwise."""
    steps = Steps(engine, "prefill")
    steps.step("prefill", 5.0, 1000)
    steps.step("decode", 5.0)
    assert (steps.measured.prefill_tokens_per_s, steps.measured.decode_step_s) == (0.0, 0.0)
    steps.step("prefill", 0.05, 1000)
    steps.step("decode", 0.01)
    assert steps.measured.prefill_tokens_per_s == pytest.approx(20_000)
    assert (steps.measured.decode_step_s, steps.measured.decode_batch) == pytest.approx((0.01, 4))


@pytest.mark.parametrize("role", ["colocated", "decode"])
def test_a_worker_that_computes_prompts_beside_its_decodes_only_learns_from_those(engine: Engine, role: Role) -> None:
    """A busy colocated worker said for ever what its first prompts had taken."""
    steps = Steps(engine, role)
    for _ in range(2):
        steps.step("prefill", 5.0, 1000)
    for _ in range(50):
        steps.step("decode", 0.01)
        steps.step("mixed", 0.06, 1000)
    assert steps.measured.prefill_tokens_per_s == pytest.approx(20_000, rel=0.01)


def test_speed_is_that_of_tokens_and_not_of_steps(engine: Engine) -> None:
    """Steps that take 15 ms and a second for 50,000 tokens: short prompts alone would seem to need nine times that."""
    steps = Steps(engine, "prefill")
    for _ in range(20):
        for num_tokens in (100, 8_000):
            steps.step("prefill", 0.015 + num_tokens / 50_000, num_tokens)
    assert steps.measured.prefill_tokens_per_s > 40_000
