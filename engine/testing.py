"""Small random models of many architectures, with a fixed seed and a tokenizer, for tests and experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 260  # every byte, and four special tokens
EOS_TOKEN_ID = 257
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 256,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING: dict[str, Any] = {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1}
_ALTERNATING: dict[str, Any] = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,  # keys have 16 + 8
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **_MOE,
}
# Model type -> what its config needs beside the common part. Small windows, so that short prompts reach past them.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "mixtral": {"sliding_window": 24, **_MOE},
    "qwen2": _SLIDING,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": _MOE,
    "gemma": {},
    "gemma2": {**_ALTERNATING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_ALTERNATING, "query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {"sliding_window": 24},
    "olmo": {},
    "olmo2": {},
    "olmo3": _ALTERNATING,
    "olmoe": _MOE,
    "glm": {},
    "glm4": {},
    "granite": {"attention_multiplier": 0.2},
    "granitemoe": {**_MOE, "attention_multiplier": 0.2},
    "stablelm": {},
    "gpt_neox": {},
    "cohere": {},
    "cohere2": _ALTERNATING,
    "gpt_oss": {**_MOE, **_ALTERNATING},
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "deepseek_v3": _MLA,
    "starcoder2": {"sliding_window": 24},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "ernie4_5": {},
    "exaone4": {**_ALTERNATING, "sliding_window_pattern": 2},
    "seed_oss": {},
    "hunyuan_v1_dense": {},
    "arcee": {},
    "nemotron": {},
    "helium": {},
    "dots1": {
        **_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "glm4_moe": {
        **_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "minimax_m2": _MOE,
    "apertus": {},
}
# These settle on a few tokens with the others' weights.
_GAIN = {"gpt_neox": 2.0, "phi": 2.0, "starcoder2": 2.0}


def make_tiny_model(architecture: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of `architecture` with a byte-level tokenizer; returns `directory`.

    `changes` go over its config. Its weights are large enough that attention matters and that greedy outputs do not
    settle on one token.
    """
    config = AutoConfig.for_model(architecture, **{**_COMMON, **ARCHITECTURES[architecture], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    gain = _GAIN.get(architecture, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # norms and biases keep what the model's code gives them
                scale = gain / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.generation_config.eos_token_id = EOS_TOKEN_ID
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """One token per byte, so that any text has an encoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
    )
    fast.save_pretrained(directory)
