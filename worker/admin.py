"""What operators and controllers ask of a worker over gRPC: how it fares, and to drain or to change its role."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio

from ..core.errors import InvalidRequest, SplitserveError
from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.rpc import abort
from .holdings import list_holdings
from .options import Role

if TYPE_CHECKING:
    from .host import WorkerHost

ROLES: dict[Role, worker_pb2.Role.ValueType] = {
    "prefill": worker_pb2.ROLE_PREFILL,
    "decode": worker_pb2.ROLE_DECODE,
    "colocated": worker_pb2.ROLE_COLOCATED,
}
_ROLE_NAMES: dict[int, Role] = {value: name for name, value in ROLES.items()}


class WorkerAdmin(worker_pb2_grpc.WorkerAdminServicer):
    """Of one host, whatever its role is."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def GetWorkerStatus(
        self, request: worker_pb2.GetWorkerStatusRequest, context: object
    ) -> worker_pb2.GetWorkerStatusResponse:
        return worker_pb2.GetWorkerStatusResponse(info=self._host.info(), status=self._host.status())

    async def Drain(self, request: worker_pb2.DrainRequest, context: object) -> worker_pb2.DrainResponse:
        drained = await self._host.drain(max(0.0, request.timeout_s))
        return worker_pb2.DrainResponse(num_left=drained.num_left, num_handed_over=drained.num_handed_over)

    async def ListHoldings(
        self, request: worker_pb2.ListHoldingsRequest, context: object
    ) -> worker_pb2.ListHoldingsResponse:
        return list_holdings(self._host.engine, self._host.holders(), request)

    async def Undrain(self, request: worker_pb2.UndrainRequest, context: object) -> worker_pb2.UndrainResponse:
        await self._host.undrain()
        return worker_pb2.UndrainResponse()

    async def SwitchRole(
        self, request: worker_pb2.SwitchRoleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.SwitchRoleResponse:
        try:
            if (role_switch := self._host.switch) is None or request.role not in _ROLE_NAMES:
                raise InvalidRequest(
                    f"worker {self._host.identity.worker_id} cannot take role {request.role}: it has its role for "
                    "life, or there is no such role",
                    field="role",
                )
            switched = await role_switch.to(_ROLE_NAMES[request.role], max(0.0, request.timeout_s))
        except SplitserveError as error:
            await abort(context, error)
        return worker_pb2.SwitchRoleResponse(
            info=self._host.info(), switch_s=switched.switch_s, num_handed_over=switched.num_handed_over
        )
