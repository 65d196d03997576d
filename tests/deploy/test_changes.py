"""What applying another configuration does, in words, and which members go first."""

from __future__ import annotations

from typing import Any

import pytest
from splitserve.core.config import ClusterConfig, load_config
from splitserve.core.errors import ConfigError
from splitserve.deploy.changes import NOTHING_CHANGES, changes, least_useful
from splitserve.deploy.members import Member, Phase
from splitserve.deploy.process import Endpoint


def config(**overrides: Any) -> ClusterConfig:
    return load_config(None, {key.replace("__", "."): value for key, value in overrides.items()})


def test_the_same_configuration_changes_nothing() -> None:
    assert str(changes(config(), config())) == NOTHING_CHANGES


def test_each_change_is_told_with_what_follows_from_it() -> None:
    wanted = config(prefill__replicas=3, decode__env={"A": "b"}, router__max_queued=9, engine__max_running=4)
    assert str(
        changes(config(colocated__replicas=1, prefill__replicas=1, decode__replicas=1), wanted)
    ).splitlines() == [
        "engine.max_running: empty -> 4",
        "router.max_queued: 256 -> 9",
        "prefill.replicas: 1 -> 3",
        "decode.replicas: 1 -> empty",
        "decode.env: {} -> {'A': 'b'}",
        "colocated.replicas: 1 -> empty",
        "starts 2 prefill workers",
        "drains and removes 1 colocated worker",
        "restarts every prefill worker, one after another",
        "restarts every decode worker, one after another",
        "restarts every router, one after another",
    ]


@pytest.mark.parametrize("key", ["model", "ray.namespace", "engine.dtype"])
def test_what_all_must_agree_on_cannot_change(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .* cannot change while the cluster runs: `splitserve down`"):
        changes(config(), load_config(None, {key: "float16"}))


@pytest.mark.parametrize("key", ["ca", "cert", "key"])
def test_certificates_come_and_go_with_the_cluster(key: str) -> None:
    """Their files may be renewed; a process with others would not hear the rest."""
    files = {f"security.{name}": f"/certs/{name}.pem" for name in ("ca", "cert", "key")}
    with pytest.raises(ConfigError, match=r"security\.ca is empty .* cannot change while the cluster runs"):
        changes(config(), load_config(None, files))
    others = {**files, f"security.{key}": "/others.pem"}
    with pytest.raises(ConfigError, match=rf"security\.{key} is /certs/{key}\.pem .* and /others\.pem is wanted"):
        changes(load_config(None, files), load_config(None, others))


def test_those_that_do_not_serve_go_first_then_the_idle_then_the_newest() -> None:
    def member(index: int, phase: Phase = Phase.READY) -> Member:
        endpoint = Endpoint(address=f"h:{index}", metrics_address="", boot_id="", pid=1)
        return Member(name=f"decode-{index}", role="decode", phase=phase, endpoint=endpoint)

    members = [member(0), member(1), member(2), member(3, Phase.STARTING), member(4)]
    gone = least_useful(members, 4, {"h:0": 1, "h:1": 5})
    assert [m.name for m in gone] == ["decode-3", "decode-4", "decode-2", "decode-0"]
