"""Decode attention on a CPU by our own C kernel, which reads the paged KV once and gathers nothing.

The C file says how. Where it cannot be compiled, engine/attention.py gathers the KV and uses PyTorch's attention.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..core.compiled import compiled
from .pool import KvPool

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")


class _DecodeArguments(ctypes.Structure):
    """`DecodeArguments` of the C file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "output", "pool", "block_tables", "positions", "sinks")),
        *((name, ctypes.c_int64) for name in ("table_stride", "num_sequences", "num_kv_heads", "group")),
        *((name, ctypes.c_int64) for name in ("key_dim", "value_dim", "block_size", "num_blocks", "row_elements")),
        *((name, ctypes.c_int64) for name in ("key_offset", "value_offset", "window", "is_bfloat16")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    )


class DecodeKernel:
    """The compiled kernel, on the threads of torch's own OpenMP runtime."""

    def __init__(self, library: ctypes.CDLL, parallel: ctypes.c_void_p) -> None:
        def limit(name: str) -> int:
            return ctypes.c_int64.in_dll(library, f"splitserve_{name}").value

        self._tile, self._max_group, self._max_dim = limit("tile"), limit("max_group"), limit("max_dim")
        self._parallel = parallel
        self._run: Callable[..., int] = library.splitserve_decode_attention
        library.splitserve_decode_attention.argtypes = (
            ctypes.POINTER(_DecodeArguments),
            ctypes.c_void_p,
            ctypes.c_uint,
        )

    def serves(self, pool: KvPool, layer: int, num_heads: int) -> bool:
        """Whether this layer is within the kernel's limits."""
        shape = pool.geometry.layers[layer]
        return (
            pool.geometry.dtype in ("float32", "bfloat16")
            and num_heads % shape.num_kv_heads == 0
            and num_heads // shape.num_kv_heads <= self._max_group
            and max(shape.key_dim, shape.value_dim) <= self._max_dim
            and pool.block_size % self._tile == 0
        )

    def attend(
        self,
        query: Tensor,  # [num_sequences, num_heads, key_dim]
        pool: KvPool,
        layer: int,
        block_tables: Tensor,  # [num_sequences, max_blocks] int64
        positions: Tensor,  # [num_sequences] int64, of the new token, whose KV is in the pool already
        *,
        scaling: float,
        softcap: float | None,
        sliding_window: int | None,
        sinks: Tensor | None,  # [num_heads]
    ) -> Tensor:
        """One new token per sequence over all of its KV: [num_sequences, num_heads, value_dim] float32."""
        shape = pool.geometry.layers[layer]
        num_sequences, num_heads, key_dim = query.shape
        assert self.serves(pool, layer, num_heads), "ask `serves` first"
        assert key_dim == shape.key_dim
        assert block_tables.shape[0] == positions.shape[0] == num_sequences
        assert block_tables.dtype == positions.dtype == torch.int64
        # Named, so that they live as long as their addresses are used.
        query, block_tables, positions = query.float().contiguous(), block_tables.contiguous(), positions.contiguous()
        sinks = None if sinks is None else sinks.float().contiguous()
        assert sinks is None or sinks.shape == (num_heads,)
        output = torch.empty(num_sequences, num_heads, shape.value_dim)
        arguments = _DecodeArguments(
            query=query.data_ptr(),
            output=output.data_ptr(),
            pool=pool.elements.data_ptr(),
            block_tables=block_tables.data_ptr(),
            positions=positions.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            table_stride=block_tables.shape[1],
            num_sequences=num_sequences,
            num_kv_heads=shape.num_kv_heads,
            group=num_heads // shape.num_kv_heads,
            key_dim=key_dim,
            value_dim=shape.value_dim,
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            row_elements=pool.elements.shape[0] // pool.num_blocks,
            key_offset=pool.key_offset(layer),
            value_offset=pool.value_offset(layer),
            window=sliding_window or 0,
            is_bfloat16=pool.geometry.dtype == "bfloat16",
            scaling=scaling,
            softcap=softcap or 0.0,
        )
        done = self._run(ctypes.byref(arguments), self._parallel, torch.get_num_threads())
        assert done, "a position without a block, or a block that the pool does not have"
        return output


@cache
def decode_kernel() -> DecodeKernel | None:
    """The kernel of this process, compiled if no process of this user did it before."""
    library = compiled(SOURCE)
    if library is None:
        return None
    # A symbol looked up in torch's library is found in what that library itself is linked with.
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        parallel = ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p)
    except AttributeError:
        logger.warning("this build of torch does not run on OpenMP: decode attention gathers the KV, which is slower")
        return None
    return DecodeKernel(library, parallel)
