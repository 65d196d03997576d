"""The state file of the local cluster: round trip, absence, damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from splitserve.core.errors import ConfigError
from splitserve.core.state import ClusterState, read_state, remove_state, state_path, write_state


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_what_is_written_is_read_back_until_removed() -> None:
    assert read_state() is None
    state = ClusterState(router_addresses=("127.0.0.1:7000",), namespace="a", pid=12, metrics_addresses=("h:1",))
    write_state(state)
    assert read_state() == state
    newer = ClusterState(router_addresses=("127.0.0.1:7001", "127.0.0.1:7002"), namespace="b", pid=13)
    write_state(newer)
    assert read_state() == newer
    assert [path.name for path in state_path().parent.iterdir()] == ["cluster.json"]
    remove_state()
    remove_state()
    assert read_state() is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '"text"', '{"router_addresses": 3}'])
def test_a_damaged_file_is_a_clear_error(content: str) -> None:
    state_path().parent.mkdir(parents=True)
    state_path().write_text(content)
    with pytest.raises(ConfigError, match=r"cluster\.json cannot be read .* `splitserve up`"):
        read_state()


def test_without_a_runtime_directory_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_path() == tmp_path / ".cache" / "splitserve" / "cluster.json"


def test_an_unwritable_directory_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(blocked))
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"):
        write_state(ClusterState(router_addresses=(), namespace="", pid=1))
