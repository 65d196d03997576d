"""The KV pool: one contiguous row per block across all layers, `[block][layer][K|V][head][token][dim]`."""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.kv_geometry import DTYPE_BYTES, KvDtype, KvGeometry

TORCH_DTYPES: dict[KvDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; the fcntl module does not name it yet


class KvPool:
    """KV memory of one engine. A row moves between workers as it is; views below address one layer of every row.

    `shared=True` puts it into a memfd: its size is sealed, and so is every writable mapping but ours, so that a peer
    can map it read-only and nothing else.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        *,
        num_blocks: int,
        block_size: int,
        shared: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.geometry = geometry
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.row_bytes = geometry.bytes_per_token * block_size
        self.size_bytes = self.row_bytes * num_blocks
        self.fd: int | None = None
        self._dtype = TORCH_DTYPES[geometry.dtype]
        self._mapping: mmap.mmap | None = None
        # Zeroed either way: padding is read by attention and masked afterwards, and a NaN would survive the mask.
        if device is not None and device.type != "cpu":
            storage = torch.zeros(self.size_bytes, dtype=torch.uint8, device=device)
        elif shared:
            self.fd, self._mapping = _sealed_memory(self.size_bytes)
            storage = torch.frombuffer(self._mapping, dtype=torch.uint8)
        else:
            storage = _huge_pages(self.size_bytes)
        self.rows = storage.view(num_blocks, self.row_bytes)  # uint8, one row per block
        self.elements = storage.view(self._dtype)  # [num_blocks * row], KV dtype
        self._key_offset: list[int] = []  # elements from the row's start, per layer
        self._value_offset: list[int] = []
        offset = 0
        for layer in geometry.layers:
            self._key_offset.append(offset)
            offset += layer.num_kv_heads * block_size * layer.key_dim
            self._value_offset.append(offset)
            offset += layer.num_kv_heads * block_size * layer.value_dim
        # With one head size everywhere, heads of any block and layer are rows of one matrix, and keys and values of a
        # block are neighbours: a single index_select fetches both, twice as fast as indexing the strided views.
        dims = {dim for layer in geometry.layers for dim in (layer.key_dim, layer.value_dim)}
        self._head_elements = block_size * dims.pop() if len(dims) == 1 else None
        self._scratch = torch.empty(0, dtype=self._dtype)
        self._keys = [self._view(i, self._key_offset[i], g.key_dim) for i, g in enumerate(geometry.layers)]
        self._values = [self._view(i, self._value_offset[i], g.value_dim) for i, g in enumerate(geometry.layers)]

    def keys(self, layer: int) -> Tensor:
        """View [num_blocks, num_kv_heads, block_size, key_dim]."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """View [num_blocks, num_kv_heads, block_size, value_dim]."""
        return self._values[layer]

    def gather(self, layer: int, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks in `block_tables` [num, max_blocks]: two [num, heads, max_blocks * size, dim].

        The result lives until the next call; only the device thread calls.
        """
        num, num_blocks = block_tables.shape
        heads = self.geometry.layers[layer].num_kv_heads
        if self._head_elements is None:
            at = (block_tables[:, None, :], torch.arange(heads)[:, None])  # already head-major
            k, v = self._keys[layer][at], self._values[layer][at]
            return k.view(num, heads, -1, k.shape[-1]), v.view(num, heads, -1, v.shape[-1])
        matrix = self.elements.view(-1, self._head_elements)
        first = block_tables * (matrix.shape[0] // self.num_blocks) + self._key_offset[layer] // self._head_elements
        rows = (first[None, :, None, :] + torch.arange(2 * heads).view(2, 1, heads, 1)).view(-1)
        needed = rows.shape[0] * self._head_elements
        if self._scratch.shape[0] < needed:  # kept, because fresh memory of this size costs page faults on every call
            self._scratch = _huge_pages(needed * self._dtype.itemsize).view(self._dtype)
        out = self._scratch[:needed].view(-1, self._head_elements)
        torch.index_select(matrix, 0, rows, out=out)
        k, v = out.view(2, num, heads, num_blocks * self.block_size, -1)
        return k, v

    def key_offset(self, layer: int) -> int:
        """Elements from a row's start to a layer's keys."""
        return self._key_offset[layer]

    def value_offset(self, layer: int) -> int:
        return self._value_offset[layer]

    def key_offset_bytes(self, layer: int) -> int:
        """Where a layer's keys begin inside a row."""
        return self._key_offset[layer] * DTYPE_BYTES[self.geometry.dtype]

    def value_offset_bytes(self, layer: int) -> int:
        """Where a layer's values begin inside a row; they end where the next layer's keys begin."""
        return self._value_offset[layer] * DTYPE_BYTES[self.geometry.dtype]

    def close(self) -> None:
        """Give the shared memory's file descriptor back; mappings live on until nobody uses them."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _view(self, layer: int, offset: int, dim: int) -> Tensor:
        heads, row = self.geometry.layers[layer].num_kv_heads, self.row_bytes // DTYPE_BYTES[self.geometry.dtype]
        shape = (self.num_blocks, heads, self.block_size, dim)
        return self.elements.as_strided(shape, (row, self.block_size * dim, dim, 1), offset)


def _huge_pages(size_bytes: int) -> Tensor:
    """Zeroed memory [size_bytes] uint8 in pages of 2 MiB where the kernel has them.

    A gather reads rows of a few KiB from all over the pool: with 4 KiB pages each one misses the TLB.
    """
    try:
        memory = mmap.mmap(-1, size_bytes)
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"cannot allocate a KV pool of {size_bytes:,} bytes; lower num_kv_blocks or kv_memory_bytes"
        ) from error
    with suppress(OSError):  # a kernel without huge pages: slower, and right
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _sealed_memory(size_bytes: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("splitserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"cannot allocate {size_bytes:,} bytes of shared memory for the KV pool: {error}") from error
    return fd, mapping
