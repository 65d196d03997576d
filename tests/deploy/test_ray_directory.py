"""What a killed cluster leaves behind is removed; what a living one uses is not."""

import subprocess
import sys
from pathlib import Path

import pytest
from splitserve.core.state import ClusterState, read_state, write_state
from splitserve.deploy import ray_directory as module
from splitserve.deploy.claim import claim_local_cluster, forget_killed_cluster
from splitserve.deploy.ray_directory import ray_directory, remove_abandoned

STATE = ClusterState(router_addresses=("127.0.0.1:1",), namespace="n", pid=1)
HOLDS_AND_WAITS = """
import sys
from pathlib import Path
from splitserve.core.state import ClusterState, write_state
from splitserve.deploy import ray_directory as module
from splitserve.deploy.claim import claim_local_cluster
module._ROOT = Path(sys.argv[1])
with claim_local_cluster(), module.ray_directory() as directory:
    (directory / "session").mkdir()
    write_state(ClusterState(router_addresses=("127.0.0.1:1",), namespace="n", pid=1))
    print(directory, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of /tmp, where other clusters of this machine have theirs."""
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_it_is_there_while_it_is_used_and_gone_afterwards(root: Path) -> None:
    with ray_directory() as directory:
        assert directory.parent == root
        remove_abandoned()
        assert directory.is_dir()
    assert not directory.exists()


def test_a_directory_without_an_owner_is_nobodys_to_remove(root: Path) -> None:
    other = root / "splitserve-ray-other"
    other.mkdir()
    remove_abandoned()
    assert other.is_dir()


def test_what_a_killed_cluster_left_is_removed_and_not_before(root: Path) -> None:
    command = [sys.executable, "-c", HOLDS_AND_WAITS, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        forget_killed_cluster()
        assert directory.is_dir()
        assert read_state() == STATE
        process.kill()
    assert directory.is_dir()
    forget_killed_cluster()
    assert not directory.exists()
    assert read_state() is None
    forget_killed_cluster()  # fine if there is none


def test_a_cluster_of_this_process_is_not_forgotten() -> None:
    with claim_local_cluster():
        write_state(STATE)
        forget_killed_cluster()
        assert read_state() == STATE
    assert read_state() is None
