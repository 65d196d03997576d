"""The controller's own certificate cannot be read for a moment, or is no longer taken: nobody else is to blame."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from splitserve.core.metrics import LinkMetrics
from splitserve.deploy.admin_access import AdminAccess
from splitserve.deploy.members import Member, Phase
from splitserve.deploy.process import Endpoint
from splitserve.deploy.router_links import RouterLinks
from splitserve.deploy.worker_admin import drain_worker, switch_worker
from splitserve.deploy.worker_watch import WorkerWatch
from splitserve.proto import inference_pb2_grpc, worker_pb2_grpc
from splitserve.proto.server import RpcServer
from splitserve.proto.tls import Tls

from .stand_in import Router, Worker


@pytest_asyncio.fixture
async def members(certificates: Any) -> AsyncIterator[tuple[Member, Member]]:
    """A router and a prefill worker that serve with TLS."""
    servers = {
        role: RpcServer("127.0.0.1", 0, [service], tls=certificates.tls(role), links=LinkMetrics())
        for role, service in (("router", "RouterAdmin"), ("prefill", "WorkerAdmin"))
    }
    inference_pb2_grpc.add_RouterAdminServicer_to_server(Router(None), servers["router"].server)
    worker_pb2_grpc.add_WorkerAdminServicer_to_server(Worker("prefill"), servers["prefill"].server)
    for server in servers.values():
        await server.start()

    def member(role: Any) -> Member:
        endpoint = Endpoint(address=servers[role].address, metrics_address="", boot_id="b", pid=1)
        return Member(name=f"{role}-0", role=role, phase=Phase.READY, endpoint=endpoint)

    yield member("router"), member("prefill")
    for server in servers.values():
        await server.stop()


async def test_nobody_is_asked_meanwhile_and_everybody_afterwards(
    members: tuple[Member, Member], certificates: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = certificates.tls("operator")
    tls = Tls(ca=own.ca, cert=tmp_path / "operator.pem", key=own.key)
    worker = members[1]
    assert worker.endpoint is not None
    watch, links = WorkerWatch(tls), RouterLinks(AdminAccess(), tls)
    try:
        assert await watch.look(members, unhealthy_s=0.0) == {}
        await links.tell(members)
        assert (watch.roles, links.views) == ({}, ())
        assert await drain_worker(worker.endpoint.address, 1.0, tls) == -1
        assert await switch_worker(worker.endpoint.address, "decode", 1.0, tls) is None
        assert caplog.text.count(f"cannot read {tmp_path / 'operator.pem'}") == 4

        (tmp_path / "operator.pem").write_bytes((certificates.directory / "operator.pem").read_bytes())
        while not watch.roles:
            await watch.look(members, unhealthy_s=600.0)
        while not links.use(worker):
            await links.tell(members)
        assert await drain_worker(worker.endpoint.address, 1.0, tls) == 0
        assert await switch_worker(worker.endpoint.address, "decode", 1.0, tls) is not None
    finally:
        await watch.close()
        await links.close()


async def test_nobody_is_replaced_because_nobody_takes_the_certificate(
    members: tuple[Member, Member], certificates: Any, strangers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ca = certificates.directory / "ca.pem"
    watch = WorkerWatch(strangers.tls("operator", ca=ca))
    try:
        assert await watch.look(members, unhealthy_s=0.0, hears_routers=False) == {}
        assert "check that the operator's certificate is valid" in caplog.text
        assert list(await watch.look(members, unhealthy_s=0.0)) == ["prefill-0"]  # a router was heard

        # Nor because one that was silent has gone meanwhile.
        endpoint = Endpoint(address="127.0.0.1:1", metrics_address="", boot_id="b", pid=1)
        gone = Member(name="decode-0", role="decode", phase=Phase.READY, endpoint=endpoint)
        assert set(await watch.look([*members, gone], unhealthy_s=0.0)) == {"prefill-0", "decode-0"}
        assert await watch.look(members, unhealthy_s=0.0, hears_routers=False) == {}
    finally:
        await watch.close()
