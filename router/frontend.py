"""The router's gRPC face: clients' Inference and the operator's RouterAdmin, thin over `Dispatcher`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from ..core.errors import InvalidRequest, SplitserveError
from ..proto import inference_pb2, inference_pb2_grpc
from ..proto.rpc import abort
from .departed import DepartedWorker
from .dispatch import Dispatcher
from .front_door import FrontDoor
from .membership import WorkerPool
from .session import WorkerLink

logger = logging.getLogger(__name__)

MAX_KEY_CHARS = 256
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ADMIN = inference_pb2.DESCRIPTOR.services_by_name["RouterAdmin"].full_name

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)


class Inference(inference_pb2_grpc.InferenceServicer):
    """What clients call."""

    def __init__(self, door: FrontDoor) -> None:
        self._door = door

    async def Generate(
        self, request: inference_pb2.GenerateRequest | Undecodable, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            if isinstance(request, Undecodable):
                raise request.error
            async with aclosing(self._door.answer(request, context.time_remaining())) as messages:
                async for message in messages:
                    yield message
        except SplitserveError as error:
            await abort(context, error)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Context) -> inference_pb2.CancelResponse:
        return inference_pb2.CancelResponse(found=self._door.cancel(request.request_id))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=self._door.models())

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest | Undecodable, context: Context
    ) -> inference_pb2.TokenizeResponse:
        try:
            if isinstance(request, Undecodable):
                raise request.error
            return await self._door.tokenize(request)
        except SplitserveError as error:
            await abort(context, error)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        try:
            return self._door.detokenize(request)
        except SplitserveError as error:
            await abort(context, error)


class RouterAdmin(inference_pb2_grpc.RouterAdminServicer):
    """What the operator and the cluster controller call."""

    def __init__(self, pool: WorkerPool, dispatcher: Dispatcher) -> None:
        self._pool = pool
        self._dispatcher = dispatcher

    async def SetWorkers(
        self, request: inference_pb2.SetWorkersRequest, context: Context
    ) -> inference_pb2.SetWorkersResponse:
        self._pool.set_workers(request.prefill_addresses, request.decode_addresses, self._dispatcher)
        return inference_pb2.SetWorkersResponse()

    async def GetRouterStatus(
        self, request: inference_pb2.GetRouterStatusRequest, context: Context
    ) -> inference_pb2.GetRouterStatusResponse:
        return inference_pb2.GetRouterStatusResponse(
            workers=[*map(_view, self._pool), *map(_view_of_departed, self._pool.departed())],
            num_queued=self._dispatcher.num_queued,
            num_live=self._dispatcher.num_live,
            num_finished=self._dispatcher.num_finished,
            num_failed=self._dispatcher.num_failed,
            traffic=self._dispatcher.traffic.counts(self._dispatcher.num_queued_tokens),
        )


def _view(link: WorkerLink) -> inference_pb2.WorkerView:
    return inference_pb2.WorkerView(
        address=link.address,
        role=link.shown_role,
        state=link.state,
        reason=link.reason,
        worker_id=link.last_worker_id,
        num_running=link.status.num_running,
        num_waiting=link.status.num_waiting + link.status.num_held,
        num_available_blocks=link.status.num_free_blocks + link.status.num_cached_blocks,
        num_blocks=link.status.num_blocks,
    )


def _view_of_departed(gone: DepartedWorker) -> inference_pb2.WorkerView:
    return inference_pb2.WorkerView(
        address=gone.address, role=gone.role, state="gone", reason=gone.reason, worker_id=gone.worker_id
    )


class Undecodable:
    """Stands in for a request that is not valid protobuf, so that its error is ours and typed."""

    def __init__(self, error: InvalidRequest) -> None:
        self.error = error


def add_to_server(server: grpc.aio.Server, inference: Inference, admin: RouterAdmin) -> None:
    """Register both services."""
    # Found before the generated handlers below, which would end a call with bad UTF-8 as an untyped INTERNAL error.
    text_methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Generate": grpc.unary_stream_rpc_method_handler(
            inference.Generate,
            request_deserializer=_deserializer(inference_pb2.GenerateRequest),
            response_serializer=inference_pb2.GenerateResponse.SerializeToString,
        ),
        "Tokenize": grpc.unary_unary_rpc_method_handler(
            inference.Tokenize,
            request_deserializer=_deserializer(inference_pb2.TokenizeRequest),
            response_serializer=inference_pb2.TokenizeResponse.SerializeToString,
        ),
        "Detokenize": _readable(inference.Detokenize, inference_pb2.DetokenizeRequest),
        "Cancel": _readable(inference.Cancel, inference_pb2.CancelRequest),
        "ListModels": _readable(inference.ListModels, inference_pb2.ListModelsRequest),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(INFERENCE, text_methods),))
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    inference_pb2_grpc.add_RouterAdminServicer_to_server(admin, server)


def _readable(method: Callable[[M, Context], Awaitable[Message]], kind: type[M]) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler of a method that is called only with requests that could be read."""

    async def answer(request: M | Undecodable, context: Context) -> Message:
        if isinstance(request, Undecodable):
            await abort(context, request.error)
        return await method(request, context)

    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=_deserializer(kind),
        response_serializer=lambda message: message.SerializeToString(),
    )


def _deserializer(kind: type[M]) -> Callable[[bytes], M | Undecodable]:
    def deserialize(data: bytes) -> M | Undecodable:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            return Undecodable(
                InvalidRequest(f"the request cannot be read: {error}; send valid protobuf, text as UTF-8")
            )

    return deserialize
