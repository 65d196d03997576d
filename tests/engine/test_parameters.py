"""What a request may ask of an engine beside tokens: likelihoods, a least length, a format, and to fail alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from splitserve.core.errors import InvalidRequest
from splitserve.core.logprobs import TokenLogprob
from splitserve.core.request import FinishReason, FormatKind, OutputFormat, Request, SamplingParams
from splitserve.engine import runner as runner_module
from splitserve.engine.attention import NAME
from splitserve.engine.engine import Engine
from splitserve.engine.loading import LoadedModel
from splitserve.engine.output_format import OutputFormats
from splitserve.engine.outputs import TokenOutput
from splitserve.engine.runner import CpuRunner, SequenceTokens, StepResult
from splitserve.engine.testing import EOS_TOKEN_ID
from splitserve.scheduling.sequence import PENDING
from splitserve.scheduling.step_plan import StepPlan

PROMPT = tuple(5 + (37 * i) % 200 for i in range(90))


def run(engine: Engine) -> tuple[dict[str, list[TokenOutput]], dict[str, Exception]]:
    outputs: dict[str, list[TokenOutput]] = {}
    failed: dict[str, Exception] = {}
    while engine.has_work():
        step = engine.step()
        assert step is not None
        assert engine.num_orphaned_blocks() == 0
        failed.update(step.failed)
        for token in step.tokens:
            outputs.setdefault(token.request_id, []).append(token)
    assert engine.usage().blocks_live == 0
    return outputs, failed


def make(request_id: str, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 20, **more: Any) -> Request:
    return Request(request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens, **more)


def model_logprobs(model: LoadedModel, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab], by the model's own attention."""
    module: Any = model.model
    module.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            logits = module(torch.tensor([token_ids]), use_cache=False).logits[0]
    finally:
        module.set_attn_implementation(NAME)
    return torch.as_tensor(logits).float().log_softmax(-1)


def check(entry: TokenLogprob, expected: torch.Tensor, num_top: int) -> None:
    """`expected` [vocab]: the model's log probabilities at that place."""
    assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-4)
    assert entry.rank == int((expected > expected[entry.token_id]).sum()) + 1
    values, ids = expected.topk(num_top)
    assert [other.token_id for other in entry.top] == ids.tolist()
    assert [other.logprob for other in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 17}, {"prefix_cache": False}])
def test_logprobs_are_the_models_own_whatever_sampling_does(
    make_engine: Any, tiny: LoadedModel, options: dict[str, Any]
) -> None:
    engine = make_engine(**options)
    engine.add(make("fills the cache"))
    run(engine)
    sampling = SamplingParams(
        temperature=1.3, seed=3, top_k=40, frequency_penalty=0.8, logit_bias=((EOS_TOKEN_ID, -50.0), (9, 4.0))
    )
    engine.add(make("a", sampling=sampling, logprobs=5, prompt_logprobs=2))
    engine.add(make("b", sampling=sampling, logprobs=0))
    engine.add(make("c", sampling=sampling))
    outputs, _ = run(engine)
    for tokens in outputs.values():
        assert [token.token_id for token in tokens] == [token.token_id for token in outputs["a"]]
    answer = [token.token_id for token in outputs["a"]]
    expected = model_logprobs(tiny, [*PROMPT, *answer])
    for at, (token, plain, none) in enumerate(zip(outputs["a"], outputs["b"], outputs["c"], strict=True), len(PROMPT)):
        assert token.logprob is not None
        assert plain.logprob is not None
        check(token.logprob, expected[at - 1], 5)
        assert (plain.logprob.top, none.logprob) == ((), None)
        assert token.logprob.token_id == plain.logprob.token_id == token.token_id
    prompt = outputs["a"][0].prompt_logprobs
    assert [entry.token_id for entry in prompt] == list(PROMPT[1:])
    for at, entry in enumerate(prompt, 1):
        check(entry, expected[at - 1], 2)
    assert all(not token.prompt_logprobs for token in (*outputs["a"][1:], *outputs["b"]))


