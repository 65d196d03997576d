"""When the controller takes the routers to know the workers."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from splitserve.core.errors import SplitserveError
from splitserve.deploy.admin_access import AdminAccess
from splitserve.deploy.members import Member, Phase
from splitserve.deploy.process import Endpoint
from splitserve.deploy.router_links import RouterLinks
from splitserve.proto import inference_pb2 as pb
from splitserve.proto import inference_pb2_grpc


class SaysStates(inference_pb2_grpc.RouterAdminServicer):
    """A router to which every worker that it is told of is in a state that the test chooses."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}

    async def SetWorkers(self, request: pb.SetWorkersRequest, context: object) -> pb.SetWorkersResponse:
        return pb.SetWorkersResponse()

    async def GetRouterStatus(self, request: object, context: object) -> pb.GetRouterStatusResponse:
        rows = [pb.WorkerView(address=at, state=state) for at, state in self.states.items()]
        return pb.GetRouterStatusResponse(workers=rows)


def member(name: str, address: str, phase: Phase = Phase.READY) -> Member:
    endpoint = Endpoint(address=address, metrics_address="", boot_id="b", pid=1)
    return Member(name=name, role=name.partition("-")[0], phase=phase, endpoint=endpoint)  # type: ignore[arg-type]


async def test_workers_are_known_where_they_are_used_or_were_drained_by_hand() -> None:
    router, server = SaysStates(), grpc.aio.server()
    inference_pb2_grpc.add_RouterAdminServicer_to_server(router, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    links = RouterLinks(AdminAccess())
    workers = [member("prefill-0", "p"), member("decode-0", "d"), member("decode-1", "s", Phase.STARTING)]
    members = [member("router-0", address), *workers]

    async def knows(**states: str) -> bool:
        router.states = states
        async with asyncio.timeout(10):
            await links.tell(members)
        return links.knows(members)

    try:
        assert not links.knows(members)
        assert await knows(p="ready", d="ready")
        assert await knows(p="ready", d="draining")  # or whatever changes the cluster would wait for its undoing
        assert not await knows(p="ready", d="connecting")
        assert not await knows(p="ready")
        assert not await knows(p="ready", d="ready", gone="ready")
        assert await knows(p="ready", d="ready", gone="draining")
        with pytest.raises(SplitserveError, match="the router refuses the worker at d"):
            await knows(p="ready", d="refused")
    finally:
        await links.close()
        await server.stop(0)
