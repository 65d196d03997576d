"""Joining a Ray that is not there fails at once, with the address in the message."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from splitserve.core.errors import ConfigError
from splitserve.core.state import ClusterState, read_state, write_state
from splitserve.deploy.ray_start import joined_ray


def test_a_ray_that_nobody_runs_is_no_wait() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"no Ray answers at {address}: Connection refused"),
            joined_ray(address, "n"),
        ):
            pass


def test_what_is_no_address_is_not_tried() -> None:
    with pytest.raises(ConfigError, match="Ray's address is 'head'; it must be HOST:PORT"), joined_ray("head", "n"):
        pass


def test_a_cluster_whose_ray_is_gone_for_good_can_be_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine was started anew, say: no command would work until somebody finds the file."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        write_state(ClusterState(router_addresses=(), namespace="splitserve", pid=0, ray_address=address))
        for arguments in (["up"], ["down"]):
            code, said = _splitserve(*arguments)
            assert code == 2
            assert f"no Ray answers at {address}" in said
            assert "`splitserve down --force` forgets the cluster" in said
            assert read_state() is not None
        assert _splitserve("down", "--force") == (0, "no cluster is running any more\n")
        assert read_state() is None


def _splitserve(*arguments: str) -> tuple[int, str]:
    """In a process of its own: Ray must not be imported before its environment is prepared."""
    program = "from splitserve.cli.main import main; main()"
    ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    return ran.returncode, ran.stdout + ran.stderr
