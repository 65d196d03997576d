from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry, blocks_for

LAYER = LayerGeometry(num_kv_heads=3, key_dim=64, value_dim=64)
GEOMETRY = KvGeometry(model_id="m@1", layers=(LAYER,) * 30, dtype="bfloat16")


def test_bytes_per_token_is_layers_times_heads_times_dims_times_bytes() -> None:
    assert GEOMETRY.bytes_per_token == 30 * 3 * (64 + 64) * 2
    assert GEOMETRY.layer_bytes_per_token(0) * 30 == GEOMETRY.bytes_per_token


def test_the_digest_tells_any_difference_that_matters() -> None:
    others = [
        replace(GEOMETRY, model_id="m@2"),
        replace(GEOMETRY, layers=GEOMETRY.layers[1:]),
        replace(GEOMETRY, layers=(replace(LAYER, value_dim=128), *GEOMETRY.layers[1:])),
        replace(GEOMETRY, layers=(replace(LAYER, sliding_window=16), *GEOMETRY.layers[1:])),
    ]
    assert len({GEOMETRY.digest(), *(other.digest() for other in others)}) == 1 + len(others)
    assert replace(GEOMETRY, dtype="float16").digest() == GEOMETRY.digest()  # dtypes are converted


@given(st.integers(0, 10_000), st.integers(1, 256))
def test_blocks_for_is_the_least_number_that_holds(num_tokens: int, block_size: int) -> None:
    blocks = blocks_for(num_tokens, block_size)
    assert blocks * block_size >= num_tokens > (blocks - 1) * block_size or num_tokens == blocks == 0