def test_prompt_logprobs_are_whole_however_often_the_prompt_is_computed(make_engine: Any) -> None:
    """Preempted in the middle of a prompt, a sequence starts over and tells each token once."""
    alone = make_engine()
    alone.add(make("p", prompt=PROMPT[:40], prompt_logprobs=1, max_tokens=30))
    expected = run(alone)[0]["p"]
    engine = make_engine(num_kv_blocks=10, prefix_cache=False, max_step_tokens=16)
    engine.add(make("first", prompt=PROMPT[:60], max_tokens=60))
    for number in range(3):
        engine.add(make(str(number), prompt=PROMPT[:40], prompt_logprobs=1, max_tokens=30))
    outputs, _ = run(engine)
    assert engine.preemptions > 0
    for number in range(3):
        tokens = outputs[str(number)]
        assert [token.token_id for token in tokens] == [token.token_id for token in expected]
        assert [e.token_id for e in tokens[0].prompt_logprobs] == [e.token_id for e in expected[0].prompt_logprobs]
        ours, theirs = ([e.logprob for e in row[0].prompt_logprobs] for row in (tokens, expected))
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_prompt_of_one_token_has_no_logprobs_and_still_runs(make_engine: Any) -> None:
    engine = make_engine()
    engine.add(make("a", prompt=(4,), prompt_logprobs=3, max_tokens=2))
    assert [token.prompt_logprobs for token in run(engine)[0]["a"]] == [(), ()]


def test_nothing_ends_an_answer_before_min_tokens(make_engine: Any) -> None:
    engine = make_engine()
    eager = SamplingParams(logit_bias=((EOS_TOKEN_ID, 100.0),))
    for least in (0, 1, 9):
        stops = frozenset({EOS_TOKEN_ID, 20})
        engine.add(make(str(least), sampling=eager, min_tokens=least, stop_token_ids=stops))
    outputs, _ = run(engine)
    for least in (0, 1, 9):
        tokens = outputs[str(least)]
        assert len(tokens) == least + 1
        assert tokens[-1].token_id == EOS_TOKEN_ID
        assert tokens[-1].finish_reason is FinishReason.STOP
        assert not {token.token_id for token in tokens[:-1]} & {EOS_TOKEN_ID, 20}


def test_a_format_ends_an_answer_before_min_tokens_if_nothing_else_fits(make_engine: Any) -> None:
    engine = make_engine()
    two = OutputFormat(kind=FormatKind.REGEX, source="[a-z]{2}")
    stops = frozenset({EOS_TOKEN_ID})
    engine.add(make("a", output_format=two, min_tokens=10, stop_token_ids=stops))
    assert len(run(engine)[0]["a"]) == 3


def test_a_request_whose_output_left_its_format_fails_alone(make_engine: Any) -> None:
    engine = make_engine()
    digits = OutputFormat(kind=FormatKind.REGEX, source="[0-9]{4}")
    stops = frozenset({EOS_TOKEN_ID})
    engine.add(make("bad", output_format=digits, output_token_ids=(70,), stop_token_ids=stops))
    engine.add(make("good", output_format=digits, stop_token_ids=stops))
    engine.add(make("plain", max_tokens=4))
    outputs, failed = run(engine)
    assert set(failed) == {"bad"}
    assert isinstance(failed["bad"], InvalidRequest)
    assert set(outputs) == {"good", "plain"}
    assert outputs["good"][-1].token_id == EOS_TOKEN_ID


