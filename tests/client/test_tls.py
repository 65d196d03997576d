"""Encrypted connections: the router proves who it is, and asks the client to."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from splitserve.client import Client, ConfigError, RetryPolicy, Tls, Unavailable
from splitserve.proto import inference_pb2 as pb
from splitserve.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

NO_RETRY = RetryPolicy(max_attempts=1)


class Models(InferenceServicer):
    """Names the key that the caller sent as a model."""

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        sent = dict(context.invocation_metadata())
        return pb.ListModelsResponse(models=[pb.Model(name=sent.get("authorization", "nobody"))])


@pytest.fixture
def address(certificates: Any) -> Iterator[str]:
    """A server that wants a client certificate."""
    tls = certificates.tls("router")
    ca, made, key = (path.read_bytes() for path in (tls.ca, tls.cert, tls.key))
    server = grpc.server(ThreadPoolExecutor(2))
    add_InferenceServicer_to_server(Models(), server)
    credentials = grpc.ssl_server_credentials([(key, made)], root_certificates=ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_both_sides_prove_who_they_are(address: str, certificates: Any) -> None:
    with Client(address, tls=certificates.tls("client"), api_key="k", retry=NO_RETRY) as client:
        assert client.models()[0].name == "Bearer k"


@pytest.mark.parametrize("known", [False, True], ids=["plain text", "no client certificate"])
def test_a_client_that_does_not_is_refused(address: str, certificates: Any, known: bool) -> None:
    tls = Tls(ca=certificates.directory / "ca.pem") if known else None
    with Client(address, tls=tls, retry=NO_RETRY) as client, pytest.raises(Unavailable):
        client.models()


def test_the_environment_s_files_are_taken(address: str, certificates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in (("CA", "ca.pem"), ("CERT", "{role}.pem"), ("KEY", "{role}.key")):
        monkeypatch.setenv(f"SPLITSERVE_TLS_{name}", str(certificates.directory / file))
    with Client(address, api_key="k", retry=NO_RETRY) as client:
        assert client.models()[0].name == "Bearer k"


def test_tls_files_are_checked_at_once(certificates: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="go together"):
        Client("127.0.0.1:1", tls=Tls(cert=certificates.directory / "client.pem"))
    with pytest.raises(ConfigError, match="cannot read"):
        Client("127.0.0.1:1", tls=Tls(ca=tmp_path / "missing.pem"))
