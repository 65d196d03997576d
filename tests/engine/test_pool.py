"""The KV pool: views and rows are the same memory, and peers cannot write what they map."""

import mmap

import pytest
import torch
from splitserve.core.errors import ConfigError
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.engine.pool import KvPool

UNIFORM = (LayerGeometry(num_kv_heads=2, key_dim=8, value_dim=8), LayerGeometry(num_kv_heads=3, key_dim=8, value_dim=8))
MIXED = (LayerGeometry(num_kv_heads=2, key_dim=8, value_dim=4), LayerGeometry(num_kv_heads=1, key_dim=12, value_dim=6))


def make_pool(layers: tuple[LayerGeometry, ...], shared: bool = False) -> KvPool:
    geometry = KvGeometry(model_id="m", layers=layers, dtype="bfloat16")
    return KvPool(geometry, num_blocks=5, block_size=16, shared=shared)


@pytest.mark.parametrize("layers", [UNIFORM, MIXED])
def test_every_element_belongs_to_exactly_one_view(layers: tuple[LayerGeometry, ...]) -> None:
    pool = make_pool(layers)
    for layer in range(len(layers)):
        pool.keys(layer).add_(1)
        pool.values(layer).add_(1)
    assert torch.equal(pool.rows.view(torch.bfloat16), torch.ones(5, pool.row_bytes // 2, dtype=torch.bfloat16))
    assert pool.size_bytes == 5 * 16 * pool.geometry.bytes_per_token


@pytest.mark.parametrize("layers", [UNIFORM, MIXED])
def test_offsets_name_where_a_layers_bytes_are(layers: tuple[LayerGeometry, ...]) -> None:
    pool = make_pool(layers)
    pool.values(1)[3] = 2.0
    used = pool.rows[3].nonzero()[:, 0]
    assert int(used.min()) in (pool.value_offset_bytes(1), pool.value_offset_bytes(1) + 1)
    assert int(used.max()) == pool.row_bytes - 1
    assert not pool.rows[:3].any()


@pytest.mark.parametrize("layers", [UNIFORM, MIXED])
def test_gather_puts_the_blocks_of_each_head_in_order(layers: tuple[LayerGeometry, ...]) -> None:
    pool = make_pool(layers)
    tables = torch.tensor([[4, 0], [2, 3]])
    for layer, shape in enumerate(layers):
        pool.keys(layer).copy_(torch.randn(pool.keys(layer).shape))
        pool.values(layer).copy_(torch.randn(pool.values(layer).shape))
        k, v = pool.gather(layer, tables)
        for i, table in enumerate(tables.tolist()):
            for head in range(shape.num_kv_heads):
                assert torch.equal(k[i, head], torch.cat([pool.keys(layer)[block, head] for block in table]))
                assert torch.equal(v[i, head], torch.cat([pool.values(layer)[block, head] for block in table]))


def test_a_shared_pool_can_be_mapped_read_only_and_in_no_other_way() -> None:
    pool = make_pool(UNIFORM, shared=True)
    assert pool.fd is not None
    pool.keys(0)[1] = 3.0
    with mmap.mmap(pool.fd, pool.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as peer:
        row = torch.frombuffer(bytearray(peer[pool.row_bytes : 2 * pool.row_bytes]), dtype=torch.uint8)
        assert torch.equal(row, pool.rows[1])
    with pytest.raises(PermissionError):
        mmap.mmap(pool.fd, pool.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    pool.close()
    pool.close()
    assert pool.fd is None


def test_a_pool_beyond_the_machines_memory_is_refused() -> None:
    geometry = KvGeometry(model_id="m", layers=UNIFORM, dtype="float32")
    with pytest.raises(ConfigError, match="lower num_kv_blocks"):
        KvPool(geometry, num_blocks=1 << 40, block_size=16)
