"""Shape and size of one token's KV cache: what two workers must agree on before KV can move between them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

KvDtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[KvDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
PREFIX_UNIT = 16  # tokens per prefix-hash link, whatever the block size


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGeometry:
    """One attention layer, as probed with a real forward pass (never parsed from the config)."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None  # tokens, None for full attention

    @property
    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGeometry:
    """Every layer's KV shape, the dtype it is stored in and the model that made it."""

    model_id: str  # name and revision digest: KV of other weights never matches
    layers: tuple[LayerGeometry, ...]
    dtype: KvDtype

    def __hash__(self) -> int:
        """Of what tells models apart at once: over every layer, a look-up takes longer than what was looked up."""
        return hash((self.model_id, self.dtype, len(self.layers)))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers: the layout's formula that moved bytes are checked against."""
        return sum(layer.elements_per_token for layer in self.layers) * DTYPE_BYTES[self.dtype]

    def layer_bytes_per_token(self, layer: int) -> int:
        return self.layers[layer].elements_per_token * DTYPE_BYTES[self.dtype]

    def digest(self) -> str:
        """16 hex digits that two workers compare before any KV moves; block size and dtype are converted."""
        parts = [self.model_id]
        parts += [f"{g.num_kv_heads}:{g.key_dim}:{g.value_dim}:{g.sliding_window}" for g in self.layers]
        return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