class AheadRunner(CpuRunner):
    """Computes a step as soon as it is launched, as a GPU may: the host's lists do not know the step before yet."""

    max_steps = 2

    def __init__(self, engine: Engine, model: LoadedModel, *, captured: bool = True) -> None:
        """Prompts are slow to launch; without `captured` steps, decodes are as well."""
        formats = OutputFormats(model.path, model.vocab_size, model.eos_token_ids)
        super().__init__(model.model, engine.pool, formats, None)
        self.last: dict[str, int] = {}  # newest token of each request, as it would lie on the device
        self.num_ahead = 0
        self.num_slow = 0
        self._captured = captured
        self._done: deque[StepResult] = deque()
        self._forward = runner_module.forward

    def knowing_the_last(self, model: Any, pool: Any, sequences: Sequence[SequenceTokens], *more: Any) -> torch.Tensor:
        """`forward` with the tokens that the host's lists do not know yet."""
        known = [
            replace(s, token_ids=[self.last[s.request_id] if t == PENDING else t for t in s.token_ids])
            for s in sequences
        ]
        return self._forward(model, pool, known, *more)

    def is_quick(self, plan: StepPlan) -> bool:
        return self._captured and not plan.num_prefill_tokens

    def launch(self, plan: StepPlan) -> None:
        self.num_slow += not self.is_quick(plan)
        super().launch(plan)
        self._done.append(super().collect())
        self.last.update(self._done[-1].token_ids)
        self.num_ahead += len(self._done) == 2

    def collect(self) -> StepResult:
        return self._done.popleft()

    def abandon(self) -> None:
        super().abandon()
        self._done.clear()


