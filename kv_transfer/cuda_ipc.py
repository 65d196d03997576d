"""CUDA IPC: the receiver maps the pool of a GPU on its host; copy engines move blocks from it straight into its own.

Nothing is packed on the way. A rectangle of consecutive blocks moves at the full speed of the link, and scattered
blocks go as one batch, so a staging buffer, its second copy and its flow control would buy nothing. No kernel but the
checksum runs on the receiver's multiprocessors: a decode step does not notice the transfer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch

from ..core.errors import KvCorrupted, TransferFailed
from ..proto import kv_transfer_pb2
from .cuda import cuda_runtime
from .device_layout import HIGH_PRIORITY, DevicePoolBytes
from .frames import KvPart
from .host_copies import Ids
from .layout import PoolBytes

logger = logging.getLogger(__name__)

_MIN_RECTANGLE = 4  # consecutive blocks; fewer are cheaper as pieces of a batch


def export_pool(pool: PoolBytes) -> kv_transfer_pb2.DevicePool | None:
    """How a peer on this host can map the pool; None if it is not in a GPU's memory, or cannot be shared."""
    if not isinstance(pool, DevicePoolBytes):
        return None
    try:
        handle, offset = cuda_runtime().export(pool.rows.data_ptr())
    except OSError:  # memory of a kind that has no handles, such as expandable segments
        return None
    return kv_transfer_pb2.DevicePool(
        handle=handle,
        offset=offset,
        num_blocks=pool.num_blocks,
        row_bytes=pool.row_bytes,
        block_size=pool.block_size,
    )


class PeerDevicePool:
    """A peer's pool, mapped.

    Raises: OSError, ValueError: it cannot be mapped, or is not what the peer announced; take another transport.
    """

    def __init__(self, shared: kv_transfer_pb2.DevicePool, own: PoolBytes) -> None:
        if not isinstance(own, DevicePoolBytes):
            raise ValueError("our own pool is not in a GPU's memory")
        if shared.row_bytes != own.row_bytes or shared.block_size != own.block_size:
            raise ValueError(f"the peer's rows have {shared.row_bytes} bytes, ours {own.row_bytes}")
        self._num_blocks = shared.num_blocks
        self._own = own
        with torch.cuda.device(own.device):
            self._base = cuda_runtime().open(shared.handle)
        self._of_thread = threading.local()
        self._rows = self._base + shared.offset
        self._lock = threading.Lock()
        self._num_copies = 0
        self._closed = False

    def close(self) -> None:
        """Unmap, as soon as a copy that is under way ends."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._unmap_if_unused()

    def copy(self, part: KvPart, source_ids: Ids, own: PoolBytes, block_ids: Ids) -> int:
        """Copy the part's layers of whole blocks; returns the checksum of what now is in our blocks.

        Raises: TransferFailed: the peer is gone. KvCorrupted: it named a block that it does not have.
        """
        if len(source_ids) != len(block_ids) or int(source_ids.max()) >= self._num_blocks:
            raise KvCorrupted(
                f"a frame names {len(source_ids)} blocks where {len(block_ids)} of {self._num_blocks} are due"
            )
        with self._lock:
            if self._closed:
                raise TransferFailed("the prefill worker went away; its memory was unmapped")
            self._num_copies += 1
        try:
            return self._copy(part, source_ids.astype(np.int64), block_ids.astype(np.int64))
        except (OSError, RuntimeError) as error:  # of CUDA, and of PyTorch
            raise TransferFailed(f"copying from the prefill worker's memory failed: {error}") from error
        finally:
            with self._lock:
                self._num_copies -= 1
                self._unmap_if_unused()

    def _copy(self, part: KvPart, source_ids: Ids, block_ids: Ids) -> int:
        own, runtime, span = self._own, cuda_runtime(), self._own.row_range(part)
        width, row = span.stop - span.start, own.row_bytes
        sources = self._rows + span.start + source_ids * row
        targets = own.rows.data_ptr() + span.start + block_ids * row
        stream = self._stream()
        with torch.cuda.device(own.device), torch.cuda.stream(stream), _quiet_after(stream):
            on_device = own.on_device(block_ids)  # before the copies: nothing then stands between them and the checksum
            single = np.ones(len(sources), dtype=bool)
            for start, end in _long_runs(source_ids, block_ids):
                runtime.copy_rectangle(int(targets[start]), int(sources[start]), row, width, end - start, stream)
                single[start:end] = False
            if single.any():
                runtime.copy_pieces(targets[single].astype(np.uint64), sources[single].astype(np.uint64), width, stream)
            return own.checksum_here(part, on_device)

    def _stream(self) -> torch.cuda.Stream:
        """The calling thread's: while one transfer's checksum is computed, another's blocks are copied."""
        stream: torch.cuda.Stream | None = getattr(self._of_thread, "stream", None)
        if stream is None:
            stream = torch.cuda.Stream(self._own.device, HIGH_PRIORITY)  # type: ignore[no-untyped-call]
            self._of_thread.stream = stream
        return stream

    def _unmap_if_unused(self) -> None:
        if self._closed and self._num_copies == 0:
            try:
                with torch.cuda.device(self._own.device):
                    cuda_runtime().close(self._base)
            except (OSError, RuntimeError):  # of a GPU that is lost: what else ends with the link must end
                logger.exception("a prefill worker's memory could not be unmapped")


@contextmanager
def _quiet_after(stream: torch.cuda.Stream) -> Iterator[None]:
    """Whatever was queued has ended when this is left by an error: nobody writes to the blocks any more."""
    try:
        yield
    except Exception:  # the memory of a checksum may be what is lacking
        with suppress(RuntimeError):  # as of a device that is lost, and writes nothing either
            stream.synchronize()
        raise


def _long_runs(source_ids: Ids, block_ids: Ids) -> list[tuple[int, int]]:
    """Where blocks that are consecutive on both sides begin and end, if there are enough of them."""
    breaks = np.flatnonzero((np.diff(source_ids) != 1) | (np.diff(block_ids) != 1)) + 1
    edges = np.concatenate(([0], breaks, [len(source_ids)]))
    long = np.flatnonzero(np.diff(edges) >= _MIN_RECTANGLE)
    return list(zip(edges[long].tolist(), edges[long + 1].tolist(), strict=True))
