"""Where the local cluster that `splitserve up` started can be found: one small JSON file of the user's."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """One running local cluster."""

    router_addresses: tuple[str, ...]  # host:port of each router's gRPC server
    namespace: str  # Ray namespace that holds the cluster's actors
    pid: int  # process to signal in order to stop it; 0: it runs without one, on a Ray that others run
    metrics_addresses: tuple[str, ...] = ()  # host:port of each process's /metrics
    http_addresses: tuple[str, ...] = ()  # host:port of each router's OpenAI API
    ray_address: str = ""  # host:port of the Ray that holds it
    ray_token: str = ""  # of a Ray of our own; empty: RAY_AUTH_MODE and its files say how
    log_dir: str = ""


def state_path() -> Path:
    """`splitserve/cluster.json` under $XDG_RUNTIME_DIR, or under ~/.cache where there is none."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(runtime) if runtime else Path.home() / ".cache"
    return root / "splitserve" / "cluster.json"


def read_state() -> ClusterState | None:
    """The cluster on file, None if there is none; whether it still runs is not checked.

    Raises: ConfigError: the file is damaged or was written by another version.
    """
    path = state_path()
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        return ClusterState(
            router_addresses=tuple(row["router_addresses"]),
            namespace=str(row["namespace"]),
            pid=int(row["pid"]),
            metrics_addresses=tuple(row.get("metrics_addresses", ())),
            http_addresses=tuple(row.get("http_addresses", ())),
            **{name: str(row.get(name, "")) for name in ("ray_address", "ray_token", "log_dir")},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); remove it and run `splitserve up` again") from error


def write_state(state: ClusterState) -> None:
    """Replace the file in one step, so that a reader never sees half of it.

    Raises: ConfigError: the directory cannot be written.
    """
    path = state_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".cluster-", encoding="utf-8", delete=False) as f:
            json.dump(asdict(state), f)
        Path(f.name).replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error}); set XDG_RUNTIME_DIR to a directory you own") from error


def remove_state() -> None:
    """Forget the cluster; fine if there is none."""
    state_path().unlink(missing_ok=True)
