"""Which role may call which service, where certificates prove roles."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import grpc.aio

from ..core.errors import PermissionDenied
from .rpc import abort
from .tls import PeerRole, roles_of

logger = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # subscriptable in the stubs only
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_OURS = "splitserve.v1."
_ALLOWED: Mapping[str, frozenset[PeerRole]] = {
    "Inference": frozenset({PeerRole.CLIENT, PeerRole.OPERATOR}),
    "RouterAdmin": frozenset({PeerRole.OPERATOR}),
    "PrefillWorker": frozenset({PeerRole.ROUTER, PeerRole.OPERATOR}),  # an operator calibrates
    "DecodeWorker": frozenset({PeerRole.ROUTER, PeerRole.OPERATOR}),
    "WorkerAdmin": frozenset({PeerRole.OPERATOR}),
    "KvTransfer": frozenset({PeerRole.DECODE}),
}
_MAX_PEERS = 4_096


class RequireRole(grpc.aio.ServerInterceptor):
    """Refuses a call to peers whose certificate has no role that may make it; health and reflection are everybody's.

    Args:
        on_refused: counts a refusal.
        on_connection: counts a connection, at its first call.
    """

    def __init__(self, on_refused: Callable[[], None], on_connection: Callable[[], None]) -> None:
        self._on_refused = on_refused
        self._on_connection = on_connection
        self._peers: OrderedDict[str, None] = OrderedDict()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        kind = ("stream_" if handler.request_streaming else "unary_") + (
            "stream" if handler.response_streaming else "unary"
        )
        behaviour = getattr(handler, kind)

        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                await self._check(method, context)
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response

            guarded: Any = stream
        else:

            async def call(request: Any, context: Context) -> Any:
                await self._check(method, context)
                return await behaviour(request, context)

            guarded = call
        wrap = getattr(grpc, f"{kind}_rpc_method_handler")
        made: Handler = wrap(guarded, handler.request_deserializer, handler.response_serializer)
        return made

    async def _check(self, method: str, context: Context) -> None:
        peer = context.peer()
        if peer not in self._peers:
            self._on_connection()
            self._peers[peer] = None
            if len(self._peers) > _MAX_PEERS:
                self._peers.popitem(last=False)
        service = method.rpartition("/")[0].lstrip("/")
        if not service.startswith(_OURS):
            return
        allowed = _ALLOWED.get(service.removeprefix(_OURS), frozenset())
        roles = roles_of(context.auth_context())
        if roles & allowed:
            return
        self._on_refused()
        has = ", ".join(sorted(role.value for role in roles)) or "none of our roles"
        needed = " or ".join(sorted(role.value for role in allowed))
        error = PermissionDenied(f"{method} is for the role {needed}; the certificate of {peer} proves {has}")
        logger.warning("refused: %s", error.message)
        await abort(context, error)
