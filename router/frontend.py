"""The router's gRPC face: clients' Inference and the operator's RouterAdmin, thin over `Dispatcher`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

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
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        try:
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

    def __init__(self, pool: WorkerPool, dispatcher: Dispatcher, router_id: str) -> None:
        self._pool = pool
        self._router_id = router_id
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
            num_queued=self._dispatcher.waiting.num_queued,
            num_live=self._dispatcher.num_live,
            num_finished=self._dispatcher.outcomes.num_finished,
            num_failed=self._dispatcher.outcomes.num_failed,
            num_cancelled=self._dispatcher.outcomes.num_cancelled,
            router_id=self._router_id,
            traffic=self._dispatcher.outcomes.traffic.counts(self._dispatcher.waiting.num_queued_tokens),
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
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    inference_pb2_grpc.add_RouterAdminServicer_to_server(admin, server)
    # In place of the generated handler, which would end a call with bad UTF-8 as an untyped error.
    generate: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
        inference.Generate,
        request_deserializer=_read,
        response_serializer=inference_pb2.GenerateResponse.SerializeToString,
    )
    server.add_registered_method_handlers(INFERENCE, {"Generate": generate})


def _read(data: bytes) -> inference_pb2.GenerateRequest | Undecodable:
    try:
        return inference_pb2.GenerateRequest.FromString(data)
    except DecodeError as error:
        return Undecodable(InvalidRequest(f"the request cannot be read: {error}; send valid protobuf, text as UTF-8"))
