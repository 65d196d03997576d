"""`splitserve keys`: a key is shown once, and the file says the rest."""

from __future__ import annotations

from pathlib import Path

from splitserve.cli.main import app
from splitserve.core.api_key import ApiKey, Scope
from splitserve.router.key_file import key_digest, read_keys
from typer.testing import CliRunner


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.stdout, done.stderr


def test_a_new_key_is_printed_once_and_its_digest_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    code, printed, told = run("keys", "new", "alice", "--file", str(path), "--scope", "admin", "--max-concurrent", "8")
    assert code == 0, told
    secret = printed.strip()
    assert read_keys(path) == {
        key_digest(secret): ApiKey(name="alice", scopes=frozenset({Scope.ADMIN}), max_concurrent=8)
    }
    code, printed, _ = run("keys", "--file", str(path))
    assert (code, secret in printed) == (0, False)
    assert "alice" in printed
    assert "admin" in printed


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    for words, message in (
        (("keys", "--file", str(path)), "cannot read the API keys"),
        (("keys", "new", "a b", "--file", str(path)), "keys[0].name"),
        (("keys", "new", "a", "--weight", "0", "--file", str(path)), "keys[0].weight"),
    ):
        code, printed, told = run(*words)
        assert (code, printed) == (2, "")
        assert message in told
    assert not path.exists()
