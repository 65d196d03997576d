"""The last layer may leave out the tokens whose logits nobody wants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from splitserve.engine.gpu.last_layer import LastLayer, find, logits_of
from splitserve.engine.testing import make_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


class PlainNorm:
    """What a fused norm offers, by the model's own code."""

    def __init__(self, norm: nn.Module) -> None:
        self._norm = norm

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x + residual, self._norm(x + residual)

    def add_ahead(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


@pytest.fixture(params=["llama", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    make_tiny_model(request.param, tmp_path)
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    return made


@contextmanager
def rows_of_the_mlp(layer: nn.Module) -> Iterator[list[int]]:
    seen: list[int] = []
    hook = layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))  # type: ignore[union-attr]
    yield seen
    hook.remove()


@torch.inference_mode()
def test_wanted_rows_have_their_logits_and_the_others_are_not_computed(model: PreTrainedModel) -> None:
    ids = torch.arange(3, 12)[None]
    every = logits_of(model, None, input_ids=ids, use_cache=False)
    layer = model.base_model.layers[-1]
    layer.forward = LastLayer(layer, PlainNorm(layer.post_attention_layernorm), PlainNorm(model.base_model.norm))
    assert find(model) is layer.forward
    with rows_of_the_mlp(layer) as computed:
        for wanted in ([8], [2, 0, 5], []):
            logits = logits_of(model, torch.tensor(wanted, dtype=torch.int64), input_ids=ids, use_cache=False)
            assert logits.shape == (1, len(wanted), every.shape[2])
            torch.testing.assert_close(logits, every[:, wanted])
        torch.testing.assert_close(logits_of(model, None, input_ids=ids, use_cache=False), every)
    assert computed == [1, 3, 1, 9]


@torch.inference_mode()
def test_a_failed_pass_leaves_no_rows_behind(model: PreTrainedModel) -> None:
    layer = model.base_model.layers[-1]
    layer.forward = LastLayer(layer, PlainNorm(layer.post_attention_layernorm), PlainNorm(model.base_model.norm))
    with pytest.raises(IndexError):
        logits_of(model, torch.tensor([9]), input_ids=torch.tensor([[3, 4]]), use_cache=False)
    assert layer.forward.rows is None


@torch.inference_mode()
def test_a_model_that_was_not_fused_chooses_rows_behind_its_last_layer(model: PreTrainedModel) -> None:
    ids = torch.arange(3, 9)[None]
    rows = torch.tensor([5, 1])
    found = logits_of(model, rows, input_ids=ids, use_cache=False)
    torch.testing.assert_close(found, logits_of(model, None, input_ids=ids, use_cache=False)[:, rows])
