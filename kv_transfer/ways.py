"""The ways by which a prefill worker's KV can leave: which one a receiver is offered, and what each needs."""

from __future__ import annotations

import logging
import os

from ..core.errors import GeometryMismatch, TransferFailed
from ..proto import kv_transfer_pb2 as pb
from .channels import CHANNELS, is_usable, lanes_of, staging_of
from .framing import framing_of
from .identity import WorkerIdentity
from .layout import PoolBytes
from .packing import Way
from .pool import KvPool
from .ranges import KvLayout

logger = logging.getLogger(__name__)


class Ways:
    """Of one pool; lives on the event loop.

    Args:
        layout, rank: how the worker's ranks hold the model's KV, and which of them this pool is.
        host: address that channels listen on.
    """

    def __init__(
        self, pool: KvPool, pool_bytes: PoolBytes, identity: WorkerIdentity, layout: KvLayout, rank: int, host: str
    ) -> None:
        self._pool = pool
        self._bytes = pool_bytes
        self._identity = identity
        self._layout = layout
        self._rank = rank
        self._channels = {
            transport: (lanes_of(transport, pool, host), staging_of(transport, pool_bytes))
            for transport in CHANNELS
            if is_usable(transport, pool)
        }

    def close(self) -> None:
        for lanes, _ in self._channels.values():
            lanes.close()

    def choose(self, request: pb.ConnectRequest, peer: KvLayout) -> pb.ConnectResponse:
        """The receiver's best transport that works between the two.

        Raises: GeometryMismatch: none does. TransferFailed: one would, but its channel cannot be opened here.
        """
        failed: TransferFailed | None = None
        response = pb.ConnectResponse(
            worker_id=self._identity.worker_id, boot_id=self._identity.boot_id, rank=self._rank
        )
        same_rows = peer == self._layout and request.rank == self._rank and request.block_size == self._pool.block_size
        for transport in request.transports:
            if transport == pb.TRANSPORT_GRPC:
                response.transport = transport
                return response
            if transport in self._channels:
                lanes, _ = self._channels[transport]
                try:
                    response.invitation = lanes.invite(request.boot_id, request.rank, request.link_epoch)
                except (TransferFailed, OSError) as error:
                    name = pb.Transport.Name(transport)
                    logger.warning("nobody can be invited to a channel of %s: %s", name, error)
                    failed = TransferFailed(f"the prefill worker cannot open a channel of {name}: {error}")
                    continue
                response.transport = transport
                return response
            if (
                transport == pb.TRANSPORT_SHARED_MEMORY
                and self._pool.fd is not None
                and request.host_id == self._identity.host_id
                and same_rows
            ):
                response.transport = transport
                response.shared_pool.pid = os.getpid()
                response.shared_pool.fd = self._pool.fd
                response.shared_pool.size_bytes = self._pool.size_bytes
                response.shared_pool.row_bytes = self._pool.row_bytes
                response.shared_pool.block_size = self._pool.block_size
                return response
            if (
                transport == pb.TRANSPORT_CUDA_IPC
                and request.host_id == self._identity.host_id
                and same_rows
                and (device_pool := self._exported()) is not None
            ):
                response.transport = transport
                response.device_pool.CopyFrom(device_pool)
                return response
        if failed is not None:
            raise failed
        names = ", ".join(pb.Transport.Name(transport) for transport in request.transports)
        raise GeometryMismatch(
            f"no transport fits: the receiver offers [{names}]; shared memory needs one host, one block size, KV dtype "
            "and tensor-parallel size, and a shared pool on the prefill worker, CUDA IPC the same and GPUs on both "
            "sides; gRPC always works: allow it"
        )

    def _exported(self) -> pb.DevicePool | None:
        """How our pool can be mapped, if it is a GPU's."""
        if self._pool.keys(0).device.type != "cuda":
            return None
        from .cuda_ipc import export_pool

        return export_pool(self._bytes)

    def of(self, request: pb.FetchRequest) -> Way:
        """What a Fetch asks for. Raises: StaleMessage: its channel is gone. GeometryMismatch: there is no such way."""
        framing, grant = framing_of(request.transport), request.grant
        if not framing.in_lane:
            return Way(framing=framing, round=request.round)
        if request.transport not in self._channels:
            name = pb.Transport.Name(request.transport)
            raise GeometryMismatch(f"{name} was not offered by this worker; connect anew")
        lanes, staging = self._channels[request.transport]
        lane = lanes.find(grant.decode_boot_id, grant.decode_rank, request.link_epoch)
        return Way(framing=framing, lane=lane, staging=staging, round=request.round)
