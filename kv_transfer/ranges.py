"""Which rank sends which KV heads to which rank: the one conversion between two tensor-parallel layouts; pure.

Tokens need no conversion: parts are cut by token, and blocks of any size are filled from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..core.errors import GeometryMismatch
from ..core.kv_geometry import DTYPE_BYTES, KvDtype, KvGeometry, LayerGeometry
from ..proto import kv_transfer_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """How the ranks of one worker hold a model's KV. Every rank holds all layers and tokens, and some of the heads."""

    geometry: KvGeometry  # of the whole model, not of one rank
    num_ranks: int = 1

    def __post_init__(self) -> None:
        """Raises: GeometryMismatch: no model has this shape; a peer may send anything."""
        shapes = [(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in self.geometry.layers]
        if self.num_ranks < 1 or not all(min(shape) > 0 for shape in shapes):
            raise GeometryMismatch(
                f"{self.num_ranks} ranks and layers of (heads, key dim, value dim) {shapes[:3]} hold no KV; each must "
                "be at least 1"
            )

    def heads(self, layer: int, rank: int) -> range:
        """The heads that a rank holds, in the model's numbering; with fewer heads than ranks, ranks share a head.

        Raises: GeometryMismatch: they cannot be divided.
        """
        num_heads, num_ranks = self.geometry.layers[layer].num_kv_heads, self.num_ranks
        if num_heads % num_ranks == 0:
            each = num_heads // num_ranks
            return range(rank * each, (rank + 1) * each)
        if num_ranks % num_heads == 0:
            head = rank * num_heads // num_ranks
            return range(head, head + 1)
        raise GeometryMismatch(
            f"layer {layer} has {num_heads} KV heads, which {num_ranks} ranks can neither divide nor share evenly; "
            f"use a tensor-parallel size that divides {num_heads} or is a multiple of it"
        )

    def rank_geometry(self, rank: int) -> KvGeometry:
        """What one rank's pool holds."""
        layers = tuple(
            LayerGeometry(
                num_kv_heads=len(self.heads(number, rank)),
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                sliding_window=layer.sliding_window,
            )
            for number, layer in enumerate(self.geometry.layers)
        )
        return KvGeometry(model_id=self.geometry.model_id, layers=layers, dtype=self.geometry.dtype)

    def first_heads(self, rank: int) -> tuple[int, ...]:
        """Per layer, the model's number of the first head in a rank's pool."""
        return tuple(self.heads(layer, rank).start for layer in range(self.geometry.num_layers))

    def to_proto(self) -> kv_transfer_pb2.KvShape:
        layers = [
            kv_transfer_pb2.KvLayer(
                num_kv_heads=layer.num_kv_heads,
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                sliding_window=layer.sliding_window or 0,
            )
            for layer in self.geometry.layers
        ]
        return kv_transfer_pb2.KvShape(
            model_id=self.geometry.model_id, dtype=self.geometry.dtype, layers=layers, num_ranks=self.num_ranks
        )

    @classmethod
    def from_proto(cls, message: kv_transfer_pb2.KvShape) -> KvLayout:
        """Raises: GeometryMismatch: a dtype that this build does not know, or a shape that no model has."""
        layers = tuple(
            LayerGeometry(
                num_kv_heads=layer.num_kv_heads,
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                sliding_window=layer.sliding_window or None,
            )
            for layer in message.layers
        )
        geometry = KvGeometry(model_id=message.model_id, layers=layers, dtype=known_dtype(message.dtype))
        return cls(geometry=geometry, num_ranks=message.num_ranks)

    def holders(self, layer: int, head: int) -> list[int]:
        """Ranks that hold a head."""
        return [rank for rank in range(self.num_ranks) if head in self.heads(layer, rank)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of one request's KV that one rank sends to one other, heads in the model's numbering."""

    source_rank: int
    target_rank: int
    layer_start: int
    layer_end: int
    head_start: int
    head_end: int
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What one source rank sends to one target rank: per layer, a range of heads, empty where another rank sends."""

    heads: tuple[range, ...]

    @property
    def is_empty(self) -> bool:
        return not any(self.heads)

    def bytes_per_token(self, geometry: KvGeometry) -> int:
        """By the layout's formula, in the geometry's dtype."""
        return sum(
            geometry.layer_bytes_per_token(layer) // geometry.layers[layer].num_kv_heads * len(heads)
            for layer, heads in enumerate(self.heads)
        )


def known_dtype(name: str) -> KvDtype:
    """Raises: GeometryMismatch."""
    for dtype in DTYPE_BYTES:
        if dtype == name:
            return dtype
    raise GeometryMismatch(f"KV dtype {name!r} is not one of {', '.join(DTYPE_BYTES)}; upgrade the older worker")


def check_pair(source: KvLayout, target: KvLayout) -> None:
    """Whether one side's KV can become the other's. Block size, number of blocks and dtype may differ.

    Raises: GeometryMismatch: with the first difference that cannot be converted.
    """
    ours, theirs = source.geometry, target.geometry
    if ours.model_id != theirs.model_id:
        raise GeometryMismatch(
            f"the prefill worker runs model {ours.model_id}, the decode worker {theirs.model_id}; pair workers of one "
            "model and revision"
        )
    if ours.num_layers != theirs.num_layers:
        raise GeometryMismatch(
            f"the prefill worker has {ours.num_layers} layers of KV, the decode worker {theirs.num_layers}"
        )
    for number, (a, b) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        for name in ("num_kv_heads", "key_dim", "value_dim", "sliding_window"):
            if getattr(a, name) != getattr(b, name):
                raise GeometryMismatch(
                    f"layer {number} has {name} {getattr(a, name)} on the prefill worker and {getattr(b, name)} on the "
                    "decode worker; pair workers of one model and revision"
                )
        source.heads(number, 0)
        target.heads(number, 0)


@lru_cache(maxsize=256)
def route(source: KvLayout, source_rank: int, target: KvLayout, target_rank: int) -> Route:
    """Heads that go from rank to rank. Of several ranks that hold a head, each target rank takes another in turn."""
    check_pair(source, target)
    layers = range(source.geometry.num_layers)
    return Route(heads=tuple(_sent(source, source_rank, target, target_rank, layer) for layer in layers))


def sources_of(source: KvLayout, target: KvLayout, target_rank: int) -> list[int]:
    """The ranks that a target rank needs to hear from."""
    ranks = range(source.num_ranks)
    return [rank for rank in ranks if not route(source, rank, target, target_rank).is_empty]


def targets_of(source: KvLayout, source_rank: int, target: KvLayout) -> list[int]:
    """The ranks that a source rank sends to."""
    ranks = range(target.num_ranks)
    return [rank for rank in ranks if not route(source, source_rank, target, rank).is_empty]


def pieces(source: KvLayout, target: KvLayout, token_start: int, token_end: int) -> Iterator[Piece]:
    """Everything that moves for one request's tokens: each cell of each target rank exactly once."""
    for source_rank in range(source.num_ranks):
        for target_rank in range(target.num_ranks):
            heads = route(source, source_rank, target, target_rank).heads
            start = 0
            for end in range(1, len(heads) + 1):
                if end < len(heads) and heads[end] == heads[start]:
                    continue  # layers with the same heads go together
                if heads[start] and token_start < token_end:
                    yield Piece(
                        source_rank=source_rank,
                        target_rank=target_rank,
                        layer_start=start,
                        layer_end=end,
                        head_start=heads[start].start,
                        head_end=heads[start].stop,
                        token_start=token_start,
                        token_end=token_end,
                    )
                start = end


def _sent(source: KvLayout, source_rank: int, target: KvLayout, target_rank: int, layer: int) -> range:
    held, needed = source.heads(layer, source_rank), target.heads(layer, target_rank)
    start, end = max(held.start, needed.start), min(held.stop, needed.stop)
    if start >= end:
        return range(0)
    holders = source.holders(layer, start)  # ranks that share a head hold nothing else, so this goes for all of them
    return range(start, end) if holders[target_rank % len(holders)] == source_rank else range(0)
