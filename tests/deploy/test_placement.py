"""Which nodes fit and are preferred, and what is said of those that do not; pure, without Ray."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.config import Role
from splitserve.deploy.members import Member
from splitserve.deploy.neighbours import preferred_nodes
from splitserve.deploy.placement import explain_node, label_matches
from splitserve.deploy.process import Endpoint
from splitserve.deploy.roles import Needs


def on(node: str, name: str) -> Member:
    role: Role = "prefill" if name.startswith("prefill") else "decode"
    return Member(name=name, role=role, endpoint=Endpoint(address="", metrics_address="", boot_id="", pid=1, node=node))


@pytest.mark.parametrize(
    ("wanted", "value", "matches"),
    [
        ("a", "a", True),
        ("a", None, False),
        ("!a", "a", False),
        ("!a", None, True),
        ("in(a,b)", "b", True),
        ("in(a, b)", "b", True),
        ("!in(a,b)", "b", False),
        ("!in(a,b)", "c", True),
    ],
)
def test_a_label_meets_a_selector_as_ray_sees_it(wanted: str, value: str | None, matches: bool) -> None:
    assert label_matches(wanted, value) is matches


def test_a_node_that_does_not_fit_is_told_by_what_it_lacks() -> None:
    node = {
        "NodeManagerAddress": "10.0.0.7",
        "Resources": {"CPU": 8.0, "GPU": 1.0},
        "Labels": {"ray.io/accelerator-type": "L4"},
    }
    needs = Needs(num_cpus=2, num_gpus=2, labels={"ray.io/accelerator-type": "H200", "zone": "b"}, resources={"nic": 1})
    assert explain_node(node, needs) == (
        "10.0.0.7 has 1 of 2 GPU, 0 of 1 nic, label ray.io/accelerator-type=L4, not H200, no label zone"
    )
    assert explain_node(node, Needs(num_cpus=8)) == "10.0.0.7 has all of it, in use"


def test_packed_pairs_share_nodes() -> None:
    members = [on("a", "prefill-0"), on("b", "prefill-1"), on("a", "decode-0")]
    assert preferred_nodes("decode", members, ["a", "b", "c"], "pack") == ["b"]
    assert preferred_nodes("prefill", members, ["a", "b", "c"], "pack") == []


def test_spread_pools_take_the_nodes_that_hold_fewest() -> None:
    members = [on("a", "prefill-0"), on("b", "decode-0")]
    assert preferred_nodes("prefill", members, ["a", "b", "c"], "spread") == ["b", "c"]
    assert preferred_nodes("colocated", members, ["a", "b", "c"], "spread") == ()


@given(st.lists(st.sampled_from(["prefill", "decode"]), max_size=24), st.integers(1, 6))
def test_whatever_comes_spread_pools_never_differ_by_more_than_one(roles: list[str], num_nodes: int) -> None:
    nodes = [f"n{index}" for index in range(num_nodes)]
    members: list[Member] = []
    for index, role in enumerate(roles):
        chosen = preferred_nodes("prefill" if role == "prefill" else "decode", members, nodes, "spread") or nodes
        members.append(on(chosen[0], f"{role}-{index}"))
    for role in ("prefill", "decode"):
        counts = [sum(m.role == role and m.endpoint.node == n for m in members if m.endpoint) for n in nodes]
        assert max(counts) - min(counts) <= 1