def test_a_step_ahead_gives_the_same_answers(
    make_engine: Any, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a choice looks at earlier output the step before is awaited, and nowhere else."""
    sampled = SamplingParams(temperature=0.9, seed=3)
    ending = SamplingParams(temperature=0.9, seed=3, logit_bias=((EOS_TOKEN_ID, 6.0),))
    stops = frozenset({EOS_TOKEN_ID})
    plain = [
        make("0"),
        make("1", sampling=sampled, logprobs=4, prompt_logprobs=2),
        make("2", sampling=ending, min_tokens=6, stop_token_ids=stops),
    ]
    looking_back = [
        make("3", sampling=ending, stop_token_ids=stops, output_format=OutputFormat(kind=FormatKind.JSON_OBJECT)),
        make("4", stop_token_ids=stops, output_format=OutputFormat(kind=FormatKind.REGEX, source="[a-f]{5,9}")),
        make("5", sampling=SamplingParams(frequency_penalty=1.5)),
    ]
    forward = runner_module.forward
    for requests, least_ahead in ((plain, 10), (looking_back, 0), (plain + looking_back, 0)):
        engine = make_engine(max_step_tokens=32)
        for request in requests:
            engine.add(request)
        expected, _ = run(engine)
        engine = make_engine(max_step_tokens=32)
        engine._runner = ahead = AheadRunner(engine, tiny)
        monkeypatch.setattr(runner_module, "forward", ahead.knowing_the_last)
        for request in requests:
            engine.add(request)
        found, failed = run(engine)
        monkeypatch.setattr(runner_module, "forward", forward)
        assert not failed
        for request_id, tokens in expected.items():
            assert [token.token_id for token in found[request_id]] == [token.token_id for token in tokens]
            entries, others = found[request_id][0].prompt_logprobs, tokens[0].prompt_logprobs
            assert [entry.token_id for entry in entries] == [entry.token_id for entry in others]
        assert ahead.num_ahead >= least_ahead


@pytest.fixture
def ahead(make_engine: Any, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, AheadRunner]:
    """An engine that has answered a part of request "first", with a step of it under way."""
    engine = make_engine(max_step_tokens=32)
    engine._runner = runner = AheadRunner(engine, tiny)
    monkeypatch.setattr(runner_module, "forward", runner.knowing_the_last)
    engine.add(make("first", max_tokens=12))
    while engine.output_tokens < 3:
        engine.step()
    return engine, runner


def test_tokens_of_a_decode_step_do_not_wait_for_the_launch_of_a_prompt(ahead: tuple[Engine, AheadRunner]) -> None:
    engine, runner = ahead
    engine.add(make("second", max_tokens=4))
    kinds = []
    while engine.has_work():
        num_slow = runner.num_slow
        step = engine.step()
        assert step is not None
        assert not step.failed
        if runner.num_slow > num_slow:  # launched before that step's tokens were handed out
            kinds.append(step.record.kind)
    assert kinds
    assert "decode" not in kinds


def test_steps_that_are_all_slow_to_launch_give_the_same_answers(
    make_engine: Any, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without CUDA graphs, or where each answer has a penalty."""
    requests = [make("0"), make("1", sampling=SamplingParams(temperature=0.9, seed=3, frequency_penalty=1.5))]
    engine = make_engine(max_step_tokens=32)
    for request in requests:
        engine.add(request)
    expected, _ = run(engine)
    engine = make_engine(max_step_tokens=32)
    engine._runner = runner = AheadRunner(engine, tiny, captured=False)
    monkeypatch.setattr(runner_module, "forward", runner.knowing_the_last)
    for request in requests:
        engine.add(request)
    found, failed = run(engine)
    assert not failed
    for request_id, tokens in expected.items():
        assert [token.token_id for token in found[request_id]] == [token.token_id for token in tokens]


def test_a_long_step_is_not_waited_for_before_the_next_one_is_launched(
    make_engine: Any, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of which a device is busy for longer than the host is with the launch of the next."""
    engine = make_engine(max_step_tokens=600, num_kv_blocks=200)
    engine._runner = runner = AheadRunner(engine, tiny)
    monkeypatch.setattr(runner_module, "forward", runner.knowing_the_last)
    monkeypatch.setattr(engine._pace, "_prefill_token_s", deque([10.0]))
    for name in ("first", "second"):
        engine.add(make(name, prompt=tuple(range(3, 203)) * 3, max_tokens=1))
    step = engine.step()
    assert step is not None
    assert (step.record.num_prefill_tokens, runner.num_ahead) == (600, 1)
    _, failed = run(engine)
    assert not failed


def test_a_step_that_cannot_be_launched_takes_no_tokens_of_the_one_before_along(
    make_engine: Any, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine._runner = runner = AheadRunner(engine, tiny)
    monkeypatch.setattr(runner_module, "forward", runner.knowing_the_last)
    engine.add(make("0", max_tokens=2))
    engine.add(make("1", sampling=SamplingParams(frequency_penalty=1.5)))  # looks at the token before each
    launch, launched = runner.launch, []

    def fail_third(plan: StepPlan) -> None:
        launched.append(plan)
        if len(launched) == 3:
            raise RuntimeError("out of memory")
        launch(plan)

    tokens: dict[str, list[TokenOutput]] = {"0": [], "1": []}

    def go_on() -> None:
        while (step := engine.step()) is not None:
            for token in step.tokens:
                tokens[token.request_id].append(token)

    monkeypatch.setattr(runner, "launch", fail_third)
    with pytest.raises(RuntimeError, match="out of memory") as failure:
        go_on()
    assert [request_id for request_id, _ in engine.abandon_step(failure.value).failed] == ["1"]
    assert [token.finish_reason for token in tokens["0"]] == [None, FinishReason.LENGTH]
    assert [token.index for token in tokens["1"]] == [0, 1]
    assert engine.num_orphaned_blocks() == 0


def test_a_failed_step_takes_the_one_that_waits_behind_it_along(
    ahead: tuple[Engine, AheadRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = ahead
    engine.add(make("second", max_tokens=4))

    def fail() -> StepResult:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr(runner, "collect", fail)
        with pytest.raises(RuntimeError) as failure:
            engine.step()
        assert engine.abandon_step(failure.value).failed
    assert not engine.has_work()
    assert engine.num_orphaned_blocks() == 0
    engine.add(make("third", max_tokens=4))
    outputs, failed = run(engine)
    assert not failed
    assert len(outputs["third"]) == 4
