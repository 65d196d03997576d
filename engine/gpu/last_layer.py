"""The last layer for those tokens only whose logits are wanted: the others have left their KV when it attends.

Of a prompt, its last token is wanted. The rest of the layer behind attention and output projection is 4 of 212 ms for
8,192 tokens of Llama-3.1-8B's shape on an H200.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class LastLayer:
    """A fused layer's forward that may be told which tokens go on; the model's thread alone calls."""

    def __init__(self, layer: Any, between: Any, after: Any) -> None:
        """`between` and `after` are the fused norms behind its attention and behind the layer."""
        self._layer = layer
        self.between = between
        self.after = after
        self.rows: Tensor | None = None  # [n] int64 places among the packed tokens; None: all

    def __call__(self, hidden_states: Tensor, **named: Any) -> Tensor:
        """[1, tokens, size] -> [1, n, size]."""
        attended, _ = self._layer.self_attn(hidden_states=self._layer.input_layernorm(hidden_states), **named)
        if self.rows is not None:
            attended, hidden_states = attended[:, self.rows], hidden_states[:, self.rows]
        residual, x = self.between.add(attended, hidden_states)
        total: Tensor = self.after.add_ahead(self._layer.mlp(x), residual)
        return total


def find(model: PreTrainedModel) -> LastLayer | None:
    """The model's last layer, if it was fused so."""
    layers = getattr(model.base_model, "layers", None)
    forward = getattr(layers[-1], "forward", None) if layers else None
    return forward if isinstance(forward, LastLayer) else None


def logits_of(model: PreTrainedModel, rows: Tensor | None, **inputs: Any) -> Tensor:
    """[1, n, vocab]: the logits of the packed tokens at `rows` [n] int64, or of all."""
    last = find(model)
    if rows is None or last is None:
        logits: Tensor = model(**inputs, logits_to_keep=0 if rows is None else rows).logits
        return logits
    # A chunk that is not its prompt's last wants none; no kernel or collective has to know of empty inputs.
    last.rows = rows if rows.numel() else torch.zeros(1, dtype=torch.int64, device=rows.device)
    try:
        logits = model(**inputs, logits_to_keep=0).logits
    finally:
        last.rows = None
    return logits[:, : rows.numel()]
