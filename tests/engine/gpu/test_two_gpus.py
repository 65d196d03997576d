"""A model on two GPUs gives the tokens of one GPU, captured or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
if torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.testing import make_tiny_model

from ..conftest import OpenSplit
from .test_gpu_engine import NEW_TOKENS, make_engine, prompts_for, run

# Dense, per-head norms, soft caps and windows, biases and one fused projection, plain gathering, mixture.
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt_neox", "phi3", "qwen3_moe")


def options_for(path: Path, **changes: object) -> EngineOptions:
    settings: dict[str, object] = {
        "dtype": "float32", "num_kv_blocks": 400, "max_running": 8, "max_step_tokens": 64, "max_model_len": 256,
    }  # fmt: skip
    return EngineOptions(model=str(path), device="cuda", tensor_parallel=2, **{**settings, **changes})  # type: ignore[arg-type]


# A mixture is captured in bfloat16 only, see below.
@pytest.mark.parametrize(
    ("architecture", "graphs"), [(name, name != "qwen3_moe") for name in ARCHITECTURES] + [("llama", False)]
)
def test_two_gpus_give_the_tokens_of_one(
    architecture: str, graphs: bool, open_split: OpenSplit, tmp_path: Path
) -> None:
    path = make_tiny_model(architecture, tmp_path)
    one = make_engine(path, cuda_graphs=False)
    prompts = prompts_for(one.vocab_size)
    expected = run(one, prompts)
    with open_split(options_for(path, cuda_graphs=graphs)) as two:
        two.warm_up()
        assert two.captured == graphs
        assert run(two, prompts) == expected
        if architecture == "llama":
            assert two.geometry.bytes_per_token * 2 == one.geometry.bytes_per_token


def test_gpus_share_a_kv_head_where_there_are_fewer(open_split: OpenSplit, tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path, num_key_value_heads=1)
    one = make_engine(path, cuda_graphs=False)
    prompts = prompts_for(one.vocab_size)
    with open_split(options_for(path)) as two:
        assert run(two, prompts) == run(one, prompts)


def test_sampling_penalties_and_preemption_are_rank_0s_business(open_split: OpenSplit, tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    one = make_engine(path, cuda_graphs=False)
    prompts = prompts_for(one.vocab_size)
    with open_split(options_for(path, num_kv_blocks=22, prefix_cache=False)) as two:
        for sampling in ({"temperature": 0.8, "top_p": 0.9, "seed": 7}, {"frequency_penalty": 1.5}):
            assert run(two, prompts, **sampling) == run(one, prompts, **sampling)
        assert two.preemptions > 0


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_half_precision_is_accepted_and_runs(architecture: str, open_split: OpenSplit, tmp_path: Path) -> None:
    path = make_tiny_model(architecture, tmp_path)
    with open_split(options_for(path, dtype="bfloat16", max_step_tokens=1024, max_model_len=2048)) as two:
        two.warm_up()
        assert two.captured
        tokens = run(two, [*prompts_for(two.vocab_size), [5] * 900])
        assert all(len(found) == NEW_TOKENS for found in tokens)


def test_the_second_gpu_alone_serves_too(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    expected = make_engine(path)
    prompts = prompts_for(expected.vocab_size)
    chosen = EngineOptions(
        model=str(path), device="cuda:1", dtype="float32", num_kv_blocks=400, max_running=8, max_step_tokens=64,
        max_model_len=256,
    )  # fmt: skip
    ours = run(Engine(load_model(chosen), chosen), prompts)
    torch.cuda.set_device(0)
    assert ours == run(expected, prompts)
