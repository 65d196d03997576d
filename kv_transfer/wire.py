"""Between a pool's blocks and the payloads of one transfer: layout, KV dtype and codec in one place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.kv_geometry import DTYPE_BYTES, KvGeometry
from .codecs import TORCH_DTYPES, PlaneShape, WireFormat, decode, encode, wire_bytes
from .frames import KvPart, checksum
from .host_copies import Bytes
from .layout import PoolBytes, check


def plane_shapes(geometry: KvGeometry, part: KvPart) -> list[PlaneShape]:
    """The planes of a part, in canonical order: K and V of each layer."""
    return [
        PlaneShape(is_key=is_key, heads=part.num_heads, tokens=part.num_tokens, dim=dim)
        for layer in geometry.layers[part.layer_start : part.layer_end]
        for is_key, dim in ((True, layer.key_dim), (False, layer.value_dim))
    ]


def payload_bytes(geometry: KvGeometry, wire: WireFormat, part: KvPart) -> int:
    """Exact bytes of a part on the wire: the formula that moved bytes are checked against."""
    if wire.is_lossy:
        return wire_bytes(wire, plane_shapes(geometry, part))
    dims = sum(layer.key_dim + layer.value_dim for layer in geometry.layers[part.layer_start : part.layer_end])
    return part.num_heads * part.num_tokens * dims * DTYPE_BYTES[wire.dtype]


class WireBytes:
    """Packs and unpacks parts of one transfer. Runs in threads; holds no state of its own."""

    def __init__(self, pool_bytes: PoolBytes, geometry: KvGeometry, wire: WireFormat) -> None:
        self._pool = pool_bytes
        self._geometry = geometry  # its dtype is the pool's
        self._wire = wire
        self._is_plain = not wire.is_lossy and wire.dtype == geometry.dtype

    def part_bytes(self, part: KvPart) -> int:
        return payload_bytes(self._geometry, self._wire, part)

    def pack(self, part: KvPart, block_table: Sequence[int], out: Bytes) -> int:
        """Gather a part from its blocks into `out` [part_bytes]. Returns its checksum.

        Raises: KvCorrupted: a value cannot be coded.
        """
        if self._is_plain:
            return self._pool.pack(part, block_table, out)
        native = np.empty(self._pool.part_bytes(part), dtype=np.uint8)
        self._pool.pack(part, block_table, native)
        self._encode(part, torch.from_numpy(native), torch.from_numpy(out))
        return checksum(out.data)

    def unpack(self, part: KvPart, block_table: Sequence[int], payload: Bytes, expected: int) -> None:
        """Scatter a payload [part_bytes] into its blocks.

        Raises: KvCorrupted: its checksum is not the expected one, or it cannot be decoded.
        """
        if self._is_plain:
            self._pool.unpack(part, block_table, payload, expected)
            return
        check(checksum(payload.data), expected, part)
        native = np.empty(self._pool.part_bytes(part), dtype=np.uint8)
        self._decode(part, _read_only_tensor(payload), torch.from_numpy(native))
        self._pool.unpack(part, block_table, native)

    def gather(self, part: KvPart, block_table: Sequence[int], out: Tensor) -> None:
        """`pack` into a tensor beside the pool; on a GPU it is only queued."""
        if self._is_plain:
            self._pool.gather(part, block_table, out)
            return
        native = torch.empty(self._pool.part_bytes(part), dtype=torch.uint8, device=out.device)
        self._pool.gather(part, block_table, native)
        self._encode(part, native, out)

    def scatter(self, part: KvPart, block_table: Sequence[int], data: Tensor) -> None:
        """`unpack` from a tensor beside the pool; on a GPU it is only queued."""
        if self._is_plain:
            self._pool.scatter(part, block_table, data)
            return
        native = torch.empty(self._pool.part_bytes(part), dtype=torch.uint8, device=data.device)
        self._decode(part, data, native)
        self._pool.scatter(part, block_table, native)

    def _encode(self, part: KvPart, native: Tensor, out: Tensor) -> None:
        shapes = plane_shapes(self._geometry, part)
        values = native.view(TORCH_DTYPES[self._geometry.dtype])
        planes = torch.split(values, [shape.elements for shape in shapes])
        shaped = [
            (shape, plane.view(shape.heads, shape.tokens, shape.dim))
            for shape, plane in zip(shapes, planes, strict=True)
        ]
        encode(self._wire, shaped, out)

    def _decode(self, part: KvPart, coded: Tensor, native: Tensor) -> None:
        shapes = plane_shapes(self._geometry, part)
        dtype = TORCH_DTYPES[self._geometry.dtype]
        position, itemsize = 0, DTYPE_BYTES[self._geometry.dtype]
        for shape, values in zip(shapes, decode(self._wire, shapes, coded, dtype), strict=True):
            end = position + shape.elements * itemsize
            native[position:end] = values.reshape(-1).view(torch.uint8)
            position = end


def _read_only_tensor(data: Bytes) -> Tensor:
    """A tensor over memory that nobody writes, a received frame; torch would warn about a read-only array."""
    memory = (ctypes.c_uint8 * data.nbytes).from_address(data.ctypes.data)
    return torch.from_numpy(np.ctypeslib.as_array(memory))
