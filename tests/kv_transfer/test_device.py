"""KV between GPUs: checksums, the way through host memory, and whole clusters of processes over CUDA IPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from splitserve.benchmarks.processes import process_cluster
from splitserve.client import AsyncClient, GenerationResult
from splitserve.core.config import load_config
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.engine.pool import KvPool
from splitserve.engine.testing import make_tiny_model
from splitserve.kv_transfer.device_checksum import device_checksum
from splitserve.kv_transfer.frames import KvPart
from splitserve.kv_transfer.layout import PoolBytes, pool_bytes

GEOMETRY = KvGeometry(
    model_id="test",
    layers=tuple(LayerGeometry(num_kv_heads=3, key_dim=64, value_dim=80) for _ in range(4)),
    dtype="bfloat16",
)


def reference(rows: np.ndarray, block_ids: list[int], first: int, size: int) -> int:
    words = np.concatenate([rows[block, first : first + size] for block in block_ids]).view(np.uint64)
    with np.errstate(over="ignore"):
        key = np.arange(len(words), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        key = ((key ^ (key >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)) | np.uint64(1)
        return int((words * key).sum())


@pytest.mark.parametrize(("first", "size"), [(0, 4096), (8, 40), (1024, 65_536), (64, 8 * 20_000)])
def test_the_checksum_is_the_references_and_sees_every_change(first: int, size: int) -> None:
    rows = torch.randint(0, 256, (40, 1 << 18), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    device = rows.cuda()
    ids = [7, 3, 39, 0, 12]

    def found(order: list[int]) -> int:
        on_device = torch.tensor(order, dtype=torch.int32, device="cuda")
        return device_checksum(device, on_device, first, size)

    right = found(ids)
    assert right == reference(rows.numpy(), ids, first, size)
    assert found(ids[::-1]) != right
    device[39, first + size - 1] ^= 0x80
    assert found(ids) != right
    device[39, first + size - 1] ^= 0x80
    device[4, first] ^= 1  # a block that is not among them
    assert found(ids) == right


def test_a_part_packs_to_the_same_bytes_as_from_host_memory() -> None:
    host = KvPool(GEOMETRY, num_blocks=20, block_size=16)
    host.rows.random_(0, 256)
    device = KvPool(GEOMETRY, num_blocks=20, block_size=16, device=torch.device("cuda", 0))
    device.rows.copy_(host.rows)
    table = [5, 6, 7, 1, 19, 2]
    part = KvPart(layer_start=1, layer_end=3, head_start=0, head_end=3, token_start=5, token_end=90)
    views = [PoolBytes(host), pool_bytes(device)]
    packed = [np.zeros(view.part_bytes(part), np.uint8) for view in views]
    for view, out in zip(views, packed, strict=True):
        view.pack(part, table, out)
    assert np.array_equal(*packed)
    target = KvPool(GEOMETRY, num_blocks=20, block_size=16, device=torch.device("cuda", 0))
    pool_bytes(target).unpack(part, table, packed[0])
    assert int(target.rows.cpu().ne(host.rows).sum()) > 0  # only the part
    again = np.zeros_like(packed[0])
    pool_bytes(target).pack(part, table, again)
    assert np.array_equal(again, packed[0])


async def serve(model: Path, logs: Path, transport: str, *, colocated: bool) -> list[GenerationResult]:
    settings = {
        "model": str(model), "engine.device": "cuda", "engine.dtype": "float32", "engine.num_kv_blocks": 600,
        "engine.max_model_len": 1024, "engine.max_running": 8, "engine.max_step_tokens": 256, "transport": transport,
        "engine.prefix_cache": False,
    }  # fmt: skip
    if colocated:
        settings["colocated.replicas"] = 1
    last = torch.cuda.device_count() - 1
    gpus = {"colocated-0": 0} if colocated else {"prefill-0": 0, "decode-0": last}
    async with (
        process_cluster(load_config(None, settings), logs, gpus=gpus) as cluster,
        AsyncClient(cluster.router.address) as client,
    ):
        prompts = [[3 + (7 * i + n) % 200 for i in range(1 + 61 * n)] for n in range(10)]
        return await asyncio.gather(
            *(client.generate(prompt, max_tokens=20, ignore_eos=True, timeout_s=120.0) for prompt in prompts)
        )


async def test_split_equals_colocated_over_cuda_ipc_nccl_and_grpc(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "llama")
    whole = await serve(model, tmp_path / "colocated", "auto", colocated=True)
    ways = [("auto", "cuda_ipc"), ("grpc", "grpc")]
    if torch.cuda.device_count() > 1:  # NCCL wants a GPU for each side
        ways.append(("nccl", "nccl"))
    for transport, name in ways:
        split = await serve(model, tmp_path / transport, transport, colocated=False)
        assert [r.token_ids for r in split] == [r.token_ids for r in whole]
        assert {r.timing.transport for r in split} == {name}
        per_token = 3 * 2 * 16 * 2 * 4  # layers, KV heads, dimensions, K and V, bytes
        assert [r.timing.kv_bytes for r in split] == [r.usage.num_prompt_tokens * per_token for r in split]
