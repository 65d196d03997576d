"""The engine on a GPU: the tokens of transformers, captured or not, one step ahead, and no block lost."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from splitserve.core.request import FormatKind, OutputFormat, Request, SamplingParams
from splitserve.engine.engine import Engine
from splitserve.engine.gpu.last_layer import find
from splitserve.engine.gpu.packed import forward
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.outputs import TokenOutput
from splitserve.engine.runner import SequenceTokens
from splitserve.engine.testing import EOS_TOKEN_ID, make_tiny_model

ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "glm4", "granite", "stablelm",
    "gpt_neox", "cohere", "starcoder2", "smollm3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3",
)  # fmt: skip
LENGTHS = (1, 5, 17, 40, 90, 130)
NEW_TOKENS = 24


def make_engine(path: Path, **options: object) -> Engine:
    settings: dict[str, object] = {
        "dtype": "float32", "num_kv_blocks": 400, "max_running": 8, "max_step_tokens": 64, "max_model_len": 256,
    }  # fmt: skip
    chosen = EngineOptions(model=str(path), device="cuda", **{**settings, **options})  # type: ignore[arg-type]
    return Engine(load_model(chosen), chosen)


def prompts_for(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


def run(engine: Engine, prompts: list[list[int]], **sampling: float) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        params = SamplingParams(**({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
        engine.add(Request(request_id=str(i), prompt_token_ids=tuple(prompt), max_tokens=NEW_TOKENS, sampling=params))
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        output = engine.step()
        for token in output.tokens if output is not None else ():
            assert token.index == len(tokens[int(token.request_id)])
            tokens[int(token.request_id)].append(token.token_id)
    usage = engine.usage()
    assert (usage.blocks_live, usage.blocks_granted, engine.num_orphaned_blocks()) == (0, 0, 0)
    return tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate_with_and_without_graphs(architecture: str, tmp_path: Path) -> None:
    make_tiny_model(architecture, tmp_path)
    captured = make_engine(tmp_path)
    prompts = prompts_for(captured.vocab_size)
    ours = run(captured, prompts)
    assert run(make_engine(tmp_path, cuda_graphs=False), prompts) == ours
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").cuda()
    for prompt, mine in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        theirs = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert mine == theirs[0, len(prompt) :].tolist()
    assert len({token for tokens in ours for token in tokens}) >= 8


def test_half_precision_is_accepted_and_runs(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    engine = make_engine(tmp_path, dtype="bfloat16")
    tokens = run(engine, prompts_for(engine.vocab_size))
    assert all(len(found) == NEW_TOKENS for found in tokens)


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_their_own_request_alone(
    tmp_path: Path, temperature: float, cuda_graphs: bool
) -> None:
    """Also where the step behind the one that fails runs already."""
    options = EngineOptions(
        model=str(make_tiny_model("llama", tmp_path)), device="cuda", dtype="float32", num_kv_blocks=400,
        max_running=8, max_step_tokens=64, max_model_len=256, self_check=False, cuda_graphs=cuda_graphs,
    )  # fmt: skip
    loaded = load_model(options)
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[7] = torch.nan
    engine = Engine(loaded, options)
    sampling = SamplingParams(temperature=temperature, seed=1)
    answers: list[list[int]] = []
    for _ in range(2):  # the second one would find the prefix of the first in the cache
        for name, token_id in (("bad", 7), ("good", 8)):
            prompt = (*range(20, 50), token_id)
            engine.add(Request(request_id=name, prompt_token_ids=prompt, max_tokens=4, sampling=sampling))
        failed, tokens = [], []
        while engine.has_work():
            output = engine.step()
            assert output is not None
            failed += [(name, error.code) for name, error in output.failed]
            assert {token.request_id for token in output.tokens} <= {"good"}
            tokens += [token.token_id for token in output.tokens]
        assert failed == [("bad", "engine_failed")]
        answers.append(tokens)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4
    assert (engine.usage().blocks_live, engine.num_orphaned_blocks()) == (0, 0)


def test_sampling_depends_on_neither_batch_nor_graphs(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    engine = make_engine(tmp_path)
    prompts = prompts_for(engine.vocab_size)
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
    together = run(engine, prompts, **sampling)
    assert [run(engine, [prompt], **sampling)[0] for prompt in prompts] == together
    assert run(make_engine(tmp_path, cuda_graphs=False), prompts, **sampling) == together


def test_penalties_see_every_token(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    engine = make_engine(tmp_path)
    host = EngineOptions(model=str(tmp_path), num_kv_blocks=400, max_step_tokens=64, max_model_len=256)
    prompts = prompts_for(engine.vocab_size)
    penalties = {"frequency_penalty": 1.5, "repetition_penalty": 1.3}
    assert run(engine, prompts, **penalties) == run(Engine(load_model(host), host), prompts, **penalties)


def mixed_requests(prompts: list[list[int]]) -> list[Request]:
    """One of everything that leaves the captured graphs, and plain ones beside them."""
    sampled = SamplingParams(temperature=0.9, seed=3)
    biased = SamplingParams(temperature=0.9, seed=3, logit_bias=((9, 3.0), (EOS_TOKEN_ID, 8.0)))
    stops = frozenset({EOS_TOKEN_ID})
    json_object = OutputFormat(kind=FormatKind.JSON_OBJECT)
    options: list[dict[str, object]] = [
        {},
        {"sampling": sampled, "logprobs": 4, "prompt_logprobs": 2},
        {"sampling": biased, "min_tokens": 6, "stop_token_ids": stops},
        {"sampling": sampled, "output_format": json_object, "stop_token_ids": stops, "logprobs": 0},
        {"sampling": sampled},
        {"output_format": OutputFormat(kind=FormatKind.REGEX, source="[a-f]{5,9}"), "stop_token_ids": stops},
    ]
    return [
        Request(request_id=str(i), prompt_token_ids=tuple(prompt), max_tokens=NEW_TOKENS, **more)  # type: ignore[arg-type]
        for i, (prompt, more) in enumerate(zip(prompts, options, strict=True))
    ]


def outputs_of(engine: Engine, requests: list[Request]) -> dict[str, list[TokenOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        step = engine.step()
        assert step is None or not step.failed
        for token in step.tokens if step is not None else ():
            outputs[token.request_id].append(token)
    return outputs


def test_formats_bias_and_logprobs_are_those_of_the_host(tmp_path: Path) -> None:
    """Captured or not, one step ahead or not: as the engine on a CPU answers."""
    make_tiny_model("llama", tmp_path)
    chosen = EngineOptions(model=str(tmp_path), num_kv_blocks=400, max_step_tokens=64, max_model_len=256)
    host = Engine(load_model(chosen), chosen)
    requests = mixed_requests(prompts_for(host.vocab_size))
    expected = outputs_of(host, requests)
    for graphs in (True, False):
        found = outputs_of(make_engine(tmp_path, cuda_graphs=graphs), requests)
        for request_id, theirs in expected.items():
            ours = found[request_id]
            assert [token.token_id for token in ours] == [token.token_id for token in theirs]
            for mine, other in zip(ours, theirs, strict=True):
                pairs = zip(mine.prompt_logprobs, other.prompt_logprobs, strict=True)
                for a, b in [(mine.logprob, other.logprob), *pairs]:
                    assert (a is None) == (b is None)
                    if a is not None and b is not None:
                        assert (a.token_id, a.rank, len(a.top)) == (b.token_id, b.rank, len(b.top))
                        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
def test_the_last_layer_goes_on_with_wanted_rows_only(architecture: str, tmp_path: Path) -> None:
    make_tiny_model(architecture, tmp_path)
    chosen = EngineOptions(
        model=str(tmp_path), device="cuda", dtype="float32", num_kv_blocks=40, max_model_len=256, cuda_graphs=False
    )
    loaded = load_model(chosen)
    engine, model = Engine(loaded, chosen), loaded.model
    last = find(model)
    assert last is not None
    sequence = SequenceTokens(request_id="r", token_ids=range(3, 43), start=0, block_table=range(3))
    for rows in ([39], [4, 0, 17], []):
        found = forward(model, engine.pool, [sequence], rows)
        every = forward(model, engine.pool, [sequence], range(40))
        torch.testing.assert_close(found, every[rows], rtol=1e-4, atol=1e-4)
    assert last.rows is None


def test_greedy_is_the_same_after_preemption(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    roomy = make_engine(tmp_path, prefix_cache=False)
    prompts = prompts_for(roomy.vocab_size)
    tight = make_engine(tmp_path, prefix_cache=False, num_kv_blocks=22)
    assert run(tight, prompts) == run(roomy, prompts)
    assert tight.preemptions > 0


def test_whole_prompts_through_cudnn_equal_chunks_through_our_kernel(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    generator = torch.Generator().manual_seed(3)
    for n in (600, 1500, 2047):
        options = {"dtype": "bfloat16", "max_model_len": 2048, "num_kv_blocks": 600}
        whole = make_engine(tmp_path, max_step_tokens=2048, **options)
        eager = make_engine(tmp_path, max_step_tokens=2048, cuda_graphs=False, **options)
        chunks = make_engine(tmp_path, max_step_tokens=100, cuda_graphs=False, **options)
        prompt = torch.randint(3, whole.vocab_size, (n,), generator=generator).tolist()
        for engine in (whole, eager, chunks):
            engine.add(Request(request_id="r", prompt_token_ids=tuple(prompt), max_tokens=1), prefill_only=True)
            while engine.step() is not None:
                pass
        full = n // 16  # the last block's padding differs
        kv = [
            engine.pool.rows[list(engine.block_table("r")[:full])].view(torch.bfloat16).float()
            for engine in (whole, eager, chunks)
        ]
        for other in kv[:2]:
            assert (other - kv[2]).norm() / kv[2].norm() < 2e-2


def test_layers_are_announced_in_order_when_their_kv_is_there(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    for prompt, graphs in ((50, True), (900, True), (900, False)):
        chosen = EngineOptions(
            model=str(tmp_path), device="cuda", num_kv_blocks=400, max_step_tokens=2048, cuda_graphs=graphs
        )
        loaded = load_model(chosen)
        written: queue.SimpleQueue[tuple[str, int, int, int, int]] = queue.SimpleQueue()
        engine = Engine(loaded, chosen, kv_written=lambda *what, written=written: written.put(what))
        for name, token_id in (("r", 5), ("s", 6)):
            request = Request(request_id=name, prompt_token_ids=(token_id,) * prompt, max_tokens=2)
            engine.add(request, prefill_only=True)
            while engine.step() is not None:
                pass
        for name in ("r", "s"):  # in one queue: whatever else were said of the first would come before the second
            layer = 0
            while layer < loaded.geometry.num_layers:
                request_id, first, layer_end, start, end = written.get(timeout=10)
                assert (request_id, first, start, end) == (name, layer, 0, prompt)
                layer = layer_end
