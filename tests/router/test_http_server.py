"""The HTTP server of a router that has no worker: what it says, and how it listens."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from splitserve.core.errors import AddressInUse
from splitserve.router.server import Router, RouterOptions


@pytest_asyncio.fixture
async def router(tiny: Path) -> AsyncIterator[Router]:
    router = Router(RouterOptions(model=str(tiny), port=0, http_port=0, no_worker_wait_s=0.05))
    await router.start()
    yield router
    await router.stop()


async def test_without_workers_it_is_alive_and_says_what_is_missing(router: Router, tiny: Path) -> None:
    async with httpx2.AsyncClient(base_url=f"http://{router.http_address}") as http:
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/v1/models")).json()["data"] == []
        refused = await http.post("/v1/completions", json={"model": str(tiny), "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["x-should-retry"] == "true"
        assert int(refused.headers["retry-after-ms"]) > 0
        assert "splitserve_live_requests 0.0" in (await http.get("/metrics")).text
        assert (await http.get("/openapi.json")).json()["openapi"] == "3.1.0"


async def test_connections_do_not_wait_for_acknowledgements(router: Router) -> None:
    async with httpx2.AsyncClient(base_url=f"http://{router.http_address}") as http:
        await http.get("/health")
        (accepted,) = router._http._server.server_state.connections
        connection = accepted.transport.get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_port_in_use_is_named(router: Router, tiny: Path) -> None:
    port = int(router.http_address.rpartition(":")[2])
    with pytest.raises(AddressInUse, match=f"127.0.0.1:{port}.*--http-port"):
        Router(RouterOptions(model=str(tiny), port=0, http_port=port))
