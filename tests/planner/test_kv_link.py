"""Links: each side carries what it can, whoever waits for another one."""

import random

import pytest
from splitserve.planner.kv_link import KvLinks


def test_transfers_of_one_side_follow_each_other() -> None:
    links = KvLinks(100.0)
    assert [links.send("p", f"d{n}", 50.0, from_s=0.0, until_s=0.1).finished_s for n in range(3)] == [0.5, 1.0, 1.5]
    assert [links.send(f"q{n}", "d0", 50.0, from_s=0.0, until_s=0.1).finished_s for n in range(2)] == [1.0, 1.5]


def test_kv_is_there_when_it_was_computed_at_the_earliest() -> None:
    links = KvLinks(100.0)
    transit = links.send("p", "d", 50.0, from_s=1.0, until_s=3.0)
    assert (transit.started_s, transit.finished_s) == (1.0, 3.0)


def test_who_waits_for_a_busy_receiver_does_not_hold_up_the_others() -> None:
    links = KvLinks(100.0)
    for n in range(10):
        links.send(f"p{n}", "busy", 100.0, from_s=0.0, until_s=0.0)  # the last one comes at 10 s
    assert links.send("p9", "free", 100.0, from_s=0.0, until_s=0.0).finished_s == pytest.approx(2.0)


@pytest.mark.parametrize("sides", [4, 64])
def test_many_pairs_fill_their_links_however_many_there_are(sides: int) -> None:
    links, rng = KvLinks(1.0), random.Random(0)
    sources = [f"p{n % sides}" for n in range(50 * sides)]
    targets = [f"d{n % sides}" for n in range(50 * sides)]
    rng.shuffle(sources)
    rng.shuffle(targets)
    last = max(links.send(p, d, 1.0, from_s=0.0, until_s=0.0).finished_s for p, d in zip(sources, targets, strict=True))
    assert last <= 51.0  # each side has 50 s of work
    assert max(links.busy_s.values()) == pytest.approx(50.0)
