"""What every transport must survive: deaths at each edge, silence, slowness, edited frames, restarts, aborts.

Those between GPUs have a real pool on each of two; on other machines they are skipped.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from splitserve.core.errors import KvCorrupted, LeaseExpired, SplitserveError, TransferFailed, Unavailable
from splitserve.kv_transfer.frames import HEADER_BYTES, FrameHeader, FrameKind
from splitserve.kv_transfer.grants import Grant
from splitserve.kv_transfer.sender import KvSender
from splitserve.proto import kv_transfer_pb2

two_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
ON_GPUS = [pytest.param(name, marks=two_gpus) for name in ("cuda_ipc", "nccl")]
TRANSPORTS = ["shared_memory", "grpc", "gloo"]
every_transport = pytest.mark.parametrize("transport", [*TRANSPORTS, *ON_GPUS])
# These wait for time-outs to run out: the others are for `make verify`.
one_transport_in_make_test = pytest.mark.parametrize(
    "transport",
    [*(name if name == "grpc" else pytest.param(name, marks=pytest.mark.verify) for name in TRANSPORTS), *ON_GPUS],
)

NUM_TOKENS = 100
NUM_ABORTS = 50
LEASE_S = {"cuda_ipc": 3.0, "nccl": 3.0}  # others: 0.5; between GPUs the next link alone may take half a second
SEEN_S = 15.0  # far above every time-out used here: a failure that was not seen by then never is


def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of them, on every transport."""
    for kind in ("", "SHARED_", "LANE_", "DEVICE_", "NCCL_"):
        monkeypatch.setattr(f"splitserve.kv_transfer.framing.{kind}FRAME_BYTES", 3000)


async def next_transfer_works(p: Any, request_id: str = "next") -> None:
    """Into the same blocks, through the same sender and receiver."""
    p.target.clear()
    request = p.request(NUM_TOKENS, request_id)
    grant = p.grant(request)
    p.complete(grant, request)
    received = await p.receive(grant, request)
    p.assert_arrived(grant)
    await p.receiver.commit(grant, p.address, received)
    assert p.released.count(request_id) == 1


# -- deaths --


@pytest.mark.chaos
@every_transport
@pytest.mark.parametrize("edge", ["parked", "offer", "half", "all"])
async def test_killed_sender_at_every_edge(pair, sender_process, same_pool, transport: str, edge: str) -> None:
    """Killed while the fetch is parked, before any KV, amid it, and before the commit."""
    async with pair(transport) as p:
        process = sender_process("prefill-boot", transport=transport)
        request = p.request(NUM_TOKENS)
        grant = p.grant(request, address=process.address)
        receiving = asyncio.ensure_future(
            p.receiver.receive(grant, process.address, request.prompt_token_ids, p.target_table)
        )
        if edge != "parked":
            assert await asyncio.to_thread(process.say, f"{edge} {grant.to_proto().SerializeToString().hex()}") == "ok"
        if edge == "all":  # all of it is here and verified: a death now costs nothing
            received = await receiving
            process.kill()
            await p.receiver.commit(grant, process.address, received)
            sent = same_pool.tokens(list(range(24)), 0, NUM_TOKENS)
            came = p.target.tokens(p.target_table, 0, NUM_TOKENS)
            assert all(torch.equal(a, b) for a, b in zip(sent, came, strict=True))
        else:
            process.kill()
            with pytest.raises(TransferFailed):
                async with asyncio.timeout(SEEN_S):
                    await receiving
        await next_transfer_works(p)


