"""`splitserve certs`: files that work together, keys that nobody else can read."""

from __future__ import annotations

import stat
from pathlib import Path

from splitserve.cli.main import app
from splitserve.core.config import load_config
from splitserve.deploy.certificates import ROLES, read_certificates
from splitserve.deploy.options import tls_of
from splitserve.proto.tls import ServerCertificates
from typer.testing import CliRunner


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.stdout, done.stderr


def test_init_makes_an_authority_and_a_certificate_for_each_role(tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    code, told, error = run("certs", "init", str(directory), "--host", "10.0.0.5", "--host", "gate.example.org")
    assert code == 0, error
    for key in directory.glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    found = {each.path.stem: each for each in read_certificates(directory)}
    assert found.keys() == {"ca", *(role.value for role in ROLES)}
    for role in ROLES:
        worker = ("worker",) if role.value in ("prefill", "decode") else ()
        assert found[role.value].roles == (role.value, *worker)
        assert {"127.0.0.1", "localhost", "10.0.0.5", "gate.example.org"} <= set(found[role.value].hosts)
    # What it prints for a configuration file is one that serves.
    path = tmp_path / "cluster.yaml"
    path.write_text(told[told.index("security:") :])
    tls = tls_of(load_config(path, {}), "decode")
    assert tls is not None
    assert tls.cert == directory / "decode.pem"
    assert ServerCertificates(tls, lambda: None).credentials is not None
    code, told, _ = run("certs", str(directory))
    assert code == 0
    assert "operator" in told


def test_init_replaces_nothing_unless_asked(tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert run("certs", "init", directory, "--renew")[0] == 2  # no authority
    assert run("certs", "init", directory)[0] == 0
    before = (tmp_path / "router.pem").read_bytes()
    code, _, error = run("certs", "init", directory)
    assert (code, "is there already" in error) == (2, True)
    assert (tmp_path / "router.pem").read_bytes() == before
    authority = (tmp_path / "ca.pem").read_bytes()
    assert run("certs", "init", directory, "--renew")[0] == 0
    assert (tmp_path / "router.pem").read_bytes() != before
    assert (tmp_path / "ca.pem").read_bytes() == authority


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    code, _, error = run("certs", str(tmp_path))
    assert (code, "holds no certificate" in error) == (2, True)
    code, _, error = run("certs", "init", str(tmp_path), "--host", "not a host")
    assert (code, "neither an IP address nor a host name" in error) == (2, True)
