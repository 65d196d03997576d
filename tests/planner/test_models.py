"""What a model weighs, against what its authors publish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from splitserve.core.errors import ConfigError, ModelUnsupported
from splitserve.planner.models import load_model, model_from_config, model_names

# Billions of parameters as counted in the published checkpoints.
PUBLISHED = {
    "smollm2-135m": 0.1345,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.9,
    "mixtral-8x7b": 46.70,
    "qwen2.5-7b": 7.616,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.1,
    "deepseek-v2-lite": 15.71,
    "deepseek-v3": 671.0,
    "gpt-oss-120b": 116.8,
    "gemma-2-9b": 9.24,
    "bloom-176b": 176.2,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoint(name: str) -> None:
    assert load_model(name).num_parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_every_built_in_model_has_a_plausible_size() -> None:
    assert len(model_names()) >= 30
    for name in model_names():
        spec = load_model(name)
        assert 1e8 < spec.active_parameters < spec.num_parameters * 1.01 < 2e12


def test_kv_bytes_count_grouped_heads_and_latent_attention() -> None:
    assert load_model("llama-3.1-8b").kv_bytes_per_token("bfloat16") == 131_072  # 2 x 32 layers x 8 heads x 128 x 2
    assert load_model("llama-2-7b").kv_bytes_per_token("bfloat16") == 524_288  # every head has its own
    assert load_model("deepseek-v3").kv_bytes_per_token("bfloat16") == 61 * (512 + 64) * 2
    assert load_model("llama-3.1-8b").kv_bytes_per_token("fp8") == 65_536


def test_ranks_beyond_the_kv_heads_hold_copies() -> None:
    qwen = load_model("qwen3-30b-a3b")  # 4 KV heads
    assert [qwen.kv_copies(tp) for tp in (1, 2, 4, 8)] == [1, 1, 1, 2]
    assert load_model("deepseek-v3").kv_copies(8) == 8  # a latent vector cannot be split


def test_a_token_is_multiplied_with_its_own_experts_only() -> None:
    moe = load_model("qwen3-30b-a3b")
    assert moe.active_parameters + moe.head_parameters == pytest.approx(3.04e9, rel=0.01)
    assert moe.weight_bytes("fp8") == pytest.approx(moe.num_parameters * 1.016, rel=0.03)


def test_a_config_json_is_read_like_a_built_in_model(tmp_path: Path) -> None:
    config = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "quantization_config": {"quant_method": "fp8"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_model(str(tmp_path))
    assert spec.num_parameters == load_model("llama-3.1-8b").num_parameters
    assert spec.quantization == "fp8"
    assert spec.source == str(tmp_path)


def test_a_model_is_described_by_its_numbers_alone() -> None:
    fields = "num_hidden_layers=32,hidden_size=4096,num_attention_heads=32,num_key_value_heads=8"
    spec = load_model(f"{fields},intermediate_size=14336,vocab_size=128256")
    assert spec.num_parameters == load_model("llama-3.1-8b").num_parameters
    tied = load_model(f"{fields},intermediate_size=14336,vocab_size=128256,tie_word_embeddings=true")
    assert tied.num_parameters == spec.num_parameters - spec.head_parameters


def test_sliding_layers_are_counted_however_the_config_says_it() -> None:
    base = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "vocab_size": 100}
    kinds = ["sliding_attention", "full_attention"] * 6
    assert model_from_config("m", {**base, "sliding_window": 8, "layer_types": kinds}).num_sliding_layers == 6
    assert model_from_config("m", {**base, "sliding_window": 8, "sliding_window_pattern": 6}).num_sliding_layers == 10
    assert model_from_config("m", {**base, "sliding_window": 8, "model_type": "gemma2"}).num_sliding_layers == 6
    assert model_from_config("m", {**base, "sliding_window": 0}).num_sliding_layers == 0
    unused = {**base, "sliding_window": 8, "use_sliding_window": False}
    assert model_from_config("m", unused).num_sliding_layers == 0


def test_bad_names_and_configs_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean llama-3\.1-8b\?"):
        load_model("lama-3.1-8b")
    with pytest.raises(ConfigError, match="no num_hidden_layers"):
        model_from_config("m", {"hidden_size": 64, "num_attention_heads": 4})
    with pytest.raises(ConfigError, match="must be a whole number"):
        model_from_config("m", {"hidden_size": "64", "num_attention_heads": 4})
    full = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    model_from_config("m", {**full, "text_config": None})
    for changes, message in (
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number of at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 2}, "head_dim is 0"),
        ({"text_config": 3}, "text_config is '3'"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
        ({"sliding_window": "abc"}, "sliding_window is 'abc'"),
        ({"sliding_window": 8, "sliding_window_pattern": "LLLG"}, "sliding_window_pattern is .LLLG."),
        ({"sliding_window": 8, "layer_types": 5}, "layer_types is 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_from_config("m", {**full, **changes})
    with pytest.raises(ModelUnsupported, match="encoder-decoder"):
        model_from_config("m", {"is_encoder_decoder": True})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"its config is '\[\]'"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_model(str(tmp_path))
