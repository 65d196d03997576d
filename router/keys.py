"""Who may call: the keys of a file, on both edges."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from ..core.errors import ConfigError, Unauthenticated
from ..proto.rpc import abort

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # subscriptable in the stubs only


def read_keys(path: Path) -> list[str]:
    """One key a line; empty lines and those that begin with # say nothing. Raises: ConfigError: there is no key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys of {path}: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} holds no API key; write one a line, or leave router.api_key_file out")
    return keys


class ApiKeys:
    """Keeps digests only, and compares with all of them in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> None:
        """Args: authorization: as HTTP's header of this name. Raises: Unauthenticated."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated(
                "there is no API key; send `Authorization: Bearer KEY` (the SDK: api_key, or SPLITSERVE_API_KEY)"
            )
        digest = _digest(key.strip())
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise Unauthenticated("the API key is not valid; check it, or ask the operator for one")


class RequireKey(grpc.aio.ServerInterceptor):
    """Refuses our services' methods to callers without a key; health and reflection are open."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        if handler_call_details.method.startswith("/splitserve."):
            sent = dict(handler_call_details.invocation_metadata or ())
            try:
                self._keys.check(str(sent["authorization"]) if "authorization" in sent else None)
            except Unauthenticated as error:
                refusal = error

                async def refuse(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
                    await abort(context, refusal)

                return grpc.unary_unary_rpc_method_handler(refuse)
        return await continuation(handler_call_details)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
