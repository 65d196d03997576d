"""Copies of one transfer overlap, and what is kept of them is whole: nothing behind a frame that failed counts."""

from __future__ import annotations

import asyncio
import gc

import pytest
from splitserve.core.errors import KvCorrupted
from splitserve.kv_transfer.fetching import Transfer


class Due:
    """Copies that end when they are told to."""

    def __init__(self, number: int) -> None:
        self.transfer = Transfer(grant=None, block_ids=[], on_end=lambda: None, incoming=None)  # type: ignore[arg-type]
        self.copies: list[asyncio.Future[int]] = [asyncio.get_running_loop().create_future() for _ in range(number)]
        self.transfer.copying.extend(self.copies)


async def test_the_next_frame_is_taken_while_the_last_copies_run() -> None:
    due = Due(3)
    settling = asyncio.ensure_future(due.transfer.settle(1))
    due.copies[2].set_result(12)  # out of order: its turn comes
    due.copies[0].set_result(10)
    await asyncio.sleep(0)
    assert not settling.done()
    due.copies[1].set_result(11)
    await settling
    assert due.transfer.checksums == [10, 11]
    await due.transfer.settle()
    assert due.transfer.checksums == [10, 11, 12]
    assert due.transfer.num_kept == 3


async def test_what_follows_a_failed_copy_comes_again() -> None:
    due = Due(3)
    due.copies[0].set_result(10)
    due.copies[1].set_exception(KvCorrupted("damaged"))
    with pytest.raises(KvCorrupted):
        await due.transfer.settle()
    quiet = asyncio.ensure_future(due.transfer.quiet())
    await asyncio.sleep(0)
    assert not quiet.done()  # the third still writes to our blocks
    due.copies[2].set_result(12)
    await quiet
    assert due.transfer.checksums == [10]
    assert not due.transfer.copying


async def test_a_cancelled_transfer_leaves_when_its_copies_have_ended() -> None:
    due = Due(2)
    quiet = asyncio.ensure_future(due.transfer.quiet())
    for _ in range(3):
        await asyncio.sleep(0)
        quiet.cancel()
    await asyncio.sleep(0)
    assert not quiet.done()
    due.copies[1].set_result(11)
    due.copies[0].set_result(10)
    with pytest.raises(asyncio.CancelledError):
        await quiet
    assert due.transfer.checksums == [10, 11]


async def test_two_copies_that_fail_leave_no_error_unread(caplog: pytest.LogCaptureFixture) -> None:
    due = Due(2)
    due.copies[0].set_exception(KvCorrupted("the peer went away"))
    due.copies[1].set_exception(KvCorrupted("the peer went away"))
    await due.transfer.quiet()
    assert due.transfer.num_kept == 0
    due.copies.clear()
    gc.collect()
    assert "never retrieved" not in caplog.text
