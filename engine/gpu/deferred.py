"""A rotary embedding that waits for the attention function, which does it in the pass that writes the KV.

The model calls them one right after the other, on one thread, so one pending rotation is all there ever is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Rotation:
    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor


_pending: _Rotation | None = None


def defer(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The attention function that gets `query` and `key` next is to rotate them."""
    global _pending
    _pending = _Rotation(query, key, cos, sin)


def take(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin to rotate with, [1, tokens, dim] each; None if the queries and keys are as the model wants them."""
    global _pending
    rotation, _pending = _pending, None
    if rotation is None:
        return None
    assert rotation.query is query, "the model changed its queries between rotary embedding and attention"
    assert rotation.key is key, "the model changed its keys between rotary embedding and attention"
    return rotation.cos, rotation.sin
