"""Services of a running gRPC server that can be taken away and replaced, as its process changes what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    Handler = grpc.GenericRpcHandler[Any, Any]
else:
    Handler = grpc.GenericRpcHandler  # subscriptable in the stubs only


class ServiceMount(Handler):
    """Stands in for a server where generated code registers services; `clear` forgets them, calls go on to their end.

    Add it once to the real server, before that starts. A method that nobody mounted is answered UNIMPLEMENTED.
    """

    def __init__(self) -> None:
        self._handlers: tuple[Handler, ...] = ()

    def add_generic_rpc_handlers(self, handlers: Sequence[Handler]) -> None:
        self._handlers += tuple(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """A server's short cut past its generic handlers, which hold the same methods."""

    def clear(self) -> None:
        self._handlers = ()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        for handler in self._handlers:
            if (found := handler.service(handler_call_details)) is not None:
                return found
        return None
