"""The allow-list is proven: logits and tokens through paged KV equal those of unmodified transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from splitserve.core.errors import ModelUnsupported
from splitserve.core.request import Request
from splitserve.engine.architectures import REFUSED, SUPPORTED, max_positions
from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.self_check import paged_logits, relative_error
from splitserve.engine.testing import ARCHITECTURES, make_tiny_model
from splitserve.planner.models import model_from_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

NEW_TOKENS = 24
LENGTHS = (70, 37, 5)  # past the sliding windows of 24, and one inside them
TOLERANCE = 1e-4


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def largest_error(ours: list[Tensor], reference: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, reference, strict=True))


def run_greedy(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts batched together."""
    outputs: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=tuple(prompt), max_tokens=NEW_TOKENS))
    while engine.has_work():
        step = engine.step()
        assert step is not None
        for token in step.tokens:
            outputs[int(token.request_id)].append(token.token_id)
    return outputs


@torch.inference_mode()
def generate(model: Any, prompt: list[int]) -> list[int]:
    """`model.generate` past every end-of-sequence token, so that each prompt gives as many tokens to compare."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=258
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_what_is_allowed_is_what_is_tested() -> None:
    assert frozenset(ARCHITECTURES) == SUPPORTED
    assert not SUPPORTED & REFUSED.keys()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_logits_and_greedy_tokens_equal_the_models_own(architecture: str, tmp_path: Path) -> None:
    make_tiny_model(architecture, tmp_path)
    options = EngineOptions(model=str(tmp_path), self_check=False, num_kv_blocks=32, max_step_tokens=17)
    loaded = load_model(options)
    # Loaded apart, so that nothing that we change in a model can change its reference too.
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    prompts = prompts_of(LENGTHS)

    with torch.inference_mode():
        reference = [plain(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]
    assert largest_error(paged_logits(loaded.model, loaded.geometry, prompts), reference) < TOLERANCE
    corrupted = paged_logits(loaded.model, loaded.geometry, prompts, corrupt_block=True)
    assert largest_error(corrupted, reference) > 100 * TOLERANCE, "one corrupted block went unnoticed"

    expected = [generate(plain, prompt) for prompt in prompts]
    assert run_greedy(Engine(loaded, options), prompts) == expected
    assert min(len(set(tokens)) for tokens in expected) >= 8, "an output of few tokens proves little"


def test_a_block_corrupted_under_a_running_engine_changes_its_tokens(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    options = EngineOptions(model=str(tmp_path), num_kv_blocks=32, max_step_tokens=17)
    engine = Engine(load_model(options), options)
    prompt = prompts_of((70,))
    expected = run_greedy(engine, prompt)

    engine = Engine(load_model(options), options)
    engine.add(Request(request_id="corrupted", prompt_token_ids=tuple(prompt[0]), max_tokens=NEW_TOKENS))
    tokens: list[int] = []
    while engine.has_work():
        step = engine.step()
        assert step is not None
        tokens += [token.token_id for token in step.tokens]
        if len(tokens) == 8:
            engine.pool.rows[engine.block_table("corrupted")[0]] = 0
    assert tokens[:8] == expected[0][:8]
    assert tokens != expected[0]


def test_key_and_value_dims_of_mla_differ(tmp_path: Path) -> None:
    make_tiny_model("deepseek_v3", tmp_path)
    layer = load_model(EngineOptions(model=str(tmp_path))).geometry.layers[0]
    assert (layer.num_kv_heads, layer.key_dim, layer.value_dim) == (4, 24, 20)


@pytest.mark.parametrize(
    "architecture", [name for name, needs in ARCHITECTURES.items() if not any("expert" in key for key in needs)]
)
def test_the_planner_knows_what_a_config_json_leaves_to_its_model_type(architecture: str) -> None:
    """Matrices of each feed-forward, tied embeddings and layers with windows, where the file does not say so."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": 300}
    config = AutoConfig.for_model(architecture, **sizes, pad_token_id=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    left_out = {"tie_word_embeddings", "layer_types", "_sliding_window_pattern"}
    spec = model_from_config("m", {key: value for key, value in config.to_dict().items() if key not in left_out})
    assert spec.num_parameters == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        assert spec.num_sliding_layers == kinds.count("sliding_attention")


@pytest.mark.parametrize("architecture", [*sorted(REFUSED), "bart", "t5", "mamba", "gpt2"])
def test_models_that_would_be_served_wrong_are_refused_before_their_weights_are_read(
    architecture: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # reading it would be a ModelLoadFailed
    with pytest.raises(ModelUnsupported) as error:
        load_model(EngineOptions(model=str(tmp_path)))
    reason = REFUSED.get(architecture, "encoder-decoder" if architecture in ("bart", "t5") else "not proven")
    for part in (architecture, reason, "serve a model of one of these types", "llama"):
        assert part in str(error.value)


def test_longrope_ends_where_its_frequencies_would_change(tmp_path: Path) -> None:
    published = {  # as the model's authors wrote it, before transformers gathered these in `rope_parameters`
        "model_type": "phi3",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published))
    assert max_positions(AutoConfig.from_pretrained(tmp_path)) == 64
    path.write_text(json.dumps({**published, "rope_scaling": None}))
    assert max_positions(AutoConfig.from_pretrained(tmp_path)) == 2048
