"""Mutual TLS on gRPC links: every role at every service, foreign certificates, and files that change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from splitserve.core.errors import ConfigError
from splitserve.core.metrics import LinkMetrics
from splitserve.deploy.certificates import ROLES, make_certificate
from splitserve.proto import inference_pb2, kv_transfer_pb2, worker_pb2
from splitserve.proto.rpc import ERROR_KEY
from splitserve.proto.server import RpcServer
from splitserve.proto.tls import PeerRole, Tls, open_channel

# The one place outside of the product that says who may call what.
MAY_CALL = {
    "Inference": {"client", "operator"},
    "RouterAdmin": {"operator"},
    "PrefillWorker": {"router", "operator"},
    "DecodeWorker": {"router", "operator"},
    "WorkerAdmin": {"operator"},
    "KvTransfer": {"decode"},
}
DIALS = {"timeout": 20.0}


class Services(grpc.GenericRpcHandler):
    """Answers every unary method of ours with nothing."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if not details.method.startswith("/splitserve."):
            return None

        async def answer(request: bytes, context: Any) -> bytes:
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


class Server:
    def __init__(self, tls: Tls, handler: grpc.GenericRpcHandler | None = None) -> None:
        self.links = LinkMetrics()
        self.rpc = RpcServer("127.0.0.1", 0, list(MAY_CALL), tls=tls, links=self.links)
        self.rpc.server.add_generic_rpc_handlers((handler or Services(),))

    def count(self, reason: str) -> float:
        return self.links.refused.labels(reason)._value.get()

    @property
    def handshakes(self) -> tuple[float, float]:
        return self.links.tls_begun._value.get(), self.links.tls_accepted._value.get()


@pytest_asyncio.fixture
async def server(certificates: Any) -> AsyncIterator[Server]:
    """It holds a certificate of the role decode."""
    server = Server(certificates.tls("decode"))
    await server.rpc.start()
    yield server
    await server.rpc.stop()


async def call(server: Server, tls: Tls | None, service: str, expected: PeerRole | None = PeerRole.DECODE) -> str:
    """How a call ends: OK, or its error."""
    async with open_channel(server.rpc.address, tls, expected) as channel:
        try:
            await channel.unary_unary(f"/splitserve.v1.{service}/Anything")(b"", **DIALS)
        except grpc.aio.AioRpcError as error:
            sent = dict(error.trailing_metadata() or ())
            return str(sent.get(ERROR_KEY, error.code().name))
    return "OK"


@pytest.mark.parametrize("role", [role.value for role in ROLES])
async def test_each_role_calls_what_is_for_it_and_nothing_else(server: Server, certificates: Any, role: str) -> None:
    tls = certificates.tls(role)
    ends = {service: await call(server, tls, service) for service in MAY_CALL}
    assert ends == {service: "OK" if role in may else "permission_denied" for service, may in MAY_CALL.items()}
    assert server.count("role") == sum(end != "OK" for end in ends.values())
    async with open_channel(server.rpc.address, tls) as channel:  # health is for everybody with a certificate
        assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", **DIALS) == b"\x08\x01"


async def test_a_service_that_is_not_known_is_nobody_s(server: Server, certificates: Any) -> None:
    assert await call(server, certificates.tls("operator"), "Tomorrow") == "permission_denied"


async def test_strangers_do_not_get_through_the_handshake(server: Server, certificates: Any, strangers: Any) -> None:
    assert await call(server, certificates.tls("operator"), "WorkerAdmin") == "OK"
    assert server.handshakes == (1, 1)
    ca = certificates.directory / "ca.pem"
    for tls in (strangers.tls("operator", ca=ca), Tls(ca=ca), None):
        assert await call(server, tls, "WorkerAdmin", None) == "UNAVAILABLE"
    begun, accepted = server.handshakes
    assert begun >= 3  # plain text begins none
    assert accepted == 1
    assert server.count("role") == 0


