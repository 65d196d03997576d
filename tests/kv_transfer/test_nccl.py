"""NCCL between two GPUs: the channel by itself, what it converts, and a whole cluster of processes over it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
from splitserve.core.errors import TransferFailed
from splitserve.kv_transfer.channel import Lane
from splitserve.kv_transfer.codecs import TORCH_DTYPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

DEAD_PEER = """
import sys, torch
from splitserve.kv_transfer.nccl import NcclRendezvous
NcclRendezvous(torch.device("cuda:1")).accept("127.0.0.1", bytes.fromhex(sys.argv[1]))
print("joined", flush=True)
sys.stdin.readline()
"""


def rendezvous(side: int, **options: float):
    from splitserve.kv_transfer.nccl import NcclRendezvous

    return NcclRendezvous(torch.device("cuda", side), **options)


@asynccontextmanager
async def joined(**options: float) -> AsyncIterator[tuple[Lane, Lane]]:
    meeting = rendezvous(0, **options).invite()
    accept = rendezvous(1, **options).accept
    sender = Lane("the sender's lane", meeting.join)
    receiver = Lane("the receiver's lane", lambda: accept("127.0.0.1", meeting.invitation))
    try:
        await asyncio.gather(sender.ready(), receiver.ready())
        yield sender, receiver
    finally:
        for lane in (sender, receiver):
            lane.abort("the test is over")
            await asyncio.to_thread(lane._thread.shutdown, wait=True)


def on(side: int, size: int) -> torch.Tensor:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, device=f"cuda:{side}")
    torch.cuda.synchronize(side)
    return data


async def test_payloads_arrive_by_turn_whatever_order_they_are_asked_for() -> None:
    async with joined(set_up_s=30.0, stall_s=30.0) as (sender, receiver):
        sent = [on(0, size) for size in (1, 100_003, 17, 64 << 20)]
        posted = [sender.send(data) for data in sent]
        came = [on(1, len(data)) for data in sent]

        async def take(turn: int) -> None:
            await (await receiver.recv(turn, came[turn]))

        await asyncio.gather(*(take(turn) for turn in (2, 3, 1, 0)), *(leaving for _, leaving in posted))
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(sent, came, strict=True))


@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_an_abort_wakes_who_waits_and_the_lane_stays_closed(who: str) -> None:
    async with joined(set_up_s=30.0, stall_s=60.0) as (sender, receiver):
        lane = sender if who == "sender" else receiver
        moving = sender.send(on(0, 64 << 20))[1] if who == "sender" else await receiver.recv(0, on(1, 64 << 20))
        lane.abort("the test says so")
        with pytest.raises(TransferFailed):
            await moving
        with pytest.raises(TransferFailed, match="given up"):
            await lane.recv(1, on(1, 8))


async def test_a_silent_peer_is_given_up_within_the_time_of_one_payload() -> None:
    async with joined(set_up_s=30.0, stall_s=0.3) as (_, receiver):
        moving = await receiver.recv(0, on(1, 8))
        with pytest.raises(TransferFailed, match="no progress while receiving"):
            await moving


async def test_a_set_up_that_nobody_joins_ends_at_its_deadline() -> None:
    lane = Lane("the sender's lane", rendezvous(0, set_up_s=0.5).invite().join)
    with pytest.raises(TransferFailed, match="set up"):
        await lane.ready()


async def test_an_invitation_that_is_none_is_refused() -> None:
    lane = Lane("the receiver's lane", lambda: rendezvous(1).accept("127.0.0.1", b"29500"))
    with pytest.raises(TransferFailed, match="5 bytes, not 128"):
        await lane.ready()


def peer_process(invitation: bytes) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DEAD_PEER, invitation.hex()]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def test_a_killed_peer_is_given_up() -> None:
    meeting = rendezvous(0, set_up_s=60.0, stall_s=5.0).invite()
    peer = peer_process(meeting.invitation)
    try:
        lane = Lane("the sender's lane", meeting.join)
        await asyncio.gather(lane.ready(), asyncio.to_thread(peer.stdout.readline))
        _, leaving = lane.send(on(0, 64 << 20))
    finally:
        peer.kill()
        peer.communicate()
    with pytest.raises(TransferFailed):
        await leaving
    lane.abort("the test is over")


async def test_lanes_that_were_given_up_leave_no_memory_behind() -> None:
    async def open_and_give_up() -> None:
        async with joined(set_up_s=30.0, stall_s=30.0) as (_, receiver):
            moving = await receiver.recv(0, on(1, 8))
        with pytest.raises(TransferFailed):
            await moving

    async def grown() -> int:
        """Bytes, on either GPU, by one lane."""
        before = [torch.cuda.mem_get_info(side)[0] for side in (0, 1)]
        await open_and_give_up()
        after = [torch.cuda.mem_get_info(side)[0] for side in (0, 1)]
        return max(b - a for b, a in zip(before, after, strict=True))

    await open_and_give_up()  # what the process loads once
    for _ in range(25):  # other processes take memory of these GPUs too, now and then; what leaks does so every time
        if (num_bytes := await grown()) < 12 << 20:
            return
    raise AssertionError(f"a lane left {num_bytes / 2**20:.0f} MiB behind, each time")


async def test_a_lane_opens_in_its_time_while_others_are_given_up() -> None:
    """What frees a communicator waits for the GPU, and may not hold up the first bytes of the next one."""
    for _ in range(20):
        async with asyncio.timeout(60), joined(set_up_s=30.0, stall_s=60.0) as (sender, receiver):
            moving = await receiver.recv(0, on(1, 64 << 20))  # spins, for nobody sends
            for lane in (sender, receiver):
                lane.abort("the test says so")
            async with joined() as lanes:  # with the limits of a worker
                assert all(lane.error is None for lane in lanes)
            with pytest.raises(TransferFailed):
                await moving


async def test_a_receive_that_spins_holds_up_no_other_stream() -> None:
    streams = [torch.cuda.Stream(1, -1) for _ in range(32)]  # as many as PyTorch has; the first one makes them all,
    torch.cuda.synchronize(1)  # which waits for what runs there
    async with joined(set_up_s=30.0, stall_s=60.0) as (_, receiver):
        moving = await receiver.recv(0, on(1, 64 << 20))
        async with asyncio.timeout(10):
            while receiver._payloads[0].posted is None:
                await asyncio.sleep(0.002)
        ends = [stream.record_event() for stream in streams]
        async with asyncio.timeout(10):
            while not all(end.query() for end in ends):
                await asyncio.sleep(0.002)
        assert not moving.done()


@pytest.mark.parametrize("codec", ["none", "int8", "fp8"])
@pytest.mark.parametrize("sizes", [(16, 32), (32, 16), (16, 16)])
async def test_block_sizes_and_codecs_are_converted_on_the_gpus(pair, tiny, codec: str, sizes: tuple) -> None:
    """The same values as over gRPC, where the host converts them."""
    came = []
    for transport in ("nccl", "grpc"):
        torch.manual_seed(3)
        options = {"source_block_size": sizes[0], "target_block_size": sizes[1], "source_blocks": 40}
        async with pair(transport, source_device="cuda:0", target_device="cuda:1", **options) as p:
            request = p.request(150)
            grant = p.grant(request, num_cached_tokens=32, codec=codec)
            p.complete(grant, request)
            received = await p.receive(grant, request)
            assert received.transport == transport
            if codec == "none":
                p.assert_arrived(grant)
            came.append(p.target.tokens(p.target_table, 32, 150))
    assert all(torch.equal(a, b) for a, b in zip(*came, strict=True))


@pytest.mark.parametrize(("source", "target"), [("float32", "bfloat16"), ("bfloat16", "float32")])
async def test_kv_changes_its_dtype_on_the_gpus(pair, tiny, source: str, target: str) -> None:
    geometry, other = replace(tiny, dtype=source), replace(tiny, dtype=target)
    async with pair("nccl", geometry=geometry, target_geometry=other) as p:
        request = p.request(100)
        grant = p.grant(request)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        assert received.transport == "nccl"
        sent, came = p.source.tokens(p.source_table, 0, 100), p.target.tokens(p.target_table, 0, 100)
        narrow = TORCH_DTYPES[grant.wire_dtype]
        for a, b in zip(sent, came, strict=True):
            assert torch.equal(b, a.to(narrow).to(TORCH_DTYPES[target]))
