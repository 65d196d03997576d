"""Which model types may be served: those that the tests prove, and the reasons why others are refused."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..core.errors import ModelUnsupported

# Each is proven by teacher-forced logits against its own eager attention (tests/engine/test_architectures.py).
SUPPORTED = frozenset({"llama"})

# They run and give wrong logits, or their state is more than a KV cache.
REFUSED = {
    "llama4": "its chunked attention layers need a mask that the attention interface does not carry",
    "phimoe": "its router and attention give other logits through the attention interface",
    "diffllama": "its differential attention splits values after the attention interface",
    "falcon_h1": "its Mamba state cannot be kept in KV blocks",
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
