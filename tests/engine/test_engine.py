"""The engine: exact on every schedule, exact after a move, and no block is lost on any way out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from splitserve.core.errors import EngineFailed, InvalidRequest, Overloaded, PromptTooLong
from splitserve.core.events import Recorder
from splitserve.core.request import FinishReason, Request, SamplingParams
from splitserve.engine import runner as runner_module
from splitserve.engine.attention import NAME
from splitserve.engine.engine import Engine
from splitserve.engine.loading import LoadedModel, load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.outputs import TokenOutput
from splitserve.engine.testing import make_tiny_model

LENGTHS = (1, 2, 15, 16, 17, 33, 64, 100)
NEW_TOKENS = 12


def prompts_of(lengths: tuple[int, ...], vocab: int = 256) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(0, vocab, (n,), generator=generator).tolist()) for n in lengths]


def run(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work():
        step = engine.step()
        assert step is not None, "work is left and nothing can go on"
        usage = engine.usage()
        assert engine.num_orphaned_blocks() == 0
        blocks = usage.blocks_free + usage.blocks_cached + usage.blocks_live + usage.blocks_granted
        assert blocks == usage.blocks_total
        for token in step.tokens:
            outputs.setdefault(token.request_id, []).append(token)
    return outputs


def token_ids(outputs: dict[str, list[TokenOutput]]) -> list[list[int]]:
    return [[token.token_id for token in outputs[key]] for key in sorted(outputs, key=int)]


def reference(model: LoadedModel, prompts: list[tuple[int, ...]], new_tokens: int) -> list[list[int]]:
    """`model.generate`, one prompt at a time, with the model's own attention."""
    module: Any = model.model
    module.set_attn_implementation("eager")
    try:
        outputs = [
            module.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            for prompt in prompts
        ]
    finally:
        module.set_attn_implementation(NAME)
    return [output[0, len(prompt) :].tolist() for prompt, output in zip(prompts, outputs, strict=True)]


def add_all(engine: Engine, model: LoadedModel, prompts: list[tuple[int, ...]], new_tokens: int = NEW_TOKENS) -> None:
    for i, prompt in enumerate(prompts):
        engine.add(
            Request(
                request_id=str(i), prompt_token_ids=prompt, max_tokens=new_tokens, stop_token_ids=model.eos_token_ids
            )
        )


@pytest.mark.parametrize("chunk", [17, 64, 256])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_greedy_equals_generate_however_chunked(
    make_engine: Any, tiny: LoadedModel, chunk: int, prefix_cache: bool
) -> None:
    prompts = prompts_of(LENGTHS)
    prompts.append((*prompts[7][:80], 5, 6, 7))  # shares five blocks
    engine = make_engine(max_step_tokens=chunk, prefix_cache=prefix_cache)
    add_all(engine, tiny, prompts)
    assert token_ids(run(engine)) == reference(tiny, prompts, NEW_TOKENS)
    assert (engine.usage().blocks_cached > 0) == prefix_cache
    assert engine.usage().blocks_live == 0


def test_greedy_equals_generate_after_preemption(make_engine: Any, tiny: LoadedModel) -> None:
    prompts = prompts_of((30, 30, 30, 30))
    engine = make_engine(num_kv_blocks=9, prefix_cache=False)
    add_all(engine, tiny, prompts, 40)
    assert token_ids(run(engine)) == reference(tiny, prompts, 40)
    assert engine.preemptions > 0


def test_a_cached_prefix_is_served_and_changes_nothing(make_engine: Any, tiny: LoadedModel) -> None:
    prompts = prompts_of((100,))
    engine = make_engine()
    for _ in range(2):
        add_all(engine, tiny, prompts)
        assert token_ids(run(engine)) == reference(tiny, prompts, NEW_TOKENS)
    assert engine.cached_tokens == 96
    assert engine.prompt_tokens == 100 + 4


REAL_PROMPTS = (
    "Hello",
    "The capital of France is",
    "Write a haiku about the sea.",
    "def fibonacci(n):\n    ",
    "Explain to a child why the sky is blue.",
    "List three uses of a paper clip:\n1.",
    "Translate to German: The weather is nice today.",
    "SELECT name, COUNT(*) FROM users",
    "In 1905 Albert Einstein published four papers that",
    "Q: What is 17 times 23?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "The recipe needs two eggs, 200 g of flour and",
    "Once upon a time in a village by the river there lived a clockmaker. " * 6,
    "The quick brown fox jumps over the lazy dog. " * 20,
    "A distributed system is one in which the failure of a computer you did not know existed matters. " * 25,
    "First, the committee reviewed the minutes of the previous meeting and found no objection to them. " * 90,
)


def smollm2_prompts(model: LoadedModel) -> list[tuple[int, ...]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model.path)
    return [tuple(tokenizer(text).input_ids[:1500]) for text in REAL_PROMPTS]


def check_smollm2(
    model: LoadedModel, prompts: list[tuple[int, ...]], expected: list[list[int]], **options: Any
) -> Engine:
    engine = Engine(model, EngineOptions(model="smollm2-135m", **{"num_kv_blocks": 400, **options}))
    add_all(engine, model, prompts)
    assert token_ids(run(engine)) == expected
    return engine


