"""The controller's calls to workers: drain, and take another role."""

from __future__ import annotations

import logging

import grpc.aio

from ..core.config import WorkerRole
from ..core.errors import ConfigError
from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.tls import PeerRole, Tls, open_channel

logger = logging.getLogger(__name__)

_REPLY_S = 12.0  # beyond the time given: what is left is handed over


async def drain_worker(address: str, timeout_s: float, tls: Tls | None = None) -> int:
    """Returns the requests left when the time was up; -1 if the worker does not answer, or cannot be asked."""
    try:
        async with open_channel(address, tls, PeerRole.WORKER) as channel:
            stub = worker_pb2_grpc.WorkerAdminStub(channel)
            request = worker_pb2.DrainRequest(timeout_s=timeout_s)
            answer = await stub.Drain(request, timeout=timeout_s + _REPLY_S)
    except (grpc.aio.AioRpcError, ConfigError) as error:
        logger.warning("the worker at %s cannot be drained: %s", address, _reason(error))
        return -1
    if answer.num_left:
        logger.warning("the worker at %s has %d requests left after %.1f s", address, answer.num_left, timeout_s)
    return int(answer.num_left)


async def switch_worker(address: str, role: WorkerRole, timeout_s: float, tls: Tls | None = None) -> str | None:
    """Drain it and give it another role, model and KV pool kept; its new boot id, None if it did not take the role."""
    request = worker_pb2.SwitchRoleRequest(role=worker_pb2.Role.Value(f"ROLE_{role.upper()}"), timeout_s=timeout_s)
    try:
        async with open_channel(address, tls, PeerRole.WORKER) as channel:
            stub = worker_pb2_grpc.WorkerAdminStub(channel)
            answer = await stub.SwitchRole(request, timeout=timeout_s + _REPLY_S)
    except (grpc.aio.AioRpcError, ConfigError) as error:
        logger.warning("the worker at %s does not become a %s worker: %s", address, role, _reason(error))
        return None
    logger.info("%s is a %s worker, %.3f s after its drain", answer.info.worker_id, role, answer.switch_s)
    return answer.info.boot_id


def _reason(error: grpc.aio.AioRpcError | ConfigError) -> str | None:
    return error.message if isinstance(error, ConfigError) else error.details()
