"""Garbage is looked for when asked to, and not for a handful of objects."""

from __future__ import annotations

import gc
import weakref

import pytest
from splitserve.core.garbage import collect_young


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def by_hand():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_what_was_made_of_late_is_freed() -> None:
    nodes = [Node() for _ in range(200)]
    gone = weakref.ref(nodes[0])
    del nodes
    assert gone() is not None
    collect_young()
    assert gone() is None


def test_a_few_objects_are_not_worth_it() -> None:
    gone = weakref.ref(Node())
    collect_young()
    assert gone() is not None
