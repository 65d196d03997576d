"""Which model types may be served: those that the tests prove, and the reasons why others are refused."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..core.errors import ModelUnsupported

# Each is proven by teacher-forced logits against its own eager attention (tests/engine/test_architectures.py).
SUPPORTED = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "minimax_m2",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)

# Seen to run without an error and yet to be wrong: what the self-check would say, known before any weight is read.
_OTHER_LOGITS = "its logits through the attention interface differ from those of its own attention"
REFUSED = {
    "llama4": f"{_OTHER_LOGITS}: its chunked attention needs masks that do not reach us",
    "llama4_text": f"{_OTHER_LOGITS}: its chunked attention needs masks that do not reach us",
    "phimoe": _OTHER_LOGITS,
    "diffllama": "its layers attend twice, so one KV cache per layer would be overwritten",
    "falcon_h1": "it keeps Mamba state beside its KV, which blocks cannot hold",
}


def check_architecture(config: PretrainedConfig) -> None:
    """Raises: ModelUnsupported: the model type is refused or not proven."""
    if config.is_encoder_decoder:
        raise ModelUnsupported(f"{config.model_type} is an encoder-decoder; only decoder-only models can be served")
    if reason := REFUSED.get(config.model_type):
        raise ModelUnsupported(f"{config.model_type} cannot be served: {reason}")
    if config.model_type not in SUPPORTED:
        raise ModelUnsupported(
            f"model type {config.model_type} is not among those proven to be served right: "
            + ", ".join(sorted(SUPPORTED))
        )
