"""What every transport must do, between a real sender and a real receiver over a real gRPC server."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc.aio
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splitserve.core.errors import (
    Cancelled,
    ConfigError,
    Draining,
    GeometryMismatch,
    LeaseExpired,
    StaleMessage,
    TransferFailed,
    TransferInterrupted,
    Unavailable,
)
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.core.request import Request
from splitserve.kv_transfer import framing, sending
from splitserve.kv_transfer.frames import SERVICE
from splitserve.kv_transfer.grants import Grant, KvSource
from splitserve.kv_transfer.identity import WorkerIdentity, current_host_id
from splitserve.kv_transfer.outgoing import Outgoing
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.ways import Ways
from splitserve.proto.rpc import from_rpc_error

from .conftest import TinyPool

two_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
ON_GPUS = [pytest.param(name, marks=two_gpus) for name in ("cuda_ipc", "nccl")]
both = pytest.mark.parametrize("transport", ["grpc", "shared_memory", "gloo", *ON_GPUS])


BFLOAT16 = KvGeometry(
    model_id="other",
    layers=tuple(LayerGeometry(num_kv_heads=heads, key_dim=6, value_dim=4) for heads in (1, 1, 2, 5)),
    dtype="bfloat16",
)


def count(counter) -> float:
    return counter._value.get()


async def drained(fetch) -> list[bytes]:
    """Every frame that is left of a raw Fetch."""
    frames = []
    while (frame := await fetch.read()) is not grpc.aio.EOF:
        frames.append(frame)
    return frames


@both
async def test_kv_arrives_bit_exact_and_commit_frees_the_sender(pair, transport: str) -> None:
    async with pair(transport) as p:
        request = p.request(100)
        grant = p.grant(request, num_cached_tokens=32)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        p.assert_arrived(grant)
        assert (received.first_token_id, received.finished, received.transport) == (7, False, transport)
        assert received.num_bytes == p.source.geometry.bytes_per_token * 68
        assert p.released == []
        await p.receiver.commit(grant, p.address, received)
        await p.receiver.commit(grant, p.address, received)  # a repeated commit is harmless
        assert p.released == ["r1"]
        assert p.reports == []
        assert count(p.sender_metrics.transfers) == 1
        assert count(p.sender_metrics.transfer_bytes) == received.num_bytes
        assert count(p.receiver_metrics.transfer_bytes) == received.num_bytes


@both
async def test_the_end_is_told_once_when_it_has_come_and_not_with_the_last_kv(pair, transport: str) -> None:
    """A decode step waits for who is told of, so it may not be long."""
    told: list[bool] = []
    async with pair(transport) as p:
        request = p.request(100)
        grant = p.grant(request)
        p.offer(grant, request)
        arriving = asyncio.ensure_future(
            p.receiver.receive(
                grant, p.address, request.prompt_token_ids, p.target_table, on_end=lambda: told.append(arriving.done())
            )
        )
        p.write_all(grant)
        out = p.sender._offers.of_request(grant.request_id)
        async with asyncio.timeout(30):
            while not (out.stream is not None and out.progress.all_taken):
                await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)
        assert told == []
        p.sender.finish(grant.request_id, 7, final=False)
        await arriving
        assert told == [False]


def counting_streams(opened: list[object]) -> type[KvSender]:
    class Watched(KvSender):
        async def _fetch(self, requests, context):
            opened.append(context)
            await super()._fetch(requests, context)

    return Watched


async def test_transfers_and_commits_share_a_stream_and_a_stopping_sender_ends_it(pair) -> None:
    opened: list[object] = []
    async with pair("grpc", sender_type=counting_streams(opened)) as p:
        for number in range(3):
            request = p.request(100, f"r{number}")
            grant = p.grant(request)
            p.complete(grant, request)
            received = await p.receive(grant, request)
            p.assert_arrived(grant)
            await p.receiver.commit(grant, p.address, received)
            assert p.released == [f"r{n}" for n in range(number + 1)]
            assert len(opened) == 1
        request = p.request(100, "r3")
        grant = p.grant(request)
        await p.sender.close()
        with pytest.raises(Draining, match="is stopping"):  # by the stream that stood by, or one opened since
            await p.receive(grant, request)
        assert not p.sender._standing_by


async def test_transfers_at_a_time_have_a_stream_each_and_later_ones_take_those_that_are_left(
    pair,
) -> None:
    opened: list[object] = []
    async with pair("grpc", sender_type=counting_streams(opened)) as p:
        requests = [p.request(100, f"r{number}") for number in range(3)]
        grants = [p.grant(request) for request in requests]
        for request, grant in zip(requests, grants, strict=True):
            p.offer(grant, request)
        fetching = [asyncio.ensure_future(p.receive(g, r)) for g, r in zip(grants, requests, strict=True)]
        while len(opened) < 3:
            await asyncio.sleep(0.01)
        p.sender.fail("r0", TransferFailed("for the test"))
        for grant in grants[1:]:
            p.write_all(grant)
            p.sender.finish(grant.request_id, 7, final=False)
        with pytest.raises(TransferFailed, match="for the test"):
            await fetching[0]
        for grant, receiving in zip(grants[1:], fetching[1:], strict=True):
            await p.receiver.commit(grant, p.address, await receiving)
        assert sorted(p.released) == ["r0", "r1", "r2"]
        for number in (3, 4):
            request = p.request(100, f"r{number}")
            grant = p.grant(request)
            p.complete(grant, request)
            await p.receiver.commit(grant, p.address, await p.receive(grant, request))
            p.assert_arrived(grant)
        assert len(opened) == 3


async def test_a_commit_that_overtakes_the_end_of_its_stream_leaves_no_lease_behind(pair) -> None:
    """With several streams, it may come by another before the sender has seen its last write return."""
    sent: list[Outgoing] = []

    class Overtaken(KvSender):
        async def _send(self, out, *args):
            await super()._send(out, *args)
            self._offers.end(out, None)
            sent.append(out)

    async with pair("grpc", sender_type=Overtaken) as p:
        request = p.request(100)
        grant = p.grant(request)
        p.complete(grant, request)
        await p.receiver.commit(grant, p.address, await p.receive(grant, request))
        assert p.released == ["r1"]
        assert sent[0].lease.cancelled()


async def test_a_refused_commit_is_told_and_spoils_no_transfer(pair, caplog: pytest.LogCaptureFixture) -> None:
    async with pair("grpc") as p:
        request = p.request(100)
        grant = p.grant(request)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        await p.receiver.commit(grant, p.address, replace(received, digest=b"another"))
        assert "the receiver's digest differs from what was sent" in caplog.text
        assert p.released == []
        another = p.request(100, "r2")
        second = p.grant(another)
        p.complete(second, another)
        await p.receiver.commit(second, p.address, await p.receive(second, another))
        await p.receiver.commit(grant, p.address, received)
        assert p.released == ["r2", "r1"]


async def test_a_fetch_that_cannot_be_read_is_a_typed_error_and_one_that_asks_nothing_ends(pair) -> None:
    async with pair("grpc") as p, grpc.aio.insecure_channel(p.address) as channel:
        fetch = channel.stream_stream(f"/{SERVICE}/Fetch")
        garbled = fetch()
        await garbled.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await garbled.read()
        assert isinstance(from_rpc_error(refused.value), TransferInterrupted)  # the receiver asks again
        silent = fetch()
        await silent.done_writing()
        assert await silent.read() is grpc.aio.EOF
        assert await silent.code() is grpc.StatusCode.OK


async def test_kv_that_is_told_of_behind_the_first_token_leaves_at_once(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it may be on a GPU, where one thread waits for the kernels and another for the token."""
    monkeypatch.setattr(sending, "WAIT_INTERVAL_S", 600.0)
    async with pair("grpc") as p:
        request = p.request(100)
        grant = p.grant(request)
        p.offer(grant, request)
        arriving = asyncio.ensure_future(p.receive(grant, request))
        p.sender.finish(grant.request_id, 7, final=False)
        out = p.sender._offers._by_request[grant.request_id]
        async with asyncio.timeout(30):
            while out.stream is None or out.changed.is_set():  # until it waits for the KV
                await asyncio.sleep(0.002)
        p.write_all(grant)
        await arriving
        p.assert_arrived(grant)
        assert count(p.receiver_metrics.transfer_resumes) == 0  # else the receiver had given the stream up