def test_smollm2_equals_generate(smollm2: LoadedModel) -> None:
    prompts = smollm2_prompts(smollm2)[:13:4]
    check_smollm2(smollm2, prompts, reference(smollm2, prompts, NEW_TOKENS), max_step_tokens=64)


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_smollm2_equals_generate_on_every_schedule(smollm2: LoadedModel) -> None:
    prompts = smollm2_prompts(smollm2)
    assert (len(prompts[0]), len(prompts[-1])) == (1, 1500)
    expected = reference(smollm2, prompts, NEW_TOKENS)
    for chunk in (17, 64, 256):
        for prefix_cache in (True, False):
            check_smollm2(smollm2, prompts, expected, max_step_tokens=chunk, prefix_cache=prefix_cache)
    # All short ones fit by their prompts, not with their outputs.
    short = prompts[:12]
    needed = sum(-(-len(prompt) // 16) for prompt in short)
    engine = check_smollm2(smollm2, short, expected[:12], num_kv_blocks=needed, prefix_cache=False)
    assert engine.preemptions > 0


@pytest.fixture(scope="module")
def half(tiny: LoadedModel) -> LoadedModel:
    return load_model(EngineOptions(model=str(tiny.path), dtype="bfloat16"))


def capture_logits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    forward = runner_module.forward

    def capturing(*arguments: Any) -> torch.Tensor:
        logits = forward(*arguments)
        seen.append(logits)
        return logits

    monkeypatch.setattr(runner_module, "forward", capturing)
    return seen


def test_a_moved_sequence_has_bitwise_the_logits_of_one_that_stayed(
    make_engine: Any, half: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = capture_logits(monkeypatch)
    request = Request(request_id="0", prompt_token_ids=prompts_of((75,))[0], max_tokens=20)
    engine = make_engine(half, max_step_tokens=32)
    engine.add(request)
    stayed = token_ids(run(engine))[0]
    stayed_logits = logits.copy()
    logits.clear()

    prefill, decode = make_engine(half, max_step_tokens=32), make_engine(half, max_step_tokens=32)
    # Something else lives in the decode engine, so that the blocks get other numbers there.
    decode.reserve(Request(request_id="other", prompt_token_ids=prompts_of((40,))[0], max_tokens=5))
    prefill.add(request, prefill_only=True)
    first = token_ids(run(prefill))[0]
    assert prefill.usage().num_held == 1
    reservation = decode.reserve(request)
    source = prefill.block_table("0")
    target = reservation.block_ids[: len(source)]
    assert source != target
    decode.pool.rows[list(target)] = prefill.pool.rows[list(source)]
    decode.start_reserved("0", first[0])
    assert first + token_ids(run(decode))[0] == stayed
    assert len(logits) == len(stayed_logits)
    assert all(torch.equal(a, b) for a, b in zip(logits, stayed_logits, strict=True))
    assert decode.recomputed_prompt_tokens == 0
    assert prefill.release("0")
    assert prefill.usage().blocks_live == 0
    assert decode.release("other")


def test_half_precision_kv_stays_close_to_float32(tiny: LoadedModel, half: LoadedModel, make_engine: Any) -> None:
    assert half.geometry.dtype == "bfloat16"
    assert half.geometry.bytes_per_token * 2 == tiny.geometry.bytes_per_token
    prompts = prompts_of((40,))
    engine = make_engine(half)
    add_all(engine, half, prompts, 1)
    assert token_ids(run(engine)) == reference(tiny, prompts, 1)


def test_kv_is_announced_once_per_layer_and_token_and_cached_tokens_at_once(make_engine: Any) -> None:
    written: list[tuple[str, int, int, int, int]] = []
    engine = make_engine(max_step_tokens=32, kv_written=lambda *part: written.append(part))
    request = Request(request_id="a", prompt_token_ids=prompts_of((50,))[0], max_tokens=1)
    engine.add(request, prefill_only=True)
    engine.add(Request(request_id="b", prompt_token_ids=prompts_of((20,))[0], max_tokens=1))
    run(engine)
    layers = range(engine.geometry.num_layers)
    assert written == [("a", layer, layer + 1, *part) for part in ((0, 32), (32, 50)) for layer in layers]
    engine.release("a")
    written.clear()
    engine.add(request, prefill_only=True)
    run(engine)
    assert written == [("a", 0, 3, 0, 48), *(("a", layer, layer + 1, 48, 50) for layer in layers)]


def test_a_resumed_request_continues_with_the_same_tokens(make_engine: Any) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=5)
    prompt = prompts_of((20,))[0]
    engine = make_engine()
    engine.add(Request(request_id="0", prompt_token_ids=prompt, max_tokens=16, sampling=sampling))
    whole = token_ids(run(engine))[0]
    engine.add(
        Request(
            request_id="0",
            prompt_token_ids=prompt,
            max_tokens=16,
            sampling=sampling,
            output_token_ids=tuple(whole[:6]),
            attempt=2,
        )
    )
    rest = run(engine)["0"]
    assert [token.token_id for token in rest] == whole[6:]
    assert [token.index for token in rest] == list(range(6, 16))
    assert {token.attempt for token in rest} == {2}
    assert rest[-1].finish_reason is FinishReason.LENGTH


def test_requests_that_never_fit_are_refused_at_once(make_engine: Any) -> None:
    engine = make_engine(num_kv_blocks=4)
    assert engine.max_model_len == 64
    for max_tokens, length in ((8, 60), (1, 64), (1, 600)):
        request = Request(request_id="a", prompt_token_ids=(1,) * length, max_tokens=max_tokens)
        for take in (engine.add, engine.reserve):
            with pytest.raises(PromptTooLong):
                take(request)
    # Prefill alone needs no room for the output, but for the prompt it does.
    engine.add(Request(request_id="a", prompt_token_ids=(1,) * 60, max_tokens=8), prefill_only=True)
    with pytest.raises(PromptTooLong, match="need 5 KV blocks"):
        engine.add(Request(request_id="b", prompt_token_ids=(1,) * 65, max_tokens=8), prefill_only=True)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        engine.add(Request(request_id="c", prompt_token_ids=(10_000,), max_tokens=1))


def test_blocks_that_are_held_make_others_wait_and_not_fail(make_engine: Any) -> None:
    engine = make_engine(num_kv_blocks=4, prefix_cache=False)
    engine.add(Request(request_id="a", prompt_token_ids=(1,) * 60, max_tokens=2), prefill_only=True)
    run(engine)
    engine.add(Request(request_id="b", prompt_token_ids=(2,) * 20, max_tokens=2))
    assert engine.step() is None
    assert engine.has_work()
    with pytest.raises(Overloaded):
        engine.reserve(Request(request_id="c", prompt_token_ids=(2,) * 20, max_tokens=2))
    engine.release("a")
    assert [token.index for token in run(engine)["b"]] == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_their_own_request_alone(
    tmp_path: Path, make_engine: Any, temperature: float
) -> None:
    model = load_model(EngineOptions(model=str(make_tiny_model("llama", tmp_path)), self_check=False))
    with torch.no_grad():
        model.model.get_input_embeddings().weight[7] = torch.nan
    engine = make_engine(model, max_step_tokens=64)
    answers = []
    for _ in range(2):  # the second one would find the prefix of the first in the cache
        for name, token_id in (("bad", 7), ("good", 8)):
            sampling = SamplingParams(temperature=temperature, seed=1)
            prompt = (*range(20, 50), token_id)
            engine.add(Request(request_id=name, prompt_token_ids=prompt, max_tokens=4, sampling=sampling, logprobs=1))
        step = engine.step()
        assert step is not None
        ((failed, error),) = step.failed
        assert (failed, error.code) == ("bad", "engine_failed")
        assert [token.request_id for token in step.tokens] == ["good"]
        answers.append(step.tokens + run(engine)["good"])
    assert [token.token_id for token in answers[0]] == [token.token_id for token in answers[1]]
    assert len(answers[0]) == 4


def test_a_release_inside_the_forward_pass_frees_after_the_step(make_engine: Any) -> None:
    engine: Engine
    released: list[bool] = []

    def release(*_: object) -> None:
        if not released:
            released.append(engine.release("a"))
            assert engine.usage().blocks_live == 2

    engine = make_engine(kv_written=release, prefix_cache=False)
    engine.add(Request(request_id="a", prompt_token_ids=(1,) * 20, max_tokens=2), prefill_only=True)
    step = engine.step()
    assert released == [True]
    assert step is not None
    assert step.tokens == []
    assert engine.usage().blocks_live == 0


def test_a_failed_step_fails_its_sequences_and_frees_their_blocks(make_engine: Any) -> None:
    def fail(*_: object) -> None:
        raise OSError("the link is gone")

    engine = make_engine(kv_written=fail)
    engine.add(Request(request_id="a", prompt_token_ids=(1,) * 20, max_tokens=2), prefill_only=True)
    with pytest.raises(OSError, match="the link is gone") as caught:
        engine.step()
    failed = engine.abandon_step(caught.value).failed
    assert [request_id for request_id, _ in failed] == ["a"]
    assert isinstance(failed[0][1], EngineFailed)
    assert engine.usage().blocks_live == 0
    assert not engine.has_work()


def test_each_step_is_recorded(make_engine: Any) -> None:
    recorder = Recorder("engine")
    engine = make_engine(max_step_tokens=32, recorder=recorder)
    engine.add(Request(request_id="a", prompt_token_ids=(1,) * 40, max_tokens=3))
    run(engine)
    records = list(recorder.recent_steps())
    assert [record.kind for record in records] == ["prefill", "prefill", "decode", "decode"]
    assert [record.num_prefill_tokens for record in records] == [32, 8, 0, 0]
    assert [record.num_context_tokens for record in records] == [32, 40, 41, 42]
    assert [record.num_new_tokens for record in records] == [0, 1, 1, 1]
    assert all(0 < record.run_s <= record.total_s for record in records)
