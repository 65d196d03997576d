"""Every cell of every target rank comes from exactly one source rank, whatever the two layouts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve.core.errors import GeometryMismatch
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.kv_transfer.ranges import KvLayout, check_pair, pieces, route, sources_of, targets_of

RANKS = st.sampled_from([1, 2, 4])
# Grouped heads, one shared head, MLA (K and V differ), a sliding window: 1, 2, 4 and 8 heads divide or share evenly.
LAYERS = st.builds(
    LayerGeometry,
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    key_dim=st.sampled_from([4, 6]),
    value_dim=st.sampled_from([4, 3]),
    sliding_window=st.sampled_from([None, 8]),
)
GEOMETRIES = st.builds(
    KvGeometry,
    model_id=st.just("m"),
    layers=st.lists(LAYERS, min_size=1, max_size=6).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@given(geometry=GEOMETRIES, p=RANKS, d=RANKS, span=st.tuples(st.integers(0, 5), st.integers(0, 9)))
@settings(max_examples=150, deadline=None)
def test_every_cell_is_covered_exactly_once(geometry, p: int, d: int, span) -> None:
    source, target = KvLayout(geometry=geometry, num_ranks=p), KvLayout(geometry=geometry, num_ranks=d)
    tokens = range(span[0], sum(span))
    covered = Counter(
        (piece.target_rank, layer, head, token)
        for piece in pieces(source, target, tokens.start, tokens.stop)
        for layer in range(piece.layer_start, piece.layer_end)
        for head in range(piece.head_start, piece.head_end)
        for token in range(piece.token_start, piece.token_end)
    )
    needed = {
        (rank, layer, head, token)
        for rank in range(d)
        for layer in range(geometry.num_layers)
        for head in target.heads(layer, rank)
        for token in tokens
    }
    assert set(covered) == needed
    assert set(covered.values()) <= {1}
    for piece in pieces(source, target, tokens.start, tokens.stop):  # and nobody sends what it does not hold
        for layer in range(piece.layer_start, piece.layer_end):
            held = source.heads(layer, piece.source_rank)
            assert held.start <= piece.head_start < piece.head_end <= held.stop


@given(geometry=GEOMETRIES, p=RANKS, d=RANKS)
@settings(max_examples=80, deadline=None)
def test_ranks_know_their_peers_from_both_sides(geometry, p: int, d: int) -> None:
    source, target = KvLayout(geometry=geometry, num_ranks=p), KvLayout(geometry=geometry, num_ranks=d)
    links = {(s, t) for t in range(d) for s in sources_of(source, target, t)}
    assert links == {(s, t) for s in range(p) for t in targets_of(source, s, target)}
    moved = sum(route(source, s, target, t).bytes_per_token(geometry) for s, t in links)
    assert moved == sum(target.rank_geometry(rank).bytes_per_token for rank in range(d))


def test_ranks_that_share_a_head_share_the_sending() -> None:
    geometry = KvGeometry(
        model_id="m", layers=(LayerGeometry(num_kv_heads=1, key_dim=4, value_dim=4),), dtype="float32"
    )
    both = KvLayout(geometry=geometry, num_ranks=4)
    assert [sources_of(both, both, rank) for rank in range(4)] == [[0], [1], [2], [3]]


def test_a_pair_that_cannot_work_is_refused_with_the_reason() -> None:
    layer = LayerGeometry(num_kv_heads=3, key_dim=4, value_dim=4)
    geometry = KvGeometry(model_id="m", layers=(layer, layer), dtype="float32")
    whole = KvLayout(geometry=geometry)
    check_pair(whole, KvLayout(geometry=replace(geometry, dtype="bfloat16"), num_ranks=3))

    def other(**changes: object) -> KvLayout:
        return KvLayout(geometry=replace(geometry, layers=(layer, replace(layer, **changes))))

    impossible = {
        "runs model m, the decode worker n": KvLayout(geometry=replace(geometry, model_id="n")),
        "2 layers of KV, the decode worker 1": KvLayout(geometry=replace(geometry, layers=(layer,))),
        "layer 1 has num_kv_heads 3 .* and 2": other(num_kv_heads=2),
        "layer 1 has key_dim 4 .* and 8": other(key_dim=8),
        "layer 1 has value_dim 4 .* and 8": other(value_dim=8),
        "layer 1 has sliding_window None .* and 8": other(sliding_window=8),
        "layer 0 has 3 KV heads, which 2 ranks": KvLayout(geometry=geometry, num_ranks=2),
    }
    for reason, target in impossible.items():
        with pytest.raises(GeometryMismatch, match=reason):
            check_pair(whole, target)
