"""Garbage is looked for when asked to: what is new each time, all of it now and then, a handful of objects never."""

from __future__ import annotations

import gc
import weakref

import pytest
from splitserve.core.garbage import Garbage


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def by_hand():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def nodes() -> list[Node]:
    return [Node() for _ in range(200)]


def test_what_was_made_of_late_is_freed() -> None:
    made = nodes()
    gone = weakref.ref(made[0])
    del made
    assert gone() is not None
    Garbage().collect()
    assert gone() is None


def test_what_outlived_a_collection_is_freed_within_some_seconds() -> None:
    now = 0.0
    garbage = Garbage(lambda: now)
    made = nodes()
    gone = weakref.ref(made[0])
    garbage.collect()
    del made
    left = []
    while gone() is not None:
        assert now < 20
        left.append(nodes())
        now += 1.0
        garbage.collect()
    assert now >= 5  # going through everything takes long


def test_a_few_objects_are_not_worth_it() -> None:
    garbage = Garbage()
    gc.collect()
    gone = weakref.ref(Node())
    garbage.collect()
    assert gone() is not None
