"""API keys over HTTP: every path but those of health asks for one, /metrics for one of an operator."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ...core import api_key
from ...core.errors import PermissionDenied, Unauthenticated
from ..keys import CALLER, ApiKeys
from .errors import error_response

_OPEN_PATHS = ("/health", "/healthz", "/readyz")
_ADMIN_PATHS = ("/metrics",)


class RequireKey:
    """Middleware that answers 401 to callers without a key, 403 to those whose key does not open the path."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            needed = api_key.Scope.ADMIN if scope["path"] in _ADMIN_PATHS else api_key.Scope.INFERENCE
            try:
                key = self._keys.check(Request(scope).headers.get("authorization"), needed)
            except (Unauthenticated, PermissionDenied) as error:
                await error_response(error)(scope, receive, send)
                return
            CALLER.set(key)
        await self._app(scope, receive, send)
