"""Every way to a model's files leads to a GPU: a GGUF file and a directory, in each dtype; what can be captured is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.testing import make_tiny_model

from .test_gpu_engine import NEW_TOKENS, make_engine, prompts_for, run

_HIDDEN, _INNER, _HEADS, _KV_HEADS, _LAYERS = 64, 96, 4, 2, 2


def make_gguf(path: Path) -> Path:
    """A random llama with a byte vocabulary in one GGUF file."""
    gguf = pytest.importorskip("gguf")
    letters = [bytes([value]).decode("latin-1") for value in range(256)] + ["<s>", "</s>", "<unk>", "ab", "bc"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 256 + [3] * 3 + [1] * 2)
    writer.add_token_merges(["a b", "b c"])  # transformers 5.17 cannot read a single one
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = generator.standard_normal(shape) * 1.5 / shape[-1] ** 0.5 if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(name, values.astype(np.float32))

    add("token_embd.weight", len(letters), _HIDDEN)
    add("output.weight", len(letters), _HIDDEN)
    add("output_norm.weight", _HIDDEN)
    kv = _HIDDEN // _HEADS * _KV_HEADS
    for i in range(_LAYERS):
        for name, shape in {
            "attn_norm": (_HIDDEN,), "ffn_norm": (_HIDDEN,), "attn_q": (_HIDDEN, _HIDDEN), "attn_k": (kv, _HIDDEN),
            "attn_v": (kv, _HIDDEN), "attn_output": (_HIDDEN, _HIDDEN), "ffn_gate": (_INNER, _HIDDEN),
            "ffn_up": (_INNER, _HIDDEN), "ffn_down": (_HIDDEN, _INNER),
        }.items():  # fmt: skip
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_same_tokens_on_both_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = make_gguf(tmp_path / "tiny.gguf")
    host = EngineOptions(model=str(path), num_kv_blocks=400, max_step_tokens=64, max_model_len=256)
    expected = Engine(load_model(host), host)
    prompts = prompts_for(expected.vocab_size)
    assert run(make_engine(path), prompts) == run(expected, prompts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_is_accepted_and_captured(dtype: str, tmp_path: Path) -> None:
    engine = make_engine(make_tiny_model("llama", tmp_path), dtype=dtype)
    assert engine.captured
    assert all(len(tokens) == NEW_TOKENS for tokens in run(engine, prompts_for(engine.vocab_size)))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_mixture_in_bfloat16_is_captured(architecture: str, tmp_path: Path) -> None:
    engine = make_engine(make_tiny_model(architecture, tmp_path), dtype="bfloat16")
    assert engine.captured
    assert all(len(tokens) == NEW_TOKENS for tokens in run(engine, prompts_for(engine.vocab_size)))
