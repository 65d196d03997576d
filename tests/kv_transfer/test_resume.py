"""A transfer that breaks goes on with what is missing: no byte wrong, nothing prefilled again, little sent twice."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
import torch
from splitserve.core.errors import KvCorrupted, TransferFailed, Unavailable
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.kv_transfer.codec_choice import LinkSpeed
from splitserve.kv_transfer.frames import HEADER_BYTES, SERVICE, FrameHeader, FrameKind
from splitserve.kv_transfer.packing import Packer
from splitserve.kv_transfer.sender import KvSender
from splitserve.proto import kv_transfer_pb2 as pb

two_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
ON_GPUS = [pytest.param(name, marks=two_gpus) for name in ("cuda_ipc", "nccl")]
every_transport = pytest.mark.parametrize("transport", ["shared_memory", "grpc", "gloo", *ON_GPUS])
NUM_TOKENS = 100

Write = Callable[[bytes], Awaitable[None]]


class Proxy:
    """In front of a prefill worker; its connections can be cut.

    Args: jam_after: bytes of the worker's after which the first connection takes nothing more, and is cut once the
        worker's writes have long had to wait.
    """

    def __init__(self, address: str, jam_after: int | None = None) -> None:
        self._target = address.split(":")
        self._jam_after = jam_after
        self._open: set[asyncio.StreamWriter] = set()
        self.address = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = "{}:{}".format(*server.sockets[0].getsockname())
        try:
            yield self
        finally:
            server.close()
            self.cut()

    def cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        self._open |= {writer, back}
        try:
            jam_after, self._jam_after = self._jam_after, None
            await asyncio.gather(self._pipe(reader, back), self._pipe(there, writer, jam_after))
        except OSError:
            pass  # cut
        finally:
            self._open -= {writer, back}
            writer.close()
            back.close()

    async def _pipe(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, jam_after: int | None = None
    ) -> None:
        num_bytes = 0
        while data := await reader.read(1 << 16):
            num_bytes += len(data)
            if jam_after is not None and num_bytes > jam_after:
                await asyncio.sleep(0.3)
                self.cut()
                return
            writer.write(data)
            await writer.drain()
        writer.close()


class Breaking(KvSender):
    """A sender whose first streams break, each before a frame of its own."""

    cut: Callable[[], None]
    breaks: tuple[tuple[int, str], ...] = ()  # by round: frame, and how

    async def _send(self, out: Any, stream: object, write: Write, way: Any) -> None:
        number = len(out.sent)
        at, how = self.breaks[way.round] if way.round < len(self.breaks) else (-1, "")

        async def breaking(frame: bytes) -> None:
            nonlocal number
            header = FrameHeader.unpack(frame)
            if header.kind is FrameKind.WAIT:
                await write(frame)
                return
            if number == at and how == "link":
                self.cut()
                await asyncio.Event().wait()  # until gRPC sees that nobody is there
            if number == at and how == "damage":
                if header.kind is FrameKind.APART:
                    frame = replace(header, checksum=header.checksum ^ 1).pack() + frame[HEADER_BYTES:]
                else:  # KV, or the number of a block
                    frame = frame[:-4] + bytes([frame[-4] ^ 1]) + frame[-3:]
            if number == at and how == "lane" and way.lane is not None:
                way.lane.abort("the test says so")
            number += 1
            await write(frame)

        await super()._send(out, stream, breaking, way)


def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("", "SHARED_", "LANE_", "DEVICE_", "NCCL_"):
        monkeypatch.setattr(f"splitserve.kv_transfer.framing.{kind}FRAME_BYTES", 3000)


def count(counter: Any) -> float:
    return counter._value.get()


async def transfer(p: Any, address: str, request_id: str = "r1") -> Any:
    """Through the proxy, all of it written before; raises what receive() raises."""
    request = p.request(NUM_TOKENS, request_id)
    grant = p.grant(request, address=address)
    p.complete(grant, request)
    received = await p.receiver.receive(grant, address, request.prompt_token_ids, p.target_table)
    p.assert_arrived(grant)
    assert received.num_bytes == p.source.geometry.bytes_per_token * NUM_TOKENS
    await p.receiver.commit(grant, address, received)
    return received


async def test_a_link_that_jams_and_is_cut_leaves_the_kv_to_its_next_stream(pair) -> None:
    """gRPC fails the write that waits for room, and cancels its task after that."""
    layer = LayerGeometry(num_kv_heads=8, key_dim=128, value_dim=128)
    large = KvGeometry(model_id="large", layers=(layer,) * 4, dtype="float32")
    for _ in range(5):
        async with pair("grpc", geometry=large) as p, Proxy(p.address, jam_after=4 << 20).running() as proxy:
            request = p.request(380)
            grant = p.grant(request, address=proxy.address)
            p.complete(grant, request)
            await p.receiver.receive(grant, proxy.address, request.prompt_token_ids, p.target_table)
            p.assert_arrived(grant)
            assert p.reports == []
            assert count(p.receiver_metrics.transfer_resumes) == 1


async def test_a_stream_that_was_replaced_takes_nothing_of_the_newer_one(pair, monkeypatch) -> None:
    small_frames(monkeypatch)
    pack, goes_on = Packer.pack, threading.Event()

    def slow(self: Packer, *args: Any) -> Any:
        goes_on.wait()
        return pack(self, *args)

    monkeypatch.setattr(Packer, "pack", slow)
    async with pair("grpc") as p:
        request = p.request(NUM_TOKENS)
        grant = p.grant(request)
        p.complete(grant, request)
        older = p.fetch(grant)  # its first part is being packed
        reading = asyncio.ensure_future(older.read())
        out = p.sender._offers._by_grant[grant.grant_id]
        async with asyncio.timeout(30):
            while out.stream is None:
                await asyncio.sleep(0.002)
            first = out.stream
            receiving = asyncio.ensure_future(p.receive(grant, request))
            while out.stream is first:
                await asyncio.sleep(0.002)
        goes_on.set()
        await receiving
        p.assert_arrived(grant)
        assert count(p.receiver_metrics.transfer_resumes) == 0
        with pytest.raises(grpc.aio.AioRpcError, match="a newer Fetch"):
            await reading


async def test_a_parked_fetch_outlives_the_older_one_beside_it(pair) -> None:
    async with pair("grpc", sender_options={"park_s": 20.0}) as p:
        request = p.request(NUM_TOKENS)
        grant = p.grant(request)
        older = p.fetch(grant)
        reading = asyncio.ensure_future(older.read())
        parked = p.sender._parked
        async with asyncio.timeout(30):
            while len(parked.get(grant.grant_id, ())) < 1:
                await asyncio.sleep(0.002)
            receiving = asyncio.ensure_future(p.receive(grant, request))
            while len(parked[grant.grant_id]) < 2:
                await asyncio.sleep(0.002)
            older.cancel()
            while len(parked[grant.grant_id]) > 1:
                await asyncio.sleep(0.002)
            p.complete(grant, request)
            await receiving
        p.assert_arrived(grant)
        assert not parked
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_a_parked_fetch_that_is_refused_leaves_a_lease(pair) -> None:
    async with pair("grpc", sender_options={"lease_s": 0.2}) as p:
        request = p.request(NUM_TOKENS)
        grant = p.grant(request)
        reading = asyncio.ensure_future(p.fetch(grant, proof=b"guessed").read())
        async with asyncio.timeout(30):
            while grant.grant_id not in p.sender._parked:
                await asyncio.sleep(0.002)
            p.complete(grant, request)
            with pytest.raises(grpc.aio.AioRpcError):
                await reading
            await p.release_seen.wait()
        assert p.released == ["r1"]


async def test_a_final_first_token_is_told_to_a_stream_that_comes_back(pair, monkeypatch) -> None:
    small_frames(monkeypatch)
    async with pair("shared_memory") as p, Proxy(p.address).running() as proxy:
        request = p.request(NUM_TOKENS)
        grant = p.grant(request, address=proxy.address)

        def block_table(request_id: str) -> list[int]:
            if p.released:
                raise KeyError(request_id)
            return p.source_table

        p.target.clear()
        p.sender.offer(grant, request.prompt_token_ids, block_table)
        p.sender.kv_written(grant.request_id, 0, 4, 0, 64)
        receiving = asyncio.ensure_future(
            p.receiver.receive(grant, proxy.address, request.prompt_token_ids, p.target_table)
        )
        out = p.sender._offers._by_grant[grant.grant_id]
        async with asyncio.timeout(30):
            while not p.target.data.any():  # it will keep a frame
                await asyncio.sleep(0.002)
            proxy.cut()
            while out.stream is not None:
                await asyncio.sleep(0)
            p.sender.finish(grant.request_id, 7, final=True)
            received = await receiving
        assert received.finished
        assert received.first_token_id == 7
        assert p.released == ["r1"]


@every_transport
@pytest.mark.parametrize("how", ["link", "damage", "lane"])
async def test_what_is_missing_is_fetched_anew_the_same_way(pair, monkeypatch, transport: str, how: str) -> None:
    small_frames(monkeypatch)
    async with pair(transport, sender_type=Breaking) as p, Proxy(p.address).running() as proxy:
        p.sender.cut, p.sender.breaks = proxy.cut, ((5, how),)
        received = await transfer(p, proxy.address)
        whole = p.source.geometry.bytes_per_token * NUM_TOKENS
        assert received.transport == transport
        assert p.released == ["r1"]
        assert p.reports == []
        broke = how != "lane" or transport in ("gloo", "nccl")
        assert count(p.sender_metrics.transfer_resumes) == count(p.receiver_metrics.transfer_resumes) == int(broke)
        assert count(p.receiver_metrics.transfer_failures) == 0
        assert count(p.sender_metrics.transfer_bytes) == whole
        assert count(p.sender_metrics.transfer_resent_bytes) < whole


async def test_a_transfer_that_resumed_says_nothing_of_its_links_speed(pair, monkeypatch) -> None:
    """Its last stream took the time of a few frames only."""
    layer = LayerGeometry(num_kv_heads=8, key_dim=128, value_dim=128)
    monkeypatch.setattr("splitserve.kv_transfer.framing.FRAME_BYTES", 200_000)
    large = KvGeometry(model_id="large", layers=(layer,) * 2, dtype="float32")
    async with pair("grpc", sender_type=Breaking, geometry=large) as p:
        p.sender.breaks = ((7, "damage"),)
        await transfer(p, p.address)
        assert count(p.receiver_metrics.transfer_resumes) == 1
        assert p.receiver._speeds[p.address] == LinkSpeed()
        p.sender.breaks = ()
        await transfer(p, p.address, "whole")
        assert p.receiver._speeds[p.address].link_bytes_per_s is not None


@every_transport
async def test_a_lost_end_costs_no_more_than_what_was_not_read(pair, monkeypatch, transport: str) -> None:
    small_frames(monkeypatch)
    async with pair(transport, sender_type=Breaking) as p, Proxy(p.address).running() as proxy:
        await transfer(p, proxy.address, "first")
        request = p.request(NUM_TOKENS, "second")
        grant = p.grant(request, address=proxy.address)
        sent = asyncio.Event()
        offered = p.sender._send

        async def counting(out: Any, stream: object, write: Write, way: Any) -> None:
            async def until_end(frame: bytes) -> None:
                if FrameHeader.unpack(frame).kind is FrameKind.END and way.round == 0:
                    sent.set()
                    proxy.cut()
                    await asyncio.Event().wait()
                await write(frame)

            await offered(out, stream, until_end, way)

        monkeypatch.setattr(p.sender, "_send", counting)
        p.complete(grant, request)
        received = await p.receiver.receive(grant, proxy.address, request.prompt_token_ids, p.target_table)
        p.assert_arrived(grant)
        assert sent.is_set()
        await p.receiver.commit(grant, proxy.address, received)
        assert count(p.sender_metrics.transfer_resent_bytes) < p.source.geometry.bytes_per_token * NUM_TOKENS
        assert p.released == ["first", "second"]


@pytest.mark.parametrize("transport", ["shared_memory", "gloo", *ON_GPUS])
async def test_the_second_time_it_goes_by_grpc_where_it_may(pair, monkeypatch, transport: str) -> None:
    small_frames(monkeypatch)
    for others in (("grpc",), ()):
        async with pair(transport, *others, sender_type=Breaking) as p:
            p.sender.breaks = ((3, "damage"), (6, "damage"))
            received = await transfer(p, p.address)
            assert received.transport == ("grpc" if others else transport)
            assert count(p.sender_metrics.transfer_resent_bytes) < 2 * p.source.geometry.bytes_per_token * NUM_TOKENS


@every_transport
async def test_three_breaks_are_a_failed_transfer_and_free_both_sides(pair, monkeypatch, transport: str) -> None:
    small_frames(monkeypatch)
    async with pair(transport, "grpc", sender_type=Breaking) as p, Proxy(p.address).running() as proxy:
        p.sender.cut, p.sender.breaks = proxy.cut, ((2, "damage"), (4, "link"), (6, "damage"))
        before = p.target.snapshot()
        with pytest.raises(KvCorrupted):
            await transfer(p, proxy.address)
        others = p.target_table[7:]
        assert torch.equal(p.target.snapshot()[others], before[others])
        await p.release_seen.wait()  # at once: the receiver says that it gives up
        assert p.released == ["r1"]
        assert [type(error) for _, error in p.reports] == [TransferFailed]
        assert count(p.receiver_metrics.transfer_failures) == 1
        p.sender.breaks = ()
        await transfer(p, proxy.address, "next")


async def test_kv_of_a_broken_stream_is_freed_when_nobody_comes_back(pair) -> None:
    async with pair(sender_options={"resume_s": 0.05}) as p:
        request = p.request(40)
        grant = p.grant(request)
        fetch = p.fetch(grant)
        p.offer(grant, request)
        p.sender.kv_written("r1", 0, 1, 0, 40)
        await fetch.read()
        fetch.cancel()
        await p.release_seen.wait()
        assert p.released == ["r1"]
        assert "went away" in str(p.reports[0][1])


async def test_what_the_prefill_worker_gave_up_is_not_fetched_anew(pair) -> None:
    async with pair() as p:
        request = p.request(64)
        grant = p.grant(request)
        receiving = asyncio.ensure_future(p.receive(grant, request))
        p.offer(grant, request)
        p.sender.fail("r1", Unavailable("its engine stopped"))
        with pytest.raises(Unavailable, match="its engine stopped"):
            await receiving
        assert count(p.receiver_metrics.transfer_resumes) == 0


async def test_a_claim_to_more_than_was_sent_is_refused(pair) -> None:
    async with pair() as p:
        request = p.request(40)
        grant = p.grant(request)
        p.complete(grant, request)
        method = grpc.aio.insecure_channel(p.address).unary_stream(
            f"/{SERVICE}/Fetch", request_serializer=pb.FetchRequest.SerializeToString
        )
        proof = p.receiver._granter.proof(grant)
        claim = pb.FetchRequest(grant=grant.to_peer(), transport=pb.TRANSPORT_GRPC, proof=proof, round=1, num_kept=3)
        with pytest.raises(grpc.aio.AioRpcError, match="3 frames were kept of 0"):
            await method(claim).read()


async def test_frames_of_another_stream_are_dropped(pair, monkeypatch) -> None:
    class Late(KvSender):
        async def _send(self, out: Any, stream: object, write: Write, way: Any) -> None:
            async def late(frame: bytes) -> None:
                header = FrameHeader.unpack(frame)
                await write(replace(header, round=header.round + 1).pack() + frame[HEADER_BYTES:])
                await write(frame)

            await super()._send(out, stream, late, way)

    small_frames(monkeypatch)
    async with pair(sender_type=Late) as p:
        await transfer(p, p.address)
        assert count(p.receiver_metrics.stale_messages) > 5


@every_transport
@pytest.mark.parametrize("num_breaks", [12, pytest.param(300, marks=[pytest.mark.verify, pytest.mark.timeout(900)])])
async def test_breaks_at_random_moments_lose_nothing(pair, monkeypatch, transport: str, num_breaks: int) -> None:
    """KV is written layer by layer meanwhile; each transfer breaks once or twice, somewhere and somehow."""
    small_frames(monkeypatch)
    choose = random.Random(2)
    async with pair(transport, "grpc", sender_type=Breaking) as p, Proxy(p.address).running() as proxy:
        p.sender.cut = proxy.cut
        for number in range(num_breaks):
            p.target.clear()
            hows = ("link", "damage", "lane")
            breaks = [(choose.randrange(7), choose.choice(hows)) for _ in range(choose.randint(1, 2))]
            p.sender.breaks = tuple(breaks)
            request = p.request(choose.randint(20, NUM_TOKENS), f"r{number}")
            grant = p.grant(request, address=proxy.address)
            receiving = asyncio.ensure_future(
                p.receiver.receive(grant, proxy.address, request.prompt_token_ids, p.target_table)
            )
            p.offer(grant, request)
            for layer in range(p.source.geometry.num_layers):
                for _ in range(choose.randint(0, 20)):
                    await asyncio.sleep(0)
                p.sender.kv_written(grant.request_id, layer, layer + 1, 0, grant.num_tokens)
            p.sender.finish(grant.request_id, 7, final=False)
            received = await receiving
            p.assert_arrived(grant)
            await p.receiver.commit(grant, proxy.address, received)
        assert p.released == [f"r{number}" for number in range(num_breaks)]
        assert p.reports == []
        assert count(p.sender_metrics.transfer_resumes) > num_breaks // 3
        assert count(p.sender_metrics.transfer_resent_bytes) < count(p.sender_metrics.transfer_bytes)
