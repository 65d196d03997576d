"""The allow-list is proven: logits through paged KV equal those of each model's own eager attention."""

from pathlib import Path

import pytest
import torch
from splitserve.core.errors import ModelUnsupported
from splitserve.core.request import Request
from splitserve.engine import self_check
from splitserve.engine.architectures import REFUSED, SUPPORTED, check_architecture
from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.self_check import eager_logits, paged_logits, relative_error
from splitserve.engine.testing import ARCHITECTURES, make_tiny_model
from transformers import AutoConfig

NEW_TOKENS = 24
# One of each way to attend; `make verify` runs the rest.
QUICK = {
    "cohere2",
    "deepseek_v2",
    "ernie4_5",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
}


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def test_what_is_allowed_is_what_is_tested() -> None:
    assert frozenset(ARCHITECTURES) == SUPPORTED
    assert not SUPPORTED & REFUSED.keys()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.verify) for name in sorted(ARCHITECTURES)],
)
def test_logits_and_greedy_tokens_equal_the_models_own(architecture: str, tmp_path: Path) -> None:
    make_tiny_model(architecture, tmp_path)
    options = EngineOptions(model=str(tmp_path), self_check=False, num_kv_blocks=32, max_step_tokens=23)
    loaded = load_model(options)
    prompts = random_prompts(70, 37)  # past the sliding windows of 24

    reference = eager_logits(loaded.model, prompts)
    errors = []
    for corrupt_block in (False, True):
        ours = paged_logits(loaded.model, loaded.geometry, prompts, corrupt_block)
        errors.append(max(relative_error(a, b) for a, b in zip(ours, reference, strict=True)))
    assert errors[0] < 1e-4
    assert errors[1] > 1e-2, "the negative control, one corrupted block, went unnoticed"

    engine = Engine(loaded, options)
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=tuple(prompt), max_tokens=NEW_TOKENS))
    outputs: dict[str, list[int]] = {"0": [], "1": []}
    while engine.has_work():
        step = engine.step()
        assert step is not None
        for token in step.tokens:
            outputs[token.request_id].append(token.token_id)
    # Teacher-forced: at each position the token is the one that eager attention finds best.
    sequences = [prompt + outputs[str(i)] for i, prompt in enumerate(prompts)]
    for prompt, sequence, logits in zip(prompts, sequences, eager_logits(loaded.model, sequences), strict=True):
        assert sequence[len(prompt) :] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert len({token for output in outputs.values() for token in output}) >= 8


@pytest.mark.parametrize("architecture", [*sorted(REFUSED), "bart", "t5", "mamba"])
def test_models_that_would_be_served_wrong_are_refused(architecture: str) -> None:
    with pytest.raises(ModelUnsupported, match=architecture):
        check_architecture(AutoConfig.for_model(architecture))


def test_the_self_check_refuses_a_model_whose_attention_we_get_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 without its soft cap, which is what PyTorch's own attention would make of it."""
    make_tiny_model("gemma2", tmp_path)
    load_model(EngineOptions(model=str(tmp_path)))
    attend = self_check.forward

    def without_cap(model, *arguments, **more):  # type: ignore[no-untyped-def]
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = None
        try:
            return attend(model, *arguments, **more)
        finally:
            for module in model.modules():
                if hasattr(module, "attn_logit_softcapping"):
                    module.attn_logit_softcapping = 2.0

    monkeypatch.setattr(self_check, "forward", without_cap)
    with pytest.raises(ModelUnsupported, match="logits through the paged KV cache differ"):
        load_model(EngineOptions(model=str(tmp_path)))
