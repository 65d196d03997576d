"""A gRPC server with health and reflection on, bound or refused with a clear error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
import uvloop
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.errors import AddressInUse, InvalidRequest
from ..core.metrics import LinkMetrics
from ..core.threads import share_interpreter
from .peers import RequireRole
from .rpc import SERVER_OPTIONS, abort
from .tls import ServerCertificates, Tls

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # subscriptable in the stubs only
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
T = TypeVar("T")


class RefuseUnreadable(grpc.aio.ServerInterceptor):
    """Answers a request that is no valid protobuf (such as text that is not UTF-8) with InvalidRequest, not UNKNOWN."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler  # sessions, and calls that are refused whatever they say
        if handler.response_streaming:
            return handler  # raw KV, and Generate, which sees to it itself: a layer more slows every token

        def read(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError as error:
                return error

        async def answer(request: Any, context: Context) -> Any:
            if isinstance(request, DecodeError):
                await abort(context, InvalidRequest(f"the request cannot be read: {request}; text must be UTF-8"))
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a started process tells its parent."""

    address: str
    metrics_address: str
    pid: int
    boot_id: str
    http_address: str = ""  # of a router that serves HTTP


class RpcServer:
    """One grpc.aio server of one process. Register services on `.server` first, then `start`.

    Args:
        host: address to bind; loopback unless the operator says otherwise.
        port: 0 takes a free one.
        service_names: full names, for health and reflection.
        interceptors: what each call goes through first.
        tls: certificates of this server, asked of its peers too; None: plain text.
        links: counts who is refused.
        options: of the channel.
    """

    def __init__(
        self,
        host: str,
        port: int,
        service_names: Sequence[str],
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        options: Sequence[tuple[str, int]] = SERVER_OPTIONS,
        *,
        tls: Tls | None = None,
        links: LinkMetrics | None = None,
    ) -> None:
        self._host = host
        self._service_names = tuple(service_names)
        self._offered = frozenset(service_names)
        links = links or LinkMetrics()
        certificates = None
        if tls is not None:
            certificates = ServerCertificates(tls, links.tls_begun.inc)
            refused = links.refused.labels("role")
            interceptors = [RequireRole(refused.inc, links.tls_accepted.inc), *interceptors]
        self.server = grpc.aio.server(interceptors=[*interceptors, RefuseUnreadable()], options=options)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        try:
            if certificates is None:
                self.port = self.server.add_insecure_port(_join(host, port))
            else:
                self.port = self.server.add_secure_port(_join(host, port), certificates.credentials)
        except RuntimeError as error:
            raise AddressInUse(
                f"cannot listen on {_join(host, port)}: the port is in use or the address is not this host's; "
                "choose another with --port (0 takes a free one)"
            ) from error

    @property
    def address(self) -> str:
        """host:port that others connect to."""
        return _join(self._host, self.port)

    def offer(self, service_names: Sequence[str]) -> None:
        """The services that are served as of the next `set_serving`; health says NOT_SERVING of the others."""
        self._offered = frozenset(service_names)

    async def start(self) -> None:
        await self.server.start()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """Tell health watchers."""
        states = health_pb2.HealthCheckResponse
        for name in ("", *self._service_names):
            served = serving and (not name or name in self._offered)
            await self._health.set(name, states.SERVING if served else states.NOT_SERVING)

    async def stop(self, grace_s: float = 0.2) -> None:
        """Say goodbye to health watchers, then stop; an open Watch would hold `grace_s` to its end."""
        await self._health.enter_graceful_shutdown()
        await asyncio.shield(self.server.stop(grace_s))


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run as every role's process does: on uvloop, which a process that sends thousands of messages a second
    feels, and with threads that take turns."""
    share_interpreter()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
