"""A model split over two ranks is the model: the same logits, the same tokens, half the KV heads on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from splitserve.core.errors import ConfigError, ModelUnsupported
from splitserve.core.logprobs import TokenLogprob
from splitserve.core.request import Request, SamplingParams
from splitserve.engine import loading
from splitserve.engine.architectures import SUPPORTED
from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.parallel.group import RankGroup
from splitserve.engine.parallel.split import check_divides, split
from splitserve.engine.self_check import deviation, eager_check_logits
from splitserve.engine.testing import make_tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..conftest import OpenSplit

# Dense, biased, per-head norms, soft caps and windows, fused projections, mixtures, latent attention, plain gathering.
QUICK = ("llama", "qwen2", "qwen3", "gemma2", "gpt_neox", "glm4", "qwen3_moe", "deepseek_v2", "phi3")
WITHOUT_PLAN = ("gpt_oss", "hunyuan_v1_dense", "stablelm")
REST = sorted(SUPPORTED - set(QUICK) - set(WITHOUT_PLAN))
LENGTHS = (1, 5, 17, 40, 70)


def options_for(path: Path, **changes: Any) -> EngineOptions:
    settings = {"num_kv_blocks": 60, "max_model_len": 128, "max_running": 8, "max_step_tokens": 48, **changes}
    return EngineOptions(model=str(path), **settings)


def run(engine: Engine, max_tokens: int = 8, **sampling: float) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    for i, length in enumerate(LENGTHS):
        prompt = tuple(torch.randint(3, 250, (length,), generator=generator).tolist())
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, max_tokens=max_tokens, sampling=params))
    tokens: list[list[int]] = [[] for _ in LENGTHS]
    while engine.has_work():
        output = engine.step()
        for token in output.tokens if output is not None else ():
            tokens[int(token.request_id)].append(token.token_id)
    assert engine.usage().blocks_live == 0
    return tokens


def check(path: Path, open_split: OpenSplit, monkeypatch: pytest.MonkeyPatch, **sampling: float) -> Engine:
    """Compares logits and tokens of two ranks with those of one."""
    whole = load_model(options_for(path))
    reference = eager_check_logits(whole.model)
    logits: list[Tensor] = []

    def note(model: PreTrainedModel) -> list[Tensor]:
        logits.extend(eager_check_logits(model))
        return logits

    monkeypatch.setattr(loading, "eager_check_logits", note)
    with open_split(options_for(path, tensor_parallel=2)) as engine:
        assert deviation(logits, reference, "float32") < 1e-4
        assert run(engine, **sampling) == run(Engine(whole, options_for(path)), **sampling)
        return engine


@pytest.mark.parametrize("architecture", [*QUICK, *(pytest.param(name, marks=pytest.mark.verify) for name in REST)])
def test_two_ranks_give_the_logits_and_tokens_of_one(
    architecture: str, open_split: OpenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_model(architecture, tmp_path)
    if AutoConfig.from_pretrained(path).base_model_tp_plan is None:
        pytest.skip("this version of transformers has no plan for it")
    check(path, open_split, monkeypatch)


def test_each_rank_holds_its_own_kv_heads(open_split: OpenSplit, tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    whole = load_model(options_for(path))
    with open_split(options_for(path, tensor_parallel=2, self_check=False)) as engine:
        assert [layer.num_kv_heads for layer in engine.geometry.layers] == [1, 1, 1]
        assert engine.geometry.bytes_per_token * 2 == whole.geometry.bytes_per_token


def test_ranks_share_a_kv_head_where_there_are_fewer(
    open_split: OpenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_model("llama", tmp_path, num_key_value_heads=1)
    engine = check(path, open_split, monkeypatch)
    assert [layer.num_kv_heads for layer in engine.geometry.layers] == [1, 1, 1]


def test_sampling_penalties_and_preemption_are_rank_0s_business(
    open_split: OpenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_model("llama", tmp_path)
    check(path, open_split, monkeypatch, temperature=0.9, top_p=0.9, seed=3, frequency_penalty=0.7)
    tight = options_for(path, tensor_parallel=2, self_check=False, num_kv_blocks=7, max_model_len=112)
    with open_split(tight) as engine:
        roomy = options_for(path, self_check=False)
        assert run(engine, max_tokens=40) == run(Engine(load_model(roomy), roomy), max_tokens=40)
        assert engine.preemptions > 0


def test_logprobs_of_prompt_and_answer_are_those_of_one_rank(open_split: OpenSplit, tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    request = Request(request_id="r", prompt_token_ids=tuple(range(3, 60)), max_tokens=4, logprobs=2, prompt_logprobs=2)

    def told(engine: Engine) -> list[TokenLogprob]:
        engine.add(request)
        found: list[TokenLogprob] = []
        while (output := engine.step()) is not None:
            for token in output.tokens:
                found += [*(token.prompt_logprobs or ()), *([token.logprob] if token.logprob else [])]
        return found

    one = options_for(path, self_check=False)
    expected = told(Engine(load_model(one), one))
    with open_split(options_for(path, tensor_parallel=2, self_check=False)) as engine:
        found = told(engine)
    assert [logprob.token_id for logprob in found] == [logprob.token_id for logprob in expected]
    assert len(found) == 56 + 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@pytest.mark.parametrize("architecture", WITHOUT_PLAN)
def test_a_model_without_a_plan_is_refused(architecture: str, tmp_path: Path) -> None:
    path = make_tiny_model(architecture, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ModelUnsupported, match=f"{architecture} cannot be split .* use --tensor-parallel 1"):
        split(model, RankGroup(rank=0, size=2, store=tmp_path / "store"))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "fitting"),
    [(9, 3, 2, "1, 3, 9"), (8, 2, 3, "1, 2, 4, 8"), (12, 4, 3, "1, 2, 4, 12"), (12, 4, 6, "1, 2, 4, 12")],
)
def test_ranks_that_do_not_divide_the_heads_are_refused(heads: int, kv_heads: int, size: int, fitting: str) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=16 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    with pytest.raises(ConfigError, match=f"--tensor-parallel is {size}, .*; use one of {fitting}$"):
        check_divides(config, size)


def test_features_that_do_not_divide_are_named(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama", tmp_path, intermediate_size=97))
    with pytest.raises(ConfigError, match=r"does not divide the 97 features of model\.layers\.0\.mlp\.gate_proj"):
        split(model, RankGroup(rank=0, size=2, store=tmp_path / "store"))
