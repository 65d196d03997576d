"""The seam that gloo and NCCL share: set-up with a deadline, payloads by turn, abort that wakes both sides."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
import torch
from splitserve.core.errors import KvCorrupted, StaleMessage, TransferFailed
from splitserve.kv_transfer.channel import Lane
from splitserve.kv_transfer.gloo import GlooRendezvous
from splitserve.kv_transfer.lanes import Lanes

DEAD_PEER = """
import sys
from splitserve.kv_transfer.gloo import GlooRendezvous
GlooRendezvous().accept("127.0.0.1", sys.argv[1].encode())
print("joined", flush=True)
sys.stdin.readline()
"""


@asynccontextmanager
async def joined(rendezvous: GlooRendezvous) -> AsyncIterator[tuple[Lane, Lane]]:
    meeting = rendezvous.invite()
    sender = Lane("the sender's lane", meeting.join)
    receiver = Lane("the receiver's lane", lambda: rendezvous.accept("127.0.0.1", meeting.invitation))
    try:
        await asyncio.gather(sender.ready(), receiver.ready())
        yield sender, receiver
    finally:
        sender.abort("the test is over")
        receiver.abort("the test is over")


async def test_payloads_arrive_by_turn_whatever_order_they_are_asked_for() -> None:
    async with joined(GlooRendezvous()) as (sender, receiver):
        sent = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (1, 100_003, 17, 1 << 20)]
        posted = [sender.send(data) for data in sent]
        came = [torch.empty_like(data) for data in sent]

        async def take(turn: int) -> None:
            await (await receiver.recv(turn, came[turn]))

        await asyncio.gather(*(take(turn) for turn in (2, 3, 1, 0)), *(leaving for _, leaving in posted))
        assert [turn for turn, _ in posted] == [0, 1, 2, 3]
        assert all(torch.equal(a, b) for a, b in zip(sent, came, strict=True))
        with pytest.raises(KvCorrupted, match="second time"):
            await receiver.recv(1, came[1])


@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_abort_wakes_both_sides_and_the_lane_stays_closed(who: str) -> None:
    async with joined(GlooRendezvous(stall_s=60.0)) as (sender, receiver):
        moving = await receiver.recv(0, torch.empty(8, dtype=torch.uint8))
        waiting = asyncio.ensure_future(receiver.recv(2, torch.empty(8, dtype=torch.uint8)))
        await asyncio.sleep(0)  # let it begin to wait for its turn
        (sender if who == "sender" else receiver).abort("the test says so")
        with pytest.raises(TransferFailed):
            await moving
        receiver.abort("its payload failed")
        with pytest.raises(TransferFailed, match="given up"):
            await waiting
        with pytest.raises(TransferFailed, match="given up"):
            await receiver.recv(1, torch.empty(8, dtype=torch.uint8))


async def test_an_abort_finds_who_has_its_turn_and_has_not_posted_yet() -> None:
    async with joined(GlooRendezvous(stall_s=60.0)) as (_, receiver):
        waiting = asyncio.ensure_future(receiver.recv(1, torch.empty(8, dtype=torch.uint8)))
        await asyncio.sleep(0)  # let it begin to wait for its turn
        moving = await receiver.recv(0, torch.empty(8, dtype=torch.uint8))  # which is next now
        receiver.abort("another transfer broke")
        for each in (waiting, moving):
            with pytest.raises(TransferFailed):
                await each


class HeldChannel:
    """Payloads stay on their way until they are let go; an abort is heard by whoever waits, as NCCL's is."""

    def __init__(self, look_s: float = 0.001) -> None:
        self.look_s = look_s
        self.on_their_way: set[int] = set()
        self.first_may_end = threading.Event()
        self.aborted = threading.Event()

    def post(self, data: torch.Tensor, *, is_send: bool, is_ahead: bool = False) -> int:
        self.on_their_way.add(data.data_ptr())
        return data.data_ptr()

    def wait(self, posted: int, sleep: Callable[[float], None] = time.sleep) -> None:
        while not self.first_may_end.is_set():
            sleep(self.look_s)
            self.look_s = 0.001
        is_last = len(self.on_their_way) == 1
        self.on_their_way.remove(posted)
        if is_last and self.aborted.is_set():
            raise TransferFailed("aborted")

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        assert not self.on_their_way


async def test_a_payload_posted_ahead_is_the_channels_until_its_abort_is_over() -> None:
    """Otherwise its memory goes to somebody else while bytes still arrive in it."""
    channel = HeldChannel()
    lane = Lane("the receiver's lane", lambda: channel)
    await lane.ready()
    first, second = [await lane.recv(turn, torch.empty(8, dtype=torch.uint8)) for turn in (0, 1)]
    try:
        async with asyncio.timeout(10):
            while len(channel.on_their_way) < 2:
                await asyncio.sleep(0.002)
    finally:
        lane.abort("another transfer broke")
        channel.first_may_end.set()
    await first
    with pytest.raises(TransferFailed, match="aborted"):
        await second
    assert not channel.on_their_way


