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

# Seen to run without an error and yet to be wrong, or to fail late: known here before any weight is read.
_CHUNKED = "its chunked attention needs masks that do not reach our attention function"
REFUSED = {
    "llama4": _CHUNKED,
    "llama4_text": _CHUNKED,
    "phimoe": "its rotary embedding follows the longest sequence of a batch, so sequences would change each other",
    "diffllama": "its layers attend twice, so one KV cache per layer would be overwritten",
    "falcon_h1": "it keeps Mamba state beside its KV, which blocks cannot hold",
}


def check_architecture(config: PretrainedConfig) -> None:
    """Raises: ModelUnsupported: the model type is refused or not proven."""
    instead = f"serve a model of one of these types: {', '.join(sorted(SUPPORTED))}"
    if config.is_encoder_decoder:
        raise ModelUnsupported(
            f"{config.model_type} is an encoder-decoder; only decoder-only models can be served; {instead}"
        )
    if reason := REFUSED.get(config.model_type):
        raise ModelUnsupported(f"{config.model_type} cannot be served: {reason}; {instead}")
    if config.model_type not in SUPPORTED:
        raise ModelUnsupported(f"model type {config.model_type} is not proven to be served right; {instead}")


def max_positions(config: PretrainedConfig) -> int:
    """Tokens that one sequence may hold.

    LongRoPE picks one set of frequencies for all tokens of a forward pass, by the largest position among them. Past the
    original length a sequence would invalidate its own KV and change its neighbours in the batch, so it ends there.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set for the model, or one for each type of layer.
    ropes = (parameters, *(value for value in parameters.values() if isinstance(value, dict)))
    longrope = [rope for rope in ropes if rope.get("rope_type") == "longrope"]
    limit = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    return min([limit, *(int(rope["original_max_position_embeddings"]) for rope in longrope)])
