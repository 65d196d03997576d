"""`security` on its way from the configuration to a process, and servers that others can reach."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from splitserve.core.config import load_config
from splitserve.core.errors import ConfigError
from splitserve.deploy.exposure import check_exposure
from splitserve.deploy.options import router_options, tls_of, worker_options
from splitserve.deploy.roles import role_command
from splitserve.proto.tls import Tls

FILES = {"security.ca": "ca.pem", "security.cert": "certs/{role}.pem", "security.key": "certs/{role}.key"}
FULL = Tls(ca=Path("a"), cert=Path("b"), key=Path("c"))


def test_each_process_gets_the_files_of_its_role() -> None:
    config = load_config(None, FILES)
    here = Path.cwd()
    for role in ("prefill", "decode", "colocated"):
        place = {"host": "127.0.0.1", "port": 0, "metrics_port": 0, "worker_id": "w", "num_threads": 1}
        name = "decode" if role == "colocated" else role
        assert worker_options(config, role, **place).tls == Tls(
            ca=here / "ca.pem", cert=here / f"certs/{name}.pem", key=here / f"certs/{name}.key"
        )
    router = router_options(config, prefill=(), decode=(), metrics_port=0, router_id="r")
    assert router.tls is not None
    assert router.tls.cert == here / "certs/router.pem"
    assert tls_of(load_config(None, {}), "router") is None


def test_started_processes_are_told_where_their_files_are() -> None:
    config = load_config(None, {**FILES, "security.tls_required": True, "security.http_client_cert": False})
    for role in ("router", "prefill", "decode"):
        words = role_command(config, role, name="x", host="127.0.0.1", port=0, num_threads=1)
        assert words[words.index("--cert") + 1] == str(Path.cwd() / "certs/{role}.pem")
        assert "--tls-required" in words
        assert ("--no-http-client-cert" in words) == (role == "router")


def test_half_of_the_files_is_an_error() -> None:
    with pytest.raises(ConfigError, match="ca, cert and key go together; key is not set"):
        load_config(None, {"security.ca": "a", "security.cert": "b"})


def test_gloo_does_not_go_with_tls() -> None:
    config = load_config(None, {**FILES, "transport": "gloo"})
    with pytest.raises(ConfigError, match="gloo does not encrypt"):
        worker_options(config, "decode", host="::1", port=0, metrics_port=0, worker_id="", num_threads=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_nothing(host: str, caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(host, None, required=True)
    assert not caplog.records


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "router.example.org"])
def test_other_addresses_are_warned_about_or_refused(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="splitserve"):
        check_exposure(host, None, required=False)
    assert f"{host} can be reached from other machines" in caplog.text
    with pytest.raises(ConfigError, match="tls_required"):
        check_exposure(host, None, required=True)
    check_exposure(host, FULL, required=True)
