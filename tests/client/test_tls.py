"""Encrypted connections: the router proves who it is, and asks the client to."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from splitserve.client import Client, ConfigError, RetryPolicy, Tls, Unavailable
from splitserve.proto import inference_pb2 as pb
from splitserve.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")

NO_RETRY = RetryPolicy(max_attempts=1)


class Models(InferenceServicer):
    """Names the key that the caller sent as a model."""

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        sent = dict(context.invocation_metadata())
        return pb.ListModelsResponse(models=[pb.Model(name=sent.get("authorization", "nobody"))])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, signed by itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    made, key = directory / "cert.pem", directory / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*words, "-keyout", key, "-out", made], check=True, capture_output=True)
    return made, key


@pytest.fixture
def address(certificate: tuple[Path, Path]) -> Iterator[str]:
    """A server that wants a client certificate."""
    made, key = (path.read_bytes() for path in certificate)
    server = grpc.server(ThreadPoolExecutor(2))
    add_InferenceServicer_to_server(Models(), server)
    credentials = grpc.ssl_server_credentials([(key, made)], root_certificates=made, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_both_sides_prove_who_they_are(address: str, certificate: tuple[Path, Path]) -> None:
    made, key = certificate
    tls = Tls(root_certificate=made, client_certificate=made, client_key=key)
    with Client(address, tls=tls, api_key="k", retry=NO_RETRY) as client:
        assert client.models()[0].name == "Bearer k"


@pytest.mark.parametrize("known", [False, True], ids=["plain text", "no client certificate"])
def test_a_client_that_does_not_is_refused(address: str, certificate: tuple[Path, Path], known: bool) -> None:
    tls = Tls(root_certificate=certificate[0]) if known else None
    with Client(address, tls=tls, retry=NO_RETRY) as client, pytest.raises(Unavailable):
        client.models()


def test_tls_files_are_checked_at_once(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="go together"):
        Client("127.0.0.1:1", tls=Tls(client_certificate=certificate[0]))
    with pytest.raises(ConfigError, match="cannot read"):
        Client("127.0.0.1:1", tls=Tls(root_certificate=tmp_path / "missing.pem"))
