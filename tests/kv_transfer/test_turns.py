"""Two kinds of work that do not overlap."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from splitserve.kv_transfer.turns import Turns


@pytest.mark.parametrize("first", ["making", "freeing"])
def test_one_kind_waits_until_the_other_is_done_and_not_for_its_own(first: str) -> None:
    turns = Turns()
    own = getattr(turns, first)
    other = turns.freeing if first == "making" else turns.making
    has_begun = threading.Event()

    def begin() -> None:
        with other(patience_s=60.0):
            has_begun.set()

    with ThreadPoolExecutor() as threads:
        with own(patience_s=60.0), own(patience_s=60.0):
            waiting = threads.submit(begin)
            assert not has_begun.wait(0.05)
        waiting.result(timeout=10)


def test_whoever_runs_out_of_patience_goes_ahead() -> None:
    turns = Turns()
    with turns.making(patience_s=60.0), turns.freeing(patience_s=0.01):
        pass


def test_a_turn_that_failed_is_over() -> None:
    turns = Turns()
    with pytest.raises(OSError, match="full"), turns.making(patience_s=60.0):
        raise OSError("full")
    with turns.freeing(patience_s=60.0):
        pass
