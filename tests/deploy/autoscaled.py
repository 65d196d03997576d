"""A Ray whose own autoscaler adds and removes nodes of two kinds; the nodes are processes of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

START_S = 60.0
_HOST = "127.0.0.1"
_HEAD = "f" * 51 + "0" * 5  # the id that the provider of fake nodes gives its head
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_OBJECT_STORE_BYTES = 80 << 20
# Keys that `ray up` would fill in, and that this provider has no use for.
_NO_COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
_UNUSED: dict[str, Any] = {
    **{f"{name}_commands": [] for name in _NO_COMMANDS},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    "file_mounts_sync_continuously": False,
}


def _node_type(kind: str) -> dict[str, Any]:
    return {
        "resources": {"CPU": 1, "GPU": 1, "object_store_memory": _OBJECT_STORE_BYTES},
        "labels": {"ray.io/accelerator-type": kind},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }


def _configuration(address: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    head = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}
    return {
        **_UNUSED,
        "cluster_name": "autoscaled",
        "max_workers": 4,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "head_node_id": _HEAD,
            "launch_multiple": True,
            "gcs_address": address,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, **{kind: _node_type(kind) for kind in kinds}},
    }


@contextmanager
def autoscaled_ray(directory: Path, kinds: tuple[str, ...]) -> Iterator[str]:
    """Joined to a head without GPUs; its address. Everything is gone afterwards.

    Args: directory: short, since Ray's socket paths are below it.
    """
    with socket.socket() as free:
        free.bind((_HOST, 0))
        address = f"{_HOST}:{free.getsockname()[1]}"
    file = directory / "autoscaling.json"
    file.write_text(json.dumps(_configuration(address, kinds)))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", _HOST]
    command += ["--port", address.rpartition(":")[2], "--num-cpus", "1", "--num-gpus", "0"]
    command += ["--object-store-memory", str(_OBJECT_STORE_BYTES), "--include-dashboard", "false"]
    command += ["--autoscaling-config", str(file), "--temp-dir", str(directory / "ray")]
    settings = {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    ids = dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), _HEAD)
    with (directory / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env={**os.environ, **settings, **ids}, stdout=log, stderr=log)
        try:
            ray.init(
                address=address,
                namespace="autoscaled",
                log_to_driver=False,
                configure_logging=False,
                _node_ip_address=_HOST,
            )
            yield address
        finally:
            ray.shutdown()
            below = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(START_S)
            for process in psutil.wait_procs(below, timeout=10)[1]:
                process.kill()


def kinds_of_living_nodes() -> list[str]:
    """Of the nodes that the autoscaler added."""
    labels = [node["Labels"].get("ray.io/accelerator-type", "") for node in ray.nodes() if node["Alive"]]
    return sorted(filter(None, labels))
