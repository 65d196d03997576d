"""Shared memory: the receiver maps the sender's sealed pool read-only and copies rows straight into its own blocks."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np

from ..core.errors import KvCorrupted, TransferFailed
from ..proto import kv_transfer_pb2
from .frames import KvPart
from .host_copies import Bytes, Ids
from .layout import PoolBytes

_REQUIRED_SEALS = fcntl.F_SEAL_SHRINK  # a sender that shrank its pool would kill us with SIGBUS


class PeerPool:
    """A peer's pool, mapped read-only.

    Raises: OSError, ValueError: it cannot be mapped, or is not what the peer announced; take another transport.
    """

    def __init__(self, shared: kv_transfer_pb2.SharedPool, own: PoolBytes) -> None:
        if shared.row_bytes != own.row_bytes or shared.block_size != own.block_size:
            raise ValueError(f"the peer's rows have {shared.row_bytes} bytes, ours {own.row_bytes}")
        fd = os.open(f"/proc/{shared.pid}/fd/{shared.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != shared.size_bytes:
                raise ValueError(f"the peer's pool has {os.fstat(fd).st_size} bytes, not {shared.size_bytes}")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _REQUIRED_SEALS != _REQUIRED_SEALS:
                raise ValueError("the peer's pool is not sealed against shrinking")
            memory = mmap.mmap(fd, shared.size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        num_blocks = shared.size_bytes // shared.row_bytes
        flat = np.frombuffer(memory, dtype=np.uint8, count=num_blocks * shared.row_bytes)
        self._rows: Bytes | None = flat.reshape(num_blocks, shared.row_bytes)

    def close(self) -> None:
        """Unmap, as soon as a copy that is under way ends."""
        self._rows = None  # the mapping lives as long as its last view

    def copy(self, part: KvPart, source_ids: Ids, own: PoolBytes, block_ids: Ids) -> int:
        """Copy the part's layers of whole blocks; returns the checksum of what now is in our blocks.

        Raises: TransferFailed: the peer is gone. KvCorrupted: it named a block that it does not have.
        """
        rows = self._rows
        if rows is None:
            raise TransferFailed("the prefill worker went away; its memory was unmapped")
        if len(source_ids) != len(block_ids) or int(source_ids.max()) >= len(rows):
            raise KvCorrupted(f"a frame names {len(source_ids)} blocks where {len(block_ids)} of {len(rows)} are due")
        return own.copy_rows(part, rows, source_ids, block_ids)
