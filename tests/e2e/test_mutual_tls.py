"""A whole cluster under mutual TLS: it serves over every link, and each link refuses who is not meant."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import pytest
from splitserve.cli.main import app
from splitserve.client import AsyncClient, PermissionDenied, RetryPolicy, Tls, Unavailable
from splitserve.core.api_key import ApiKey
from splitserve.proto import inference_pb2, inference_pb2_grpc, kv_transfer_pb2
from splitserve.proto.tls import PeerRole, open_channel
from splitserve.router.key_file import add_key
from typer.testing import CliRunner

from .conftest import StartCluster

NO_RETRY = RetryPolicy(max_attempts=1)
PROMPT = list(range(5, 45))


def https(cluster: Any, tls: Tls | None, ca: Path) -> httpx2.AsyncClient:
    """An HTTP client that trusts the authority."""
    context = ssl.create_default_context(cafile=ca)
    if tls is not None:
        assert tls.cert is not None
        context.load_cert_chain(tls.cert, tls.key)
    return httpx2.AsyncClient(base_url=f"https://{cluster.router.http_address}", verify=context, timeout=30)


def paths_of(tls: Tls) -> tuple[Path | None, ...]:
    return tls.ca, tls.cert, tls.key


def refused(metrics: Any, reason: str) -> float:
    return metrics.links.refused.labels(reason)._value.get()


@pytest.mark.parametrize("transport", ["grpc", "shared_memory"])
async def test_every_link_serves_and_refuses(
    start_cluster: StartCluster,
    certificates: Any,
    strangers: Any,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
) -> None:
    """Client to router over gRPC and HTTP, router to workers, worker to worker, operator to all of them."""
    cluster = await start_cluster(transports=(transport,), tls=certificates.tls, router={"http_port": 0})
    ca = certificates.directory / "ca.pem"
    client_tls = certificates.tls("client")
    stranger = strangers.tls("client", ca=ca)
    async with AsyncClient(cluster.router.address, tls=client_tls, retry=NO_RETRY) as client:
        answer = await client.generate(PROMPT, max_tokens=8)
        assert len(answer.token_ids) == 8
        assert answer.timing.transport == transport
        assert answer.timing.kv_bytes > 0
        with pytest.raises(PermissionDenied, match=r"GetRouterStatus is for the role operator.*proves client"):
            await client.status()
    assert len((await cluster.client.status()).workers) == 2  # an operator may
    assert refused(cluster.router.metrics, "role") == 1
    with monkeypatch.context() as environment:
        for name, path in zip(("CA", "CERT", "KEY"), paths_of(certificates.tls("operator")), strict=True):
            environment.setenv(f"SPLITSERVE_TLS_{name}", str(path))
        examined = await asyncio.to_thread(CliRunner().invoke, app, ["doctor", "--router", cluster.router.address])
    assert examined.exit_code == 0, examined.output
    assert "2 workers, nothing wrong" in examined.output

    for tls in (stranger, Tls(ca=ca), None):
        async with AsyncClient(cluster.router.address, tls=tls, retry=NO_RETRY) as client:
            with pytest.raises(Unavailable):
                await client.models()

    async with https(cluster, client_tls, ca) as http:
        body = {"model": cluster.router.options.model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        made = await http.post("/v1/completions", json=body)
        assert made.json()["usage"]["completion_tokens"] == 4
    for tls in (None, stranger):
        async with https(cluster, tls, ca) as http:
            with pytest.raises(httpx2.TransportError):
                await http.get("/v1/models")
    async with https(cluster, certificates.tls("decode"), ca) as http:
        with pytest.raises(httpx2.TransportError):
            await http.get("/v1/models")
    assert refused(cluster.router.metrics, "role") == 2

    # Who would act as a router with another certificate, on each kind of worker.
    for name, role, session in (
        ("prefill-0", PeerRole.PREFILL, "PrefillWorker/PrefillSession"),
        ("decode-0", PeerRole.DECODE, "DecodeWorker/DecodeSession"),
    ):
        host = cluster.host(name)
        for tls, code in (
            (client_tls, grpc.StatusCode.PERMISSION_DENIED),
            (certificates.tls("prefill"), grpc.StatusCode.PERMISSION_DENIED),
            (stranger, grpc.StatusCode.UNAVAILABLE),
        ):
            async with open_channel(host.rpc.address, tls, role) as channel:
                # Nothing is sent: a message that meets a call already over is reported in place of its status.
                call = channel.stream_stream(f"/splitserve.v1.{session}")()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is code
        assert refused(host.metrics, "role") == 2

    # Who would fetch KV without a decode worker's certificate: refused before any transport is agreed on.
    prefill = cluster.host("prefill-0")
    for role in ("client", "router", "prefill"):
        async with open_channel(prefill.rpc.address, certificates.tls(role), PeerRole.PREFILL) as channel:
            connect = channel.unary_unary(
                "/splitserve.v1.KvTransfer/Connect",
                request_serializer=kv_transfer_pb2.ConnectRequest.SerializeToString,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await connect(kv_transfer_pb2.ConnectRequest(), timeout=20)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert refused(prefill.metrics, "role") == 5

    # The controller's link: the list of workers is an operator's to change.
    async with open_channel(cluster.router.address, certificates.tls("router"), PeerRole.ROUTER) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.RouterAdminStub(channel).SetWorkers(inference_pb2.SetWorkersRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

    probes = f"https://{cluster.metrics_addresses['prefill-0']}"
    async with https(cluster, None, ca) as http:  # who keeps processes alive has no certificate
        assert (await http.get(f"{probes}/healthz")).status_code == 200
        assert (await http.get(f"{probes}/metrics")).status_code == 403
    async with https(cluster, stranger, ca) as http:
        with pytest.raises((httpx2.TransportError, ssl.SSLError)):
            await http.get(f"{probes}/metrics")
    async with https(cluster, client_tls, ca) as http:
        told = await http.get(f"{probes}/metrics")
        assert 'splitserve_refused_total{reason="role"} 5.0' in told.text
    await cluster.idle()


async def test_with_api_keys_http_clients_need_no_certificate(
    start_cluster: StartCluster, certificates: Any, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    secret = add_key(keys, ApiKey(name="browser"))
    cluster = await start_cluster(
        prefill=0, decode=0, colocated=1, tls=certificates.tls, router={"http_port": 0, "api_key_file": keys}
    )
    async with https(cluster, None, certificates.directory / "ca.pem") as http:
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/v1/models", headers={"authorization": f"Bearer {secret}"})).status_code == 200
    async with https(cluster, certificates.tls("prefill"), certificates.directory / "ca.pem") as http:
        with pytest.raises(httpx2.TransportError):  # but the ones that they have must be right
            await http.get("/v1/models")


async def test_a_worker_of_another_role_is_not_taken_for_the_one_asked_for(
    start_cluster: StartCluster, certificates: Any
) -> None:
    """A client's certificate at the decode worker's address: the router does not talk to it."""

    def tls(role: str) -> Tls:
        return certificates.tls("client" if role == "decode" else role)

    cluster = await start_cluster(prefill=0, decode=1, tls=tls)
    link = next(iter(cluster.router.pool.decodes.values()))
    async with asyncio.timeout(30):
        while "Hostname Verification" not in link.reason:
            await asyncio.sleep(0.01)
    assert link.info is None
