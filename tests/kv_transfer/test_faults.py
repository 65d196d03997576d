"""A wrong, late or missing frame never becomes KV: a server that replays edited frames, and one that is killed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from splitserve.core.errors import KvCorrupted, StaleMessage, TransferFailed
from splitserve.kv_transfer import peer
from splitserve.kv_transfer.frames import HEADER_BYTES, SERVICE, VERSION, FrameHeader, checksum
from splitserve.kv_transfer.grants import Grant
from splitserve.kv_transfer.peer import TRANSPORTS
from splitserve.proto import kv_transfer_pb2 as pb
from splitserve.proto.rpc import MAX_MESSAGE_BYTES

Edit = Callable[[list[bytes]], Sequence[bytes]]


@asynccontextmanager
async def replaying(frames: Sequence[bytes], *, hang: bool = False) -> AsyncIterator[str]:
    """A prefill worker that answers every Fetch with these frames."""

    async def connect(request: pb.ConnectRequest, context: object) -> pb.ConnectResponse:
        return pb.ConnectResponse(worker_id="p", boot_id="prefill-boot", transport=pb.TRANSPORT_GRPC)

    async def fetch(request: bytes, context: grpc.aio.ServicerContext) -> None:
        for frame in frames:
            await context.write(frame)
        if hang:
            await asyncio.Event().wait()

    server = grpc.aio.server()
    handlers = {
        "Connect": grpc.unary_unary_rpc_method_handler(
            connect, pb.ConnectRequest.FromString, pb.ConnectResponse.SerializeToString
        ),
        "Fetch": grpc.unary_stream_rpc_method_handler(fetch),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def sealed(frame: bytes, payload: bytes | None = None, **changes: object) -> bytes:
    """A frame with other header fields, or another payload and the checksum that fits it."""
    header = FrameHeader.unpack(frame)
    if payload is None:
        payload = frame[HEADER_BYTES:]
    else:
        changes |= {"payload_bytes": len(payload), "checksum": checksum(payload)}
    return replace(header, **changes).pack() + payload


def flipped(frame: bytes, position: int) -> bytes:
    return frame[:position] + bytes([frame[position] ^ 1]) + frame[position + 1 :]


def with_end(frames: list[bytes], **changes: object) -> list[bytes]:
    """The last frame says something else, with a right checksum."""
    end = pb.TransferEnd.FromString(frames[-1][HEADER_BYTES:])
    for name, value in changes.items():
        setattr(end, name, value)
    return [*frames[:-1], sealed(frames[-1], end.SerializeToString())]


def part_of(frame: bytes, **changes: int) -> bytes:
    return sealed(frame, part=replace(FrameHeader.unpack(frame).part, **changes))


EDITS: dict[str, tuple[type[Exception], Edit]] = {
    "payload bit": (KvCorrupted, lambda f: [flipped(f[0], HEADER_BYTES + 5), *f[1:]]),
    "last payload bit": (KvCorrupted, lambda f: [*f[:-2], flipped(f[-2], len(f[-2]) - 1), f[-1]]),
    "end bit": (KvCorrupted, lambda f: [*f[:-1], flipped(f[-1], HEADER_BYTES + 1)]),
    "digest": (KvCorrupted, lambda f: with_end(f, digest=bytes(16))),
    "bytes announced": (KvCorrupted, lambda f: with_end(f, num_bytes=1)),
    "frames announced": (KvCorrupted, lambda f: with_end(f, num_frames=1)),
    "duplicate": (KvCorrupted, lambda f: [f[0], *f]),
    "duplicate with its own number": (KvCorrupted, lambda f: [f[0], sealed(f[0], sequence=1), *f[1:]]),
    "reordered": (KvCorrupted, lambda f: [f[1], f[0], *f[2:]]),
    "missing": (KvCorrupted, lambda f: [f[0], *f[2:]]),
    "missing, renumbered": (KvCorrupted, lambda f: with_end([*f[:-2], sealed(f[-1], sequence=len(f) - 2)])),
    "truncated": (KvCorrupted, lambda f: [f[0][:-1], *f[1:]]),
    "shorter than a header": (KvCorrupted, lambda f: [b"SSKV", *f]),
    "layers beyond the model": (KvCorrupted, lambda f: [part_of(f[0], layer_end=99), *f[1:]]),
    "other layers": (KvCorrupted, lambda f: [part_of(f[0], layer_start=1, layer_end=2), *f[1:]]),
    "tokens beyond the grant": (KvCorrupted, lambda f: [part_of(f[0], token_end=10**6), *f[1:]]),
    "empty range": (KvCorrupted, lambda f: [part_of(f[0], token_end=0), *f[1:]]),
    "other heads": (KvCorrupted, lambda f: [part_of(f[0], head_end=1), *f[1:]]),
    "other magic": (KvCorrupted, lambda f: [b"KVSS" + f[0][4:], *f[1:]]),
    "version of the future": (KvCorrupted, lambda f: [f[0][:4] + struct.pack("<H", VERSION + 1) + f[0][6:], *f[1:]]),
    "no end": (TransferFailed, lambda f: f[:-1]),
    "nothing": (TransferFailed, lambda f: []),
}


async def genuine(p, request) -> tuple[Grant, list[bytes]]:
    grant = p.grant(request)
    p.complete(grant, request)
    frames = [frame async for frame in p.fetch(grant)]
    assert len(frames) > 3
    return grant, frames


async def test_every_edit_of_the_frames_is_refused(pair, monkeypatch) -> None:
    monkeypatch.setattr("splitserve.kv_transfer.framing.FRAME_BYTES", 3000)
    async with pair() as p:
        request = p.request(40)
        grant, frames = await genuine(p, request)
        async with replaying(frames) as address:
            await p.receiver.receive(grant, address, request.prompt_token_ids, p.target_table)
            p.assert_arrived(grant)
        for name, (error, edit) in EDITS.items():
            async with replaying(edit(frames)) as address:
                with pytest.raises(error) as raised:
                    await p.receiver.receive(grant, address, request.prompt_token_ids, p.target_table)
                assert type(raised.value) is error, name


async def test_kv_of_another_prompt_is_refused(pair) -> None:
    async with pair() as p:
        request = p.request(40)
        grant = p.grant(request)
        p.complete(grant, request)
        others = (*request.prompt_token_ids[:-1], 99)
        with pytest.raises(KvCorrupted, match="another prompt"):
            await p.receiver.receive(grant, p.address, others, p.target_table)


@pytest.mark.parametrize("change", [{"epoch": 9}, {"attempt": 9}, {"grant_id": "ab" * 16}])
async def test_frames_of_other_grants_are_counted_and_dropped(pair, monkeypatch, change: dict) -> None:
    monkeypatch.setattr("splitserve.kv_transfer.framing.FRAME_BYTES", 3000)
    async with pair() as p:
        request = p.request(40)
        grant, frames = await genuine(p, request)
        stale = [sealed(flipped(frame, HEADER_BYTES + 3), **change) for frame in frames]
        mixed = [frame for both in zip(stale, frames, strict=True) for frame in both]
        async with replaying(mixed) as address:
            await p.receiver.receive(grant, address, request.prompt_token_ids, p.target_table)
        p.assert_arrived(grant)
        assert p.receiver_metrics.stale_messages._value.get() == len(frames)


@pytest.mark.parametrize("num_frames", [0, 1])
async def test_a_silent_sender_is_given_up(pair, num_frames: int) -> None:
    async with pair(receiver_options={"silence_s": 0.1, "stall_s": 0.05}) as p:
        request = p.request(40)
        grant = p.grant(request)
        p.complete(grant, request)
        frames = [frame async for frame in p.fetch(grant)][:num_frames]
        async with replaying(frames, hang=True) as address:
            with pytest.raises(TransferFailed, match="said nothing"):
                await p.receiver.receive(grant, address, request.prompt_token_ids, p.target_table)


async def test_nobody_listening_is_a_failed_transfer(pair) -> None:
    async with pair() as p:
        async with replaying([]) as address:
            pass
        request = p.request(40)
        with pytest.raises(TransferFailed, match="cannot be reached"):
            await p.receiver.receive(p.grant(request), address, request.prompt_token_ids, p.target_table)


@asynccontextmanager
async def deaf_to_the_first(address: str, num_deaf: int) -> AsyncIterator[str]:
    """In front of `address`: its first connections are accepted and then hear nothing."""
    num_accepted = 0

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_accepted
        num_accepted += 1
        if num_accepted <= num_deaf:
            await reader.read()
        else:
            back = await asyncio.open_connection(*address.split(":"))
            await asyncio.gather(pipe(reader, back[1]), pipe(back[0], writer))
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname())
    finally:
        server.close()


async def test_a_connection_that_hangs_is_made_anew(pair, monkeypatch) -> None:
    monkeypatch.setattr("splitserve.kv_transfer.peer.CONNECT_TRIES_S", (0.2, 30.0))
    async with pair() as p, deaf_to_the_first(p.address, 1) as address:
        request = p.request(40)
        grant = p.grant(request)
        p.complete(grant, request)
        await p.receiver.receive(grant, address, request.prompt_token_ids, p.target_table)


async def test_a_peer_that_never_answers_is_a_failed_transfer(pair, monkeypatch) -> None:
    monkeypatch.setattr("splitserve.kv_transfer.peer.CONNECT_TRIES_S", (0.05, 0.1))
    async with pair() as p, deaf_to_the_first(p.address, 2) as address:
        request = p.request(40)
        with pytest.raises(TransferFailed, match="did not answer within"):
            await p.receiver.receive(p.grant(request), address, request.prompt_token_ids, p.target_table)


async def test_a_message_that_grpc_itself_refuses_is_a_broken_link_and_worth_another_attempt(pair) -> None:
    """So it is with one whose length was damaged on its way."""
    async with pair() as p, replaying([bytes(MAX_MESSAGE_BYTES + 1)]) as address:
        request = p.request(40)
        with pytest.raises(TransferFailed, match="larger than max") as failed:
            await p.receiver.receive(p.grant(request), address, request.prompt_token_ids, p.target_table)
        assert failed.value.retryable
        assert p.receiver_metrics.transfer_resumes._value.get() == 2


async def test_those_who_wait_for_a_peer_that_never_answers_fail_together(pair, monkeypatch) -> None:
    """One after the other, the last of them would wait for minutes."""
    monkeypatch.setattr("splitserve.kv_transfer.peer.CONNECT_TRIES_S", (0.1, 0.2))
    async with pair() as p, deaf_to_the_first(p.address, 1_000) as address:
        requests = [p.request(40, f"r{number}") for number in range(30)]
        receiving = [
            p.receiver.receive(p.grant(request), address, request.prompt_token_ids, p.target_table)
            for request in requests
        ]
        failed = await asyncio.gather(*receiving, return_exceptions=True)
        assert [type(error) for error in failed if not isinstance(error, TransferFailed)] == []
        assert p.receiver._peers._link_epochs[address] < 10  # tries; each for itself it would be 60


def is_mapped(inode: str) -> bool:
    """Whether this process maps the file, told by its inode."""
    return any(line.split()[4] == inode for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("transport", ["grpc", "shared_memory"])
async def test_killed_sender_fails_the_transfer_and_is_unmapped(pair, sender_process, transport: str) -> None:
    async with pair(transport, "grpc") as p:
        process = sender_process("prefill-boot")
        try:
            request = p.request(100)
            tokens = request.prompt_token_ids
            whole = p.grant(request, address=process.address)
            process.say(f"all {whole.to_proto().SerializeToString().hex()}")
            received = await p.receiver.receive(whole, process.address, tokens, p.target_table)
            assert received.transport == transport
            pool_inode = process.say("inode")
            assert is_mapped(pool_inode) == (transport == "shared_memory")
            half = p.grant(request, address=process.address)
            receiving = asyncio.ensure_future(p.receiver.receive(half, process.address, tokens, p.target_table))
            assert await asyncio.to_thread(process.say, f"half {half.to_proto().SerializeToString().hex()}") == "ok"
        finally:
            process.kill()
        with pytest.raises(TransferFailed):
            await receiving
        with pytest.raises(TransferFailed, match="cannot be reached"):
            await p.receiver.receive(half, process.address, tokens, p.target_table)
        assert not is_mapped(pool_inode)
        # The worker comes back elsewhere, with another boot.
        grant = p.grant(request)
        p.complete(grant, request)
        await p.receive(grant, request)
        p.assert_arrived(grant)


@pytest.mark.parametrize("transport", ["grpc", "shared_memory", "gloo"])
async def test_a_grant_of_another_boot_keeps_the_link(pair, transport: str) -> None:
    async with pair(transport) as p:
        request = p.request(40)
        stale = p.grant(request, boot_id="boot before")
        grant = p.grant(request)
        receiving = asyncio.ensure_future(p.receive(grant, request))
        async with asyncio.timeout(10):
            while (peer := p.receiver._peers._peers.get(p.address)) is None or not peer.users:
                await asyncio.sleep(0.002)
        with pytest.raises(StaleMessage, match="boot before"):
            await p.receiver.receive(stale, p.address, request.prompt_token_ids, p.target_table)
        p.complete(grant, request)
        received = await receiving
        assert received.transport == transport
        p.assert_arrived(grant)
        assert p.receiver._peers._peers[p.address] is peer
        assert p.receiver_metrics.transfer_resumes._value.get() == 0


async def test_a_channel_that_could_not_be_set_up_is_tried_again_beside_transfers_by_grpc(
    pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "REOPEN_S", 0.05)
    async with pair("gloo", "grpc") as p:
        rendezvous = p.receiver._peers._rendezvous[TRANSPORTS["gloo"]]
        accept, failures = rendezvous.accept, iter((True, True))

        def fail_twice(host: str, invitation: bytes) -> Any:
            if next(failures, False):
                raise TransferFailed("it is too busy")
            return accept(host, invitation)

        monkeypatch.setattr(rendezvous, "accept", fail_twice)
        transports: list[str] = []
        async with asyncio.timeout(30):
            while not transports or transports[-1] != "gloo":
                request = p.request(40, f"r{len(transports)}")
                grant = p.grant(request)
                p.complete(grant, request)
                received = await p.receive(grant, request)
                p.assert_arrived(grant)
                await p.receiver.commit(grant, p.address, received)
                transports.append(received.transport)
        assert transports[0] == "grpc"
        assert next(failures, None) is None


async def test_a_link_that_goes_does_not_leave_a_set_up_behind(pair) -> None:
    async with pair("gloo", "grpc") as p:
        rendezvous = p.receiver._peers._rendezvous[TRANSPORTS["gloo"]]

        def fail(host: str, invitation: bytes) -> Any:
            raise TransferFailed("it is too busy")

        rendezvous.accept = fail
        request = p.request(40)
        grant = p.grant(request)
        p.complete(grant, request)
        await p.receive(grant, request)
        reopening = p.receiver._peers._peers[p.address].reopening
        assert not reopening.done()
        await p.receiver.close()
        assert reopening.cancelled()


async def test_a_link_that_goes_takes_the_channel_along_that_its_last_user_set_up(pair, monkeypatch) -> None:
    async with pair("gloo") as p:
        peers = p.receiver._peers
        request = p.request(40, "first")
        grant = p.grant(request)
        p.complete(grant, request)
        await p.receive(grant, request)
        link = peers._peers[p.address]
        link.lane.abort("another transfer broke")
        introduce, answered, goes_on = peers._introduce, asyncio.Event(), asyncio.Event()

        async def slow(*args: Any) -> pb.ConnectResponse:
            response: pb.ConnectResponse = await introduce(*args)
            answered.set()
            await goes_on.wait()
            return response

        monkeypatch.setattr(peers, "_introduce", slow)
        request = p.request(40, "second")
        grant = p.grant(request)
        p.complete(grant, request)
        receiving = asyncio.ensure_future(p.receive(grant, request))
        async with asyncio.timeout(30):
            await answered.wait()
            peers.lost(link)  # as a third transfer saw it
            await asyncio.sleep(0.01)  # the link gives up the channel that it knows of
            goes_on.set()
            await receiving
            await asyncio.wait({link.watch})
        p.assert_arrived(grant)
        assert link.lane.error is not None


@pytest.mark.parametrize("error", [TransferFailed("NCCL found no network"), OSError("too many open files")])
async def test_a_sender_that_can_invite_nobody_to_a_channel_sends_by_grpc_where_it_may(pair, error: Exception) -> None:
    for others in (("grpc",), ()):
        async with pair("gloo", *others) as p:
            lanes, _ = p.sender._ways._channels[TRANSPORTS["gloo"]]

            def fail(error: Exception = error) -> Any:
                raise error

            lanes._rendezvous.invite = fail
            request = p.request(40)
            grant = p.grant(request)
            p.complete(grant, request)
            if others:
                assert (await p.receive(grant, request)).transport == "grpc"
                p.assert_arrived(grant)
            else:
                with pytest.raises(TransferFailed, match=str(error)):
                    await p.receive(grant, request)