async def test_a_server_must_prove_its_role_and_its_authority(
    server: Server, certificates: Any, strangers: Any
) -> None:
    tls = certificates.tls("operator")
    assert await call(server, tls, "WorkerAdmin", PeerRole.DECODE) == "OK"
    assert await call(server, tls, "WorkerAdmin", PeerRole.PREFILL) == "UNAVAILABLE"
    assert await call(server, strangers.tls("operator"), "WorkerAdmin", PeerRole.DECODE) == "UNAVAILABLE"
    assert await call(server, tls, "WorkerAdmin", None) == "OK"  # by the host's address, which is in it
    assert server.handshakes[1] == 2


async def test_changed_files_are_used_from_the_next_handshake(
    certificates: Any, strangers: Any, tmp_path: Path
) -> None:
    tls = Tls(ca=tmp_path / "ca.pem", cert=tmp_path / "decode.pem", key=tmp_path / "decode.key")

    def install(source: Any) -> None:
        for name in ("decode.key", "decode.pem", "ca.pem"):
            part = tmp_path / "part"
            part.write_bytes((source.directory / name).read_bytes())
            part.replace(tmp_path / name)

    install(certificates)
    server = Server(tls)
    await server.rpc.start()
    try:
        old, new = certificates.tls("operator"), strangers.tls("operator")
        assert [await call(server, tls, "WorkerAdmin") for tls in (old, new)] == ["OK", "UNAVAILABLE"]
        install(strangers)
        assert [await call(server, tls, "WorkerAdmin") for tls in (old, new)] == ["UNAVAILABLE", "OK"]
        (tmp_path / "decode.pem").write_text("not a certificate")
        assert await call(server, new, "WorkerAdmin") == "OK"
        (tmp_path / "decode.pem").unlink()
        assert await call(server, new, "WorkerAdmin") == "OK"
    finally:
        await server.rpc.stop()


async def test_requests_and_streams_pass_the_check_unchanged(certificates: Any) -> None:
    """The wrapper keeps the shape of each kind of method."""

    async def several(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        yield b"2"

    async def echo(request: Any, context: Any) -> None:
        async for part in request:
            await context.write(part)

    handlers = {
        "Several": grpc.unary_stream_rpc_method_handler(several),
        "Echo": grpc.stream_stream_rpc_method_handler(echo),
    }
    handler = grpc.method_handlers_generic_handler("splitserve.v1.DecodeWorker", handlers)
    server = Server(certificates.tls("decode"), handler)
    await server.rpc.start()
    try:
        async with open_channel(server.rpc.address, certificates.tls("router"), PeerRole.DECODE) as channel:
            stream = channel.unary_stream("/splitserve.v1.DecodeWorker/Several")(b"1", **DIALS)
            assert [part async for part in stream] == [b"1", b"2"]
            both = channel.stream_stream("/splitserve.v1.DecodeWorker/Echo")(iter([b"a", b"b"]), **DIALS)
            assert [part async for part in both] == [b"a", b"b"]
    finally:
        await server.rpc.stop()


def test_files_that_cannot_serve_are_refused_at_start(certificates: Any, strangers: Any, tmp_path: Path) -> None:
    good = certificates.tls("router")
    for tls, message in (
        (Tls(ca=good.ca, cert=good.cert), "TLS needs ca, cert and key; key is not set"),
        (Tls(ca=good.ca, cert=good.cert, key=strangers.tls("router").key), "cannot use the TLS files"),
        (Tls(ca=good.ca, cert=good.cert, key=tmp_path / "missing"), "missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            RpcServer("127.0.0.1", 0, [], tls=tls)


def test_a_certificate_can_be_renewed_in_place(certificates: Any, tmp_path: Path) -> None:
    for name in ("ca.pem", "ca.key"):
        (tmp_path / name).write_bytes((certificates.directory / name).read_bytes())
    path = make_certificate(tmp_path, PeerRole.CLIENT, hosts=["h"], days=1)
    first = path.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        make_certificate(tmp_path, PeerRole.CLIENT, hosts=["h"], days=1)
    make_certificate(tmp_path, PeerRole.CLIENT, hosts=["h"], days=1, replace=True)
    assert path.read_bytes() != first


def test_every_service_has_its_roles() -> None:
    files = (inference_pb2.DESCRIPTOR, worker_pb2.DESCRIPTOR, kv_transfer_pb2.DESCRIPTOR)
    assert {name for file in files for name in file.services_by_name} == MAY_CALL.keys()