@pytest.mark.chaos
@every_transport
@pytest.mark.parametrize("edge", ["granted", "half", "received"])
async def test_killed_receiver_at_every_edge(pair, receiver_process, transport: str, edge: str) -> None:
    """Killed before it fetches, amid the KV, and with all of it but uncommitted."""
    async with pair(transport, sender_options={"lease_s": LEASE_S.get(transport, 0.5)}) as p:
        process = receiver_process(p.address, transport, NUM_TOKENS)
        grant = Grant.from_proto(kv_transfer_pb2.Grant.FromString(bytes.fromhex(process.say("grant"))))
        packing = asyncio.Event()
        loop = asyncio.get_running_loop()

        def block_table(_: str) -> list[int]:
            loop.call_soon_threadsafe(packing.set)
            return p.source_table

        p.sender.offer(grant, range(1, NUM_TOKENS + 1), block_table)
        if edge == "half":
            await asyncio.to_thread(process.say, "open")
            p.sender.kv_written("r1", 0, p.source.geometry.num_layers, 0, NUM_TOKENS // 2)
            async with asyncio.timeout(SEEN_S):
                await packing.wait()
        elif edge == "received":
            p.write_all(grant)
            p.sender.finish("r1", 7, final=False)
            assert await asyncio.to_thread(process.say, "receive") == "ok"
        process.kill()
        async with asyncio.timeout(SEEN_S):
            await p.release_seen.wait()
        assert p.released == ["r1"]
        assert [type(error) for _, error in p.reports] == [TransferFailed if edge == "half" else LeaseExpired]
        await next_transfer_works(p)


@pytest.mark.chaos
@one_transport_in_make_test
async def test_a_frozen_sender_is_given_up(pair, sender_process, transport: str) -> None:
    async with pair(transport, receiver_options={"silence_s": 1.0, "stall_s": 0.5}) as p:
        process = sender_process("prefill-boot", transport=transport)
        request = p.request(NUM_TOKENS)
        grant = p.grant(request, address=process.address)
        receiving = asyncio.ensure_future(
            p.receiver.receive(grant, process.address, request.prompt_token_ids, p.target_table)
        )
        await asyncio.to_thread(process.say, f"half {grant.to_proto().SerializeToString().hex()}")
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(TransferFailed):
            async with asyncio.timeout(SEEN_S):
                await receiving
        await next_transfer_works(p)


@pytest.mark.chaos
@one_transport_in_make_test
async def test_a_frozen_receiver_is_given_up(pair, receiver_process, transport: str) -> None:
    """Its keepalive fails, whatever moves the bytes."""
    async with pair(transport, sender_options={"lease_s": LEASE_S.get(transport, 0.5)}) as p:
        process = receiver_process(p.address, transport, NUM_TOKENS)
        grant = Grant.from_proto(kv_transfer_pb2.Grant.FromString(bytes.fromhex(process.say("grant"))))
        packing = threading.Event()

        def block_table(_: str) -> list[int]:
            packing.set()
            return p.source_table

        p.sender.offer(grant, range(1, NUM_TOKENS + 1), block_table)
        await asyncio.to_thread(process.say, "open")
        p.sender.kv_written("r1", 0, p.source.geometry.num_layers, 0, NUM_TOKENS // 2)
        await asyncio.to_thread(packing.wait)
        os.kill(process.pid, signal.SIGSTOP)
        async with asyncio.timeout(SEEN_S):
            await p.release_seen.wait()
        assert p.released == ["r1"]
        assert len(p.reports) == 1
        await next_transfer_works(p)


@pytest.mark.chaos
@one_transport_in_make_test
async def test_a_sender_that_comes_back_at_its_address_is_another_epoch(
    pair, sender_process, same_pool, transport: str
) -> None:
    async with pair(transport) as p:
        first = sender_process("boot-1", transport=transport)
        request = p.request(NUM_TOKENS)
        tokens = request.prompt_token_ids
        old = p.grant(request, address=first.address, boot_id="boot-1")
        receiving = asyncio.ensure_future(p.receiver.receive(old, first.address, tokens, p.target_table))
        await asyncio.to_thread(first.say, f"half {old.to_proto().SerializeToString().hex()}")
        first.kill()
        with pytest.raises(TransferFailed):
            await receiving
        second = sender_process("boot-2", int(first.address.rpartition(":")[2]), transport)
        assert second.address == first.address
        with pytest.raises(SplitserveError, match="boot-1"):
            await p.receiver.receive(old, first.address, tokens, p.target_table)
        new = p.grant(request, address=first.address, boot_id="boot-2")
        assert new.epoch > old.epoch
        await asyncio.to_thread(second.say, f"all {new.to_proto().SerializeToString().hex()}")
        await p.receiver.receive(new, first.address, tokens, p.target_table)
        sent = same_pool.tokens(list(range(24)), 0, NUM_TOKENS)
        came = p.target.tokens(p.target_table, 0, NUM_TOKENS)
        assert all(torch.equal(a, b) for a, b in zip(sent, came, strict=True))


# -- slowness --


@every_transport
async def test_a_slow_reader_is_waited_for_and_gets_everything(pair, monkeypatch, transport: str) -> None:
    """Its own slowness must not look like the sender's silence."""
    small_frames(monkeypatch)
    limit_s = 1.0 if transport in ("cuda_ipc", "nccl") else 0.2  # a GPU that others use too answers late
    async with pair(transport, receiver_options={"stall_s": limit_s}) as p:
        go_on = threading.Event()
        for _ in range(2):  # both of the threads that unpack
            p.receiver._fetcher._threads.submit(go_on.wait)
        request = p.request(NUM_TOKENS)
        grant = p.grant(request)
        p.complete(grant, request)
        asyncio.get_running_loop().call_later(5 * limit_s, go_on.set)
        await p.receive(grant, request)
        p.assert_arrived(grant)


# -- edited frames --

Write = Callable[[bytes], Awaitable[None]]


class Tampering(KvSender):
    """A sender whose frames are edited on their way out, whatever the transport."""

    how = ""

    async def _send(self, out: Any, stream: object, write: Write, way: Any) -> None:
        frames: list[bytes] = []

        async def edited(frame: bytes) -> None:
            header = FrameHeader.unpack(frame)
            is_kv = header.kind in (FrameKind.DATA, FrameKind.APART)
            frames.append(frame)
            if not is_kv or len(frames) > 2:
                await write(frame)
            elif self.how == "duplicate":
                await write(frame)
                await write(frame)
            elif self.how == "reordered":
                for late in reversed(frames) if len(frames) == 2 else ():
                    await write(late)
            elif self.how == "checksum":
                await write(replace(header, checksum=header.checksum ^ 1).pack() + frame[HEADER_BYTES:])
            elif self.how == "payload" and header.kind is FrameKind.DATA:
                await write(frame[:-1] + bytes([frame[-1] ^ 1]))
            elif self.how == "foreign":
                await write(replace(header, grant_id="ab" * 16).pack() + frame[HEADER_BYTES:])
                await write(replace(header, epoch=header.epoch + 1).pack() + frame[HEADER_BYTES:])
                await write(frame)
            else:
                await write(frame)

        if way.lane is not None and self.how == "payload":
            way = replace(way, lane=FlippingLane(way.lane))
        await super()._send(out, stream, edited, way)


class FlippingLane:
    def __init__(self, lane: Any) -> None:
        self._lane = lane
        self.abort = lane.abort

    def send(self, data: torch.Tensor) -> Any:
        data[len(data) // 2] ^= 1
        if data.is_cuda:
            torch.cuda.synchronize(data.device)
        return self._lane.send(data)


@pytest.mark.usefixtures("impatient_gloo")
@every_transport
@pytest.mark.parametrize("how", ["duplicate", "reordered", "checksum", "payload"])
async def test_edited_frames_never_become_kv(pair, monkeypatch, transport: str, how: str) -> None:
    small_frames(monkeypatch)
    async with pair(transport, sender_type=Tampering) as p:
        p.sender.how = how
        request = p.request(NUM_TOKENS)
        grant = p.grant(request)
        before = p.target.snapshot()
        p.complete(grant, request)
        # A lane's sender does not go on while a header is held back: there, reordering ends in its time-out.
        with pytest.raises(TransferFailed if transport in ("gloo", "nccl") and how == "reordered" else KvCorrupted):
            await p.receive(grant, request)
        others = p.target_table[7:]
        assert torch.equal(p.target.snapshot()[others], before[others])
        p.sender.how = ""
        await next_transfer_works(p)


@every_transport
async def test_foreign_frames_are_counted_and_dropped(pair, monkeypatch, transport: str) -> None:
    small_frames(monkeypatch)
    async with pair(transport, sender_type=Tampering) as p:
        p.sender.how = "foreign"
        request = p.request(NUM_TOKENS)
        grant = p.grant(request)
        p.complete(grant, request)
        await p.receive(grant, request)
        p.assert_arrived(grant)
        assert p.receiver_metrics.stale_messages._value.get() == 4


# -- aborts --


@every_transport
@pytest.mark.parametrize(
    "num_aborts", [NUM_ABORTS, pytest.param(1000, marks=[pytest.mark.verify, pytest.mark.timeout(900)])]
)
async def test_aborts_at_random_moments_lose_nothing(pair, monkeypatch, transport: str, num_aborts: int) -> None:
    """Two transfers at a time share the link; one or both are cancelled, failed or written again at some moment."""
    small_frames(monkeypatch)
    choose = random.Random(1)
    async with pair(transport, sender_options={"lease_s": 5.0, "park_s": 5.0}) as p:
        num_layers = p.source.geometry.num_layers
        arrived = 0

        async def transfer(number: int, table: list[int]) -> bool:
            """Whether KV arrived; raises if it arrived wrong."""
            request = p.request(choose.randint(1, NUM_TOKENS), f"r{number}")
            grant = p.grant(request)
            receiving = asyncio.ensure_future(p.receiver.receive(grant, p.address, request.prompt_token_ids, table))
            offered, done = False, 0
            end = choose.choice(["cancel", "fail", "torn", "none"])
            moment = choose.randint(0, 8)
            for step in range(9):
                if step == moment and end == "cancel":
                    receiving.cancel()
                if step == moment and end == "fail":
                    p.sender.fail(grant.request_id, Unavailable("aborted by the test"))
                if step == moment and end == "torn" and offered:  # preempted and computed once more
                    p.sender.kv_written(grant.request_id, 0, num_layers, 0, grant.num_tokens)
                    done = max(done, num_layers)
                if not offered:
                    p.offer(grant, request)
                    offered = True
                elif done < num_layers:
                    p.sender.kv_written(grant.request_id, done, done + 1, 0, grant.num_tokens)
                    done += 1
                elif done == num_layers:
                    p.sender.finish(grant.request_id, 7, final=False)
                    done += 1
                for _ in range(choose.randint(0, 30)):
                    await asyncio.sleep(0)
            try:
                received = await receiving
            except (SplitserveError, asyncio.CancelledError):
                p.sender.fail(grant.request_id, Unavailable("its receiver gave up"))
                return False
            sent = p.source.tokens(p.source_table, 0, grant.num_tokens)
            came = p.target.tokens(table, 0, grant.num_tokens)
            assert all(torch.equal(a, b) for a, b in zip(sent, came, strict=True)), "a wrong KV cache was accepted"
            await p.receiver.commit(grant, p.address, received)
            return True

        for number in range(0, num_aborts, 2):
            p.target.clear()
            tables = p.target_table[:7], p.target_table[7:14]
            async with asyncio.timeout(60):
                results = await asyncio.gather(transfer(number, tables[0]), transfer(number + 1, tables[1]))
            arrived += sum(results)
            untouched = p.target_table[14:]
            assert not p.target.data[untouched].any()
        assert sorted(p.released) == sorted(f"r{number}" for number in range(num_aborts))
        assert not p.sender._offers._by_grant
        assert not p.sender._parked
        assert 0 < arrived < num_aborts
        await next_transfer_works(p)
