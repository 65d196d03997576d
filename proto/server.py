"""A gRPC server with health and reflection on, bound or refused with a clear error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.errors import AddressInUse
from .rpc import SERVER_OPTIONS


class RpcServer:
    """One grpc.aio server of one process. Register services on `.server` first, then `start`.

    Args:
        host: address to bind; loopback unless the operator says otherwise.
        port: 0 takes a free one.
        service_names: full names, for health and reflection.
    """

    def __init__(self, host: str, port: int, service_names: Sequence[str]) -> None:
        self._host = host
        self._service_names = tuple(service_names)
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        try:
            self.port = self.server.add_insecure_port(_join(host, port))
        except RuntimeError as error:
            raise AddressInUse(
                f"cannot listen on {_join(host, port)}: the port is in use or the address is not this host's; "
                "choose another with --port (0 takes a free one)"
            ) from error

    @property
    def address(self) -> str:
        """host:port that others connect to."""
        return _join(self._host, self.port)

    async def start(self) -> None:
        await self.server.start()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """Tell health watchers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 0.2) -> None:
        """Say goodbye to health watchers, then stop; an open Watch would hold `grace_s` to its end."""
        await self._health.enter_graceful_shutdown()
        await asyncio.shield(self.server.stop(grace_s))


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
