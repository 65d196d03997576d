"""API keys over HTTP: every path but /health asks for one."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ...core.errors import Unauthenticated
from ..keys import ApiKeys
from .errors import error_response

_OPEN_PATHS = ("/health",)


class RequireKey:
    """Middleware that answers 401 to callers without a key."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            try:
                self._keys.check(Request(scope).headers.get("authorization"))
            except Unauthenticated as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
