"""The load-time self-check: good models pass in every dtype, attention that is wrong in any one way does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from splitserve.core.errors import ModelUnsupported
from splitserve.engine import attention, loading, testing
from splitserve.engine.attention import AttentionRules, DecodeBatch
from splitserve.engine.cpu_attention import DecodeKernel
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.pool import KvPool
from splitserve.engine.testing import make_tiny_model
from torch import Tensor

REFUSAL = "logits through the paged KV cache differ from the model's own attention"


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ModelUnsupported, match=REFUSAL) as error:
        load_model(EngineOptions(model=str(path), **options))
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_good_model_is_accepted_and_a_wrong_scale_is_not(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model("llama", tmp_path)
    load_model(EngineOptions(model=str(tmp_path), dtype=dtype))  # type: ignore[arg-type]
    monkeypatch.setattr(
        attention, "AttentionRules", lambda **rules: AttentionRules(**{**rules, "scaling": 1.5 * rules["scaling"]})
    )
    message = refused(tmp_path, dtype=dtype)
    assert message.startswith("llama: ")
    assert "serving it would give wrong answers" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "rule"), [("gemma2", "softcap"), ("mistral", "sliding_window"), ("gpt_oss", "sinks")]
)
def test_a_rule_that_we_ignored_is_noticed(
    architecture: str, rule: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model(architecture, tmp_path)
    load_model(EngineOptions(model=str(tmp_path), dtype=dtype))  # type: ignore[arg-type]
    monkeypatch.setattr(attention, "AttentionRules", lambda **rules: AttentionRules(**{**rules, rule: None}))
    refused(tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("mixtral", "bfloat16"),
        ("mixtral", "float16"),
        ("qwen3_moe", "bfloat16"),
        ("deepseek_v3", "bfloat16"),
        ("dots1", "float16"),
    ],
)
def test_a_mixture_whose_rounding_chooses_another_expert_is_accepted(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    make_tiny_model(architecture, tmp_path)
    load_model(EngineOptions(model=str(tmp_path), dtype=dtype))  # type: ignore[arg-type]


def _sees_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = DecodeKernel.attend

    def padded(kernel: DecodeKernel, query: Tensor, pool: KvPool, *arguments: Any, **rules: Any) -> Tensor:
        layer, tables, positions = arguments
        return attend(kernel, query, pool, layer, tables, positions // pool.block_size * pool.block_size + 15, **rules)

    monkeypatch.setattr(DecodeKernel, "attend", padded)


def _sees_padding_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(batch: DecodeBatch, _: int | None, dtype: torch.dtype, block_size: int) -> Tensor:
        return torch.zeros(batch.num_sequences, 1, 1, batch.block_tables.shape[1] * block_size, dtype=dtype)

    monkeypatch.setattr(DecodeBatch, "mask", mask)
    monkeypatch.setattr(attention, "decode_kernel", lambda: None)


def _swaps_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = KvPool.gather
    monkeypatch.setattr(KvPool, "gather", lambda pool, layer, tables: gather(pool, layer, tables.flip(1)))


def _is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *arguments: attend(*arguments) * float("nan"))


def _swaps_blocks_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = DecodeKernel.attend

    def swapped(kernel: DecodeKernel, query: Tensor, pool: KvPool, *arguments: Any, **rules: Any) -> Tensor:
        layer, tables, positions = arguments
        return attend(kernel, query, pool, layer, tables.flip(1), positions, **rules)

    monkeypatch.setattr(DecodeKernel, "attend", swapped)


@pytest.mark.parametrize(
    "break_it",
    [
        _sees_padding,
        _sees_padding_without_the_kernel,
        _swaps_blocks,
        _swaps_blocks_in_the_kernel,
        _is_not_a_number,
    ],
)
def test_wrong_paging_is_noticed(
    break_it: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model("llama", tmp_path)
    break_it(monkeypatch)
    refused(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        ("llama4_text", {"num_local_experts": 4, "attention_chunk_size": 16, "no_rope_layers": [1, 1, 0]}, REFUSAL),
        ("diffllama", {}, "attends more than once"),
    ],
)
def test_it_would_refuse_what_the_list_refuses(
    architecture: str, config: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is the first line; an update of transformers may change a model behind its back."""
    monkeypatch.setitem(testing.ARCHITECTURES, architecture, config)
    monkeypatch.setattr(loading, "check_architecture", lambda _: None)
    make_tiny_model(architecture, tmp_path)
    with pytest.raises(ModelUnsupported, match=reason):
        load_model(EngineOptions(model=str(tmp_path)))
