"""Who may call: API keys and their scopes, on both edges."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
import grpc.aio

from ..core.api_key import ANYBODY, ApiKey, Scope
from ..core.errors import PermissionDenied, SplitserveError, Unauthenticated
from ..core.metrics import LinkMetrics
from ..proto.rpc import abort
from .key_file import key_digest

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # subscriptable in the stubs only

# Set by each edge in the task of a call, and read where its request is made.
CALLER: ContextVar[ApiKey] = ContextVar("caller", default=ANYBODY)


class ApiKeys:
    """Knows digests only, and compares with all of them in constant time.

    Args:
        known: the keys by digest, asked for at each call.
        controller: digest of the key of the cluster's controller, which is in no file.
    """

    def __init__(
        self, known: Callable[[], Mapping[bytes, ApiKey]], links: LinkMetrics, controller: bytes | None = None
    ) -> None:
        self._known = known
        self._links = links
        self._controller = {controller: ApiKey(name="controller", scopes=frozenset(Scope))} if controller else {}

    def check(self, authorization: str | None, scope: Scope) -> ApiKey:
        """Whose key it is; a refusal is counted.

        Args: authorization: as HTTP's header of this name.
        Raises: Unauthenticated: it is none that we know. PermissionDenied: it does not open this.
        """
        try:
            return self._check(authorization, scope)
        except Unauthenticated:
            self._links.refused.labels("key").inc()
            raise
        except PermissionDenied:
            self._links.refused.labels("scope").inc()
            raise

    def _check(self, authorization: str | None, scope: Scope) -> ApiKey:
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Unauthenticated(
                "there is no API key; send `Authorization: Bearer KEY` (the SDK: api_key, or SPLITSERVE_API_KEY)"
            )
        digest = key_digest(secret.strip())
        found = None
        for known, key in (*self._known().items(), *self._controller.items()):
            if hmac.compare_digest(digest, known):  # and go on: the time tells nothing about which
                found = key
        if found is None:
            raise Unauthenticated("the API key is not valid; check it, or ask the operator for one")
        if scope not in found.scopes:
            has = ", ".join(sorted(each.value for each in found.scopes))
            raise PermissionDenied(f"API key {found.name!r} has the scopes [{has}], this call needs {scope.value}")
        return found


class RequireKey(grpc.aio.ServerInterceptor):
    """Refuses our services' methods to callers without a key; health and reflection are open."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        method = handler_call_details.method
        if method.startswith("/splitserve."):
            sent = dict(handler_call_details.invocation_metadata or ())
            scope = Scope.INFERENCE if method.startswith("/splitserve.v1.Inference/") else Scope.ADMIN
            try:
                key = self._keys.check(str(sent["authorization"]) if "authorization" in sent else None, scope)
            except SplitserveError as error:
                refusal = error

                async def refuse(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
                    await abort(context, refusal)

                return grpc.unary_unary_rpc_method_handler(refuse)
            CALLER.set(key)  # gRPC runs interceptors and handler of a call in one task
        return await continuation(handler_call_details)