@pytest.mark.parametrize("link", ["another", "ours"])
async def test_a_sender_that_waits_for_room_is_not_silent(pair, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    """Slow receivers may have all bytes that may be in flight: that is not the fault of the next one."""
    monkeypatch.setattr(sending, "WAIT_INTERVAL_S", 0.05)
    async with pair("grpc", receiver_options={"silence_s": 1.0, "stall_s": 1.0}) as p:
        request = p.request(100)
        grant = p.grant(request)
        in_flight = p.sender._sending.in_flight
        taken = (f"{grant.decode_boot_id}/0" if link == "ours" else link), framing.MAX_BYTES
        await in_flight.take(*taken)
        p.complete(grant, request)
        asyncio.get_running_loop().call_later(2.5, in_flight.give, *taken)
        await p.receive(grant, request)
        p.assert_arrived(grant)
        assert count(p.receiver_metrics.transfer_resumes) == 0
        assert in_flight.num_bytes == 0


async def test_parts_as_large_as_may_be_do_not_wait_for_one_another(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part may be half as large again as a frame: room for one that is packed ahead must be room for that."""
    num_tokens, num_receivers = 380, 4
    layer = LayerGeometry(num_kv_heads=8, key_dim=128, value_dim=128)
    large = KvGeometry(model_id="large", layers=(layer,) * 4, dtype="float32")
    frame_bytes = int(num_tokens * large.bytes_per_token / 4 / 1.22)
    monkeypatch.setattr(framing, "FRAME_BYTES", frame_bytes)
    monkeypatch.setattr(framing, "MAX_BYTES", 6 * frame_bytes)
    monkeypatch.setattr(framing, "MAX_LINK_BYTES", 3 * frame_bytes)
    async with pair("grpc", geometry=large) as p, AsyncExitStack() as stack:
        receivers: list[tuple[KvReceiver, Grant, Request]] = []
        for number in range(num_receivers):
            pool = TinyPool(16, 24, large, "cpu")
            stack.callback(pool.close)
            identity = WorkerIdentity(worker_id=f"d{number}", boot_id=f"d{number}", host_id=current_host_id())
            receiver = KvReceiver(pool, identity, transports=("grpc",))
            stack.push_async_callback(receiver.close)
            request, source = p.request(num_tokens, f"r{number}"), KvSource(address=p.address, boot_id="prefill-boot")
            grant = receiver.make_grant(request, source, receiver.choose_wire(source, num_tokens), 0)
            p.complete(grant, request)
            async with receiver._peers.use(p.address, "prefill-boot"):
                receivers.append((receiver, grant, request))
        async with asyncio.timeout(30):
            await asyncio.gather(
                *(
                    receiver.receive(grant, p.address, request.prompt_token_ids, list(range(24)))
                    for receiver, grant, request in receivers
                )
            )


@both
async def test_only_granted_blocks_are_written(pair, transport: str) -> None:
    async with pair(transport) as p:
        before = p.target.snapshot()
        request = p.request(50)
        grant = p.grant(request, num_cached_tokens=16)
        p.complete(grant, request)
        await p.receive(grant, request)
        granted = p.target_table[1:4]
        others = [block for block in range(p.target.num_blocks) if block not in granted]
        assert torch.equal(p.target.snapshot()[others], before[others])
        assert not torch.equal(p.target.snapshot()[granted], before[granted])


schedules = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 200),
        "cached_units": st.integers(0, 3),
        "sender_hit": st.integers(0, 60),
        "chunks": st.lists(st.integers(1, 70), min_size=1, max_size=6),
        "layer_groups": st.lists(st.integers(1, 4), min_size=1, max_size=4),
        "fetch_first": st.booleans(),
    }
)


@both
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=schedules)
def test_any_schedule_of_writes_arrives(pair, transport: str, plan: dict) -> None:
    """Chunks of any size, layers in any groups, prefix hits on either side, reported from another thread."""

    def compute(p, grant) -> None:
        num_layers, start = p.source.geometry.num_layers, min(plan["sender_hit"], grant.num_tokens - 1)
        if start:
            p.sender.kv_written("r1", 0, num_layers, 0, start)
        chunk = 0
        while start < grant.num_tokens:
            end = min(grant.num_tokens, start + plan["chunks"][chunk % len(plan["chunks"])])
            layer = 0
            while layer < num_layers:
                group = plan["layer_groups"][(layer + chunk) % len(plan["layer_groups"])]
                p.sender.kv_written("r1", layer, min(num_layers, layer + group), start, end)
                layer += group
            start, chunk = end, chunk + 1

    async def run() -> None:
        async with pair(transport) as p:
            request = p.request(plan["num_tokens"])
            cached = min(plan["cached_units"], (plan["num_tokens"] - 1) // 16) * 16
            grant = p.grant(request, num_cached_tokens=cached)
            if plan["fetch_first"]:
                receiving = asyncio.ensure_future(p.receive(grant, request))
                p.offer(grant, request)
            else:
                p.offer(grant, request)
                receiving = asyncio.ensure_future(p.receive(grant, request))
            await asyncio.to_thread(compute, p, grant)
            p.sender.finish("r1", 3, final=False)
            received = await receiving
            p.assert_arrived(grant)
            assert received.num_bytes == p.source.geometry.bytes_per_token * (plan["num_tokens"] - cached)

    asyncio.run(run())


@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize(("source", "target"), [(16, 32), (32, 16), (16, 8)])
async def test_other_block_size_travels_over_grpc(pair, source: int, target: int, neighbours: bool) -> None:
    async with pair("shared_memory", "grpc", source_block_size=source, target_block_size=target) as p:
        if neighbours:  # blocks side by side are copied as slices
            p.source_table, p.target_table = list(range(3, 24)), list(range(2, 24))
        request = p.request(150)
        grant = p.grant(request, num_cached_tokens=32)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        assert received.transport == "grpc"
        p.assert_arrived(grant)


async def test_bfloat16_layers_of_many_frames_arrive(pair, monkeypatch) -> None:
    monkeypatch.setattr("splitserve.kv_transfer.framing.FRAME_BYTES", 1000)
    async with pair("grpc", geometry=BFLOAT16) as p:
        request = p.request(133)
        grant = p.grant(request)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        p.assert_arrived(grant)
        assert received.num_bytes == BFLOAT16.bytes_per_token * 133


async def test_unmappable_pool_falls_back_to_grpc(pair) -> None:
    async with pair("shared_memory", "grpc") as p:
        memory, p.source.fd = p.source.fd, os.open(os.devnull, os.O_RDONLY)
        request = p.request(40)
        grant = p.grant(request)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        os.close(memory)
        assert received.transport == "grpc"
        p.assert_arrived(grant)


class WrongWays(Ways):
    def choose(self, request, peer):
        response = super().choose(request, peer)
        response.invitation = b"1"
        return response


class WrongInvitations(KvSender):
    """Nobody listens where it invites to."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._ways.__class__ = WrongWays


@pytest.mark.usefixtures("impatient_gloo")
@pytest.mark.parametrize("others", [(), ("grpc",)])
async def test_a_channel_that_cannot_be_set_up_leaves_its_kv_to_grpc_if_it_may(pair, others: tuple) -> None:
    async with pair("gloo", *others, sender_type=WrongInvitations) as p:
        for request_id in ("first", "second"):
            request = p.request(40, request_id)
            grant = p.grant(request)
            p.complete(grant, request)
            if others:
                received = await p.receive(grant, request)
                assert received.transport == "grpc"
                p.assert_arrived(grant)
            else:
                with pytest.raises(TransferFailed, match="set up"):
                    await p.receive(grant, request)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it could use NCCL")
async def test_what_this_side_cannot_use_is_not_offered_and_alone_is_refused(pair) -> None:
    async with pair("nccl", "grpc", source_device="cpu", target_device="cpu") as p:
        request = p.request(40)
        grant = p.grant(request)
        p.complete(grant, request)
        assert (await p.receive(grant, request)).transport == "grpc"
    with pytest.raises(ConfigError, match="NCCL needs a GPU"):
        async with pair("nccl", source_device="cpu", target_device="cpu"):
            pass


@both
async def test_final_first_token_ends_the_transfer_without_kv(pair, transport: str) -> None:
    async with pair(transport) as p:
        request = p.request(40)
        grant = p.grant(request)
        receiving = asyncio.ensure_future(p.receive(grant, request))
        p.offer(grant, request)
        p.sender.finish("r1", 9, final=True)
        assert p.released == ["r1"]  # nobody needs the KV
        received = await receiving
        assert (received.finished, received.first_token_id, received.num_bytes) == (True, 9, 0)
        await p.receiver.commit(grant, p.address, received)
        assert p.released == ["r1"]


@both
async def test_cancelled_receiver_frees_the_sender(pair, transport: str) -> None:
    async with pair(transport) as p:
        request = p.request(64)
        grant = p.grant(request)
        fetch = p.fetch(grant)
        p.offer(grant, request)
        p.sender.kv_written("r1", 0, 1, 0, 64)
        await fetch.read()  # the stream is up
        receiving = asyncio.ensure_future(p.receive(grant, request))  # the newer one replaces it
        p.sender.kv_written("r1", 1, 2, 0, 64)
        with pytest.raises(grpc.aio.AioRpcError, match="newer Fetch"):
            await drained(fetch)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        quiet = p.target.snapshot()
        await p.release_seen.wait()
        assert p.released == ["r1"]
        assert isinstance(p.reports[0][1], TransferFailed)
        assert torch.equal(p.target.snapshot(), quiet)


@both
async def test_failure_reaches_the_receiver_before_and_after_its_fetch(pair, transport: str) -> None:
    async with pair(transport) as p:
        early, late = p.request(40, "early"), p.request(40, "late")
        grants = p.grant(early), p.grant(late)
        receiving = asyncio.ensure_future(p.receive(grants[0], early))
        for grant, request in zip(grants, (early, late), strict=True):
            p.offer(grant, request)
            p.sender.fail(request.request_id, Cancelled("the user left"))
            p.sender.fail(request.request_id, Cancelled("again"))
        for waiting in (receiving, p.receive(grants[1], late)):
            with pytest.raises(Cancelled, match="the user left"):
                await waiting
        assert p.released == ["early", "late"]
        assert p.reports == []  # the worker knows: it said so


async def test_preemption_while_sending_fails_the_transfer(pair) -> None:
    async with pair("grpc") as p:
        request = p.request(64)
        grant = p.grant(request)
        fetch = p.fetch(grant)
        p.offer(grant, request)
        p.sender.kv_written("r1", 0, 4, 0, 32)
        await fetch.read()
        p.sender.kv_written("r1", 0, 4, 0, 32)  # computed again, maybe in other blocks
        p.sender.kv_written("r1", 0, 4, 32, 64)
        with pytest.raises(grpc.aio.AioRpcError, match="preempted"):
            await drained(fetch)
        assert p.released == ["r1"]
        assert p.reports[0][0] == "r1"


async def test_preemption_before_sending_is_harmless(pair) -> None:
    async with pair("grpc") as p:
        request = p.request(64)
        grant = p.grant(request)
        p.offer(grant, request)
        p.sender.kv_written("r1", 0, 4, 0, 32)
        p.sender.kv_written("r1", 0, 4, 0, 64)
        p.sender.finish("r1", 3, final=False)
        await p.receive(grant, request)
        p.assert_arrived(grant)


async def test_uncommitted_and_unfetched_kv_is_freed_by_lease(pair) -> None:
    async with pair("grpc", sender_options={"lease_s": 0.05}) as p:
        for fetched in (False, True):
            request = p.request(40, f"fetched-{fetched}")
            grant = p.grant(request)
            p.complete(grant, request)
            if fetched:
                received = await p.receive(grant, request)
            p.release_seen.clear()
            await p.release_seen.wait()
            with pytest.raises(LeaseExpired):
                await p.receive(grant, request)
        await p.receiver.commit(grant, p.address, received)  # too late is not an error: what arrived was verified
        assert p.released == ["fetched-False", "fetched-True"]
        assert [type(error) for _, error in p.reports] == [LeaseExpired, LeaseExpired]


async def test_fetch_whose_request_never_comes_is_refused(pair) -> None:
    async with pair("grpc", sender_options={"park_s": 0.05}) as p:
        request = p.request(40)
        with pytest.raises(StaleMessage, match="did not come"):
            await p.receive(p.grant(request), request)
        assert count(p.sender_metrics.stale_messages) == 1


@pytest.mark.parametrize(
    "change", [{"epoch": 2}, {"attempt": 2}, {"prefill_boot_id": "other"}, {"decode_boot_id": "x"}, {"num_tokens": 39}]
)
async def test_a_grant_that_differs_in_any_field_is_stale(pair, change: dict) -> None:
    async with pair("grpc") as p:
        request = p.request(40)
        grant = p.grant(request)
        p.complete(grant, request)
        with pytest.raises(StaleMessage):
            await p.receive(replace(grant, **change), request)
        received = await p.receive(grant, request)
        await p.receiver.commit(replace(grant, **change), p.address, received)  # refused, and logged
        assert p.released == []
        await p.receiver.commit(grant, p.address, received)
        assert p.released == ["r1"]
        if "prefill_boot_id" not in change:  # that one does not even get past our own link
            assert count(p.sender_metrics.stale_messages) == 2


async def test_offers_for_others_are_refused_and_newer_attempts_replace_older(pair) -> None:
    async with pair("grpc") as p:
        request = p.request(40)
        grant = p.grant(request)
        for error, change in (
            (StaleMessage, {"prefill_boot_id": "before the restart"}),
            (GeometryMismatch, {"geometry_digest": "0" * 16}),
            (StaleMessage, {"num_tokens": 41}),
        ):
            with pytest.raises(error):
                p.offer(replace(grant, **change), request)
        p.offer(grant, request)
        with pytest.raises(StaleMessage):
            p.offer(p.grant(request), request)
        newer = p.grant(p.request(40, attempt=2))
        p.complete(newer, request)
        assert p.released == ["r1"]
        with pytest.raises(StaleMessage, match="replaced"):
            await p.receive(grant, request)
        await p.receive(newer, request)
        p.assert_arrived(newer)


async def test_other_geometry_is_refused_at_connect(pair) -> None:
    async with pair("grpc") as p, pair("grpc", geometry=BFLOAT16) as q:
        request = q.request(40)
        grant = q.grant(request)
        with pytest.raises(GeometryMismatch, match="pair workers of one model"):
            await q.receiver.receive(grant, p.address, request.prompt_token_ids, q.target_table)


async def test_failures_raise_the_epoch_of_later_grants(pair) -> None:
    async with pair("grpc", sender_options={"park_s": 0.01}) as p:
        request = p.request(40)
        first = p.grant(request)
        with pytest.raises(StaleMessage):
            await p.receive(first, request)
        assert p.grant(request).epoch == first.epoch + 1
        assert count(p.receiver_metrics.transfer_failures) == 1


async def test_closing_the_sender_ends_its_streams_typed(pair) -> None:
    async with pair("grpc") as p:
        request = p.request(40)
        grant = p.grant(request)
        receiving = asyncio.ensure_future(p.receive(grant, request))
        p.offer(grant, request)
        await p.sender.close()
        with pytest.raises(Unavailable, match="stopping"):
            await receiving
        assert p.released == ["r1"]


@pytest.mark.parametrize("transport", ["grpc", "gloo"])
async def test_bytes_in_flight_are_bounded_over_all_transfers_of_a_link(pair, monkeypatch, transport: str) -> None:
    for name in ("FRAME_BYTES", "LANE_FRAME_BYTES"):
        monkeypatch.setattr(f"splitserve.kv_transfer.framing.{name}", 3000)
    monkeypatch.setattr("splitserve.kv_transfer.framing.MAX_LINK_BYTES", 10_000)
    async with pair(transport) as p:
        seen = []
        pack = p.sender._sending._pack

        def counting(*arguments):
            seen.append(p.sender._sending.in_flight.num_bytes)
            return pack(*arguments)

        monkeypatch.setattr(p.sender._sending, "_pack", counting)
        receiving = []
        for number in range(8):
            request = p.request(100, f"r{number}")
            grant = p.grant(request)
            p.complete(grant, request)
            receiving.append(p.receive(grant, request))
        await asyncio.gather(*receiving)
        assert len(seen) > 8
        assert 3000 < max(seen) <= 10_000
        assert p.sender._sending.in_flight.num_bytes == 0