async def test_a_payload_that_comes_while_another_moves_is_posted_at_once() -> None:
    channel = HeldChannel(look_s=30.0)
    lane = Lane("the receiver's lane", lambda: channel)
    await lane.ready()
    moving = [await lane.recv(0, torch.empty(8, dtype=torch.uint8))]
    try:
        async with asyncio.timeout(10):
            while not channel.on_their_way:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.05)  # it looks for the first one's end by now
            moving.append(await lane.recv(1, torch.empty(8, dtype=torch.uint8)))
            while len(channel.on_their_way) < 2:
                await asyncio.sleep(0.002)
    finally:
        channel.first_may_end.set()
    await asyncio.gather(*moving)
    lane.abort("the test is over")


async def test_abort_wakes_a_sender_whom_nobody_receives_from() -> None:
    async with joined(GlooRendezvous(stall_s=60.0)) as (sender, _):
        _, leaving = sender.send(torch.zeros(64 << 20, dtype=torch.uint8))
        sender.abort("the transfer was cancelled")
        with pytest.raises(TransferFailed):
            await leaving


async def test_a_silent_peer_is_given_up_within_the_time_of_one_payload() -> None:
    async with joined(GlooRendezvous(stall_s=0.2)) as (_, receiver):
        moving = await receiver.recv(0, torch.empty(8, dtype=torch.uint8))
        with pytest.raises(TransferFailed, match="receiving"):
            await moving


async def test_a_set_up_that_nobody_joins_ends_at_its_deadline() -> None:
    rendezvous = GlooRendezvous(set_up_s=0.2, stall_s=0.2)
    lonely = rendezvous.invite()
    lanes = [Lane("the sender's lane", lonely.join), Lane("late", lambda: rendezvous.accept("127.0.0.1", b"1"))]
    for lane in lanes:
        with pytest.raises(TransferFailed, match="set up"):
            await lane.ready()


async def test_lanes_that_were_given_up_leave_no_connection_open() -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def open_and_give_up() -> None:
        async with joined(GlooRendezvous()) as (sender, receiver):
            moving = await receiver.recv(0, torch.empty(8, dtype=torch.uint8))
        with pytest.raises(TransferFailed):
            await moving
        for lane in (sender, receiver):
            await asyncio.to_thread(lane._thread.shutdown, wait=True)

    await open_and_give_up()  # what the process opens once
    before = num_open()
    for _ in range(10):
        await open_and_give_up()
    assert num_open() <= before + 20  # a lane has eight; stores are closed by the collector


def peer_process(invitation: bytes) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DEAD_PEER, invitation.decode()]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def test_a_sender_says_that_nobody_joined_its_lane(caplog: pytest.LogCaptureFixture) -> None:
    lanes = Lanes(GlooRendezvous(set_up_s=0.2))
    assert lanes.invite("boot", 0, 7)
    with pytest.raises(TransferFailed, match="no receiver joined"):
        await lanes.find("boot", 0, 7).ready()
    assert "to rank 0 of boot boot, epoch 7, could not be set up: no receiver joined" in caplog.text
    with pytest.raises(StaleMessage):
        lanes.find("boot", 0, 7)
    lanes.close()


async def test_a_killed_peer_is_seen_at_once() -> None:
    meeting = GlooRendezvous(set_up_s=60.0, stall_s=60.0).invite()
    peer = peer_process(meeting.invitation)
    try:
        lane = Lane("the sender's lane", meeting.join)
        await asyncio.gather(lane.ready(), asyncio.to_thread(peer.stdout.readline))
        _, leaving = lane.send(torch.zeros(64 << 20, dtype=torch.uint8))
    finally:
        peer.kill()
        peer.communicate()
    with pytest.raises(TransferFailed):
        await leaving
    lane.abort("the test is over")


def test_only_who_was_invited_meets() -> None:
    """A stranger at the port, silent or with another token, neither joins nor keeps the invited one out."""
    meeting = GlooRendezvous().invite()
    port, token = meeting.invitation.decode().split()
    address = "127.0.0.1", int(port)
    with ThreadPoolExecutor() as threads, socket.create_connection(address) as stranger:
        stranger.sendall(secrets.token_bytes(len(bytes.fromhex(token))))
        silent = socket.create_connection(address)
        joining = threads.submit(meeting.join)
        ours, theirs = GlooRendezvous().accept("127.0.0.1", meeting.invitation), joining.result(timeout=10)
        got = torch.zeros(3)
        receiving = ours.post(got, is_send=False)
        theirs.wait(theirs.post(torch.arange(3.0), is_send=True))
        ours.wait(receiving)
        assert got.tolist() == [0.0, 1.0, 2.0]
        assert stranger.recv(1) == silent.recv(1) == b""
        silent.close()
        for channel in (ours, theirs):
            channel.abort()
            channel.close()
