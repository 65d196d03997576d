"""The controller's calls to workers: how they fare, and drain."""

from __future__ import annotations

import logging

import grpc.aio

from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.tls import PeerRole, Tls, open_channel

logger = logging.getLogger(__name__)

_REPLY_S = 12.0  # beyond the time given: what is left is handed over


async def drain_worker(address: str, timeout_s: float, tls: Tls | None = None) -> int:
    """Returns the requests left when the time was up; -1 if the worker does not answer."""
    async with open_channel(address, tls, PeerRole.WORKER) as channel:
        stub = worker_pb2_grpc.WorkerAdminStub(channel)
        try:
            request = worker_pb2.DrainRequest(timeout_s=timeout_s)
            answer = await stub.Drain(request, timeout=timeout_s + _REPLY_S)
        except grpc.aio.AioRpcError as error:
            logger.warning("the worker at %s cannot be drained: %s", address, error.details())
            return -1
    if answer.num_left:
        logger.warning("the worker at %s has %d requests left after %.1f s", address, answer.num_left, timeout_s)
    return int(answer.num_left)
