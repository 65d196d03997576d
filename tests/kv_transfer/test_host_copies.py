"""The compiled copies: what numpy and xxhash would have done, byte for byte, and no sum for bytes that differ."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from splitserve.core.compiled import SWITCH
from splitserve.core.errors import Draining, KvCorrupted, StaleMessage, Unavailable
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.kv_transfer.codecs import WireFormat
from splitserve.kv_transfer.frames import FrameHeader, FrameKind, KvPart
from splitserve.kv_transfer.framing import framing_of
from splitserve.kv_transfer.host_copies import Bytes, HostCopies, host_copies
from splitserve.kv_transfer.layout import PoolBytes
from splitserve.kv_transfer.packing import Way
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.wire import WireBytes
from splitserve.proto import kv_transfer_pb2

# Whole stripes of 64 bytes in every head's token; layers differ in all that may differ.
GEOMETRY = KvGeometry(
    model_id="striped",
    layers=(
        LayerGeometry(num_kv_heads=3, key_dim=16, value_dim=32),
        LayerGeometry(num_kv_heads=4, key_dim=48, value_dim=16),
        LayerGeometry(num_kv_heads=3, key_dim=16, value_dim=16),
    ),
    dtype="float32",
)
NUM_ROWS, ROW_BYTES = 9, 4096 + 64


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=["as the CPU likes it", "without AVX2"])
def copies(request: pytest.FixtureRequest, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostCopies]:
    """Both of the ways in which the C code sums up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    if request.param == "without AVX2" and platform.machine() == "x86_64":
        monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -mno-avx2")
    host_copies.cache_clear()
    found = host_copies()
    assert found is not None, "these tests need a C compiler: install gcc, or deselect them"
    yield found
    host_copies.cache_clear()


@pytest.fixture
def by_numpy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a compiler, from now on."""
    monkeypatch.setenv(SWITCH, "off")
    host_copies.cache_clear()
    yield
    host_copies.cache_clear()


def aligned(size: int) -> Bytes:
    """[size] random bytes that begin at a whole stripe."""
    memory = np.random.default_rng(size).integers(0, 256, size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_rows_are_copied_and_summed_up_as_xxhash_does(copies: HostCopies, num_rows: int) -> None:
    source, target = (aligned(NUM_ROWS * ROW_BYTES).reshape(NUM_ROWS, ROW_BYTES) for _ in range(2))
    choose = random.Random(num_rows)
    widths = [256, 960, 1024, 1088, 2048, 3008, ROW_BYTES - 64]  # around blocks of 1,024 bytes
    for width in [*widths, *(64 * choose.randint(4, ROW_BYTES // 64 - 1) for _ in range(20))]:
        start = 64 * choose.randint(0, (ROW_BYTES - width) // 64)
        span = slice(start, start + width)
        ids, places = (np.array(choose.sample(range(NUM_ROWS), num_rows)) for _ in range(2))
        assert copies.serves_rows(source, num_rows, span)
        expected = target.copy()
        expected[places, span] = source[ids, span]
        sum_there = xxhash.xxh3_64_intdigest(np.ascontiguousarray(source[ids, span]).data)
        assert copies.checksum_rows(source, ids.astype("<u4"), span) == sum_there
        assert copies.copy_rows(target, places, source, ids, span) == sum_there
        assert np.array_equal(target, expected)


def test_rows_that_there_are_not_are_refused(copies: HostCopies) -> None:
    rows = aligned(NUM_ROWS * ROW_BYTES).reshape(NUM_ROWS, ROW_BYTES)
    good, before = np.arange(2), rows.copy()
    for bad in ([0, NUM_ROWS], [-1, 0]):
        with pytest.raises(IndexError, match=f"of {NUM_ROWS}"):
            copies.checksum_rows(rows, np.array(bad), slice(0, 1024))
        with pytest.raises(IndexError):
            copies.copy_rows(rows, np.array(bad), rows, good, slice(0, 1024))
        with pytest.raises(IndexError):
            copies.copy_rows(rows, good, rows, np.array(bad), slice(0, 1024))
    assert np.array_equal(rows, before)


def test_what_is_no_whole_stripe_or_too_short_is_left_to_others(copies: HostCopies) -> None:
    rows = aligned(NUM_ROWS * ROW_BYTES).reshape(NUM_ROWS, ROW_BYTES)
    assert copies.serves_rows(rows, 2, slice(0, 128))
    assert not copies.serves_rows(rows, 1, slice(0, 192))  # XXH3 has another way for these
    assert not copies.serves_rows(rows, 2, slice(0, 1000))
    assert not copies.serves_rows(rows, 2, slice(32, 1056))
    assert not copies.serves_rows(rows[:, 8:], 2, slice(0, 1024))


def parts(choose: random.Random, number: int) -> Iterator[KvPart]:
    for _ in range(number):
        layers, tokens = (sorted(choose.sample(range(most), 2)) for most in (len(GEOMETRY.layers) + 1, 100))
        heads = sorted(choose.sample(range(4), 2))
        yield KvPart(
            layer_start=layers[0],
            layer_end=layers[1],
            head_start=heads[0],
            head_end=heads[1],
            token_start=tokens[0],
            token_end=tokens[1],
        )


@pytest.mark.parametrize("block_size", [4, 16, 32])
def test_parts_are_gathered_and_scattered_as_by_numpy(
    copies: HostCopies, tiny_pool, block_size: int, request: pytest.FixtureRequest
) -> None:
    """Of a rank whose first head is the model's second."""
    first_heads = (0, 1, 0)
    ours, theirs = (tiny_pool(block_size, 100 // block_size + 2, GEOMETRY) for _ in range(2))
    theirs.data.copy_(ours.data)
    compiled = PoolBytes(ours, first_heads)
    request.getfixturevalue("by_numpy")
    plain = PoolBytes(theirs, first_heads)
    choose, num_served = random.Random(block_size), 0
    table = choose.sample(range(ours.num_blocks), ours.num_blocks)
    for part in parts(choose, 60):
        if part.head_start < 1 and part.layer_start <= 1 < part.layer_end:
            continue  # not this rank's
        sizes = compiled.part_bytes(part)
        out, expected = (np.zeros(sizes, dtype=np.uint8) for _ in range(2))
        place = compiled._place(part, table)
        num_served += place is not None
        assert plain._place(part, table) is None
        assert compiled.pack(part, table, out) == plain.pack(part, table, expected)
        assert np.array_equal(out, expected)
        payload = np.frombuffer(random.Random(sizes).randbytes(sizes), dtype=np.uint8)  # read-only, as a frame is
        for side in (compiled, plain):
            side.unpack(part, table, payload, xxhash.xxh3_64_intdigest(payload))
        assert torch.equal(ours.data.view(torch.int32), theirs.data.view(torch.int32))
    assert num_served > 30


@pytest.mark.parametrize("served", [True, False])
def test_a_payload_that_is_not_what_was_sent_is_refused_and_leaves_no_nan(
    copies: HostCopies, tiny_pool, served: bool
) -> None:
    pool = tiny_pool(16, 24, GEOMETRY)
    pool_bytes = PoolBytes(pool)
    wire = WireBytes(pool_bytes, GEOMETRY, WireFormat(codec="none", dtype="float32"))
    part = KvPart(layer_start=0, layer_end=3, head_start=0, head_end=3, token_start=5, token_end=90)
    payload = np.zeros(wire.part_bytes(part), dtype=np.uint8)
    value = wire.pack(part, range(24), payload)
    wire.unpack(part, range(24), payload, value)
    before = pool.data.clone()
    if not served:
        pool_bytes._copies = None
    for at in (0, 63, len(payload) // 2, len(payload) - 64, len(payload) - 1):
        damaged = payload.copy()
        damaged[at] ^= 1
        damaged[at - at % 4 :][:4] ^= np.frombuffer(np.float32("nan").tobytes(), dtype=np.uint8)
        with pytest.raises(KvCorrupted, match="damaged on its way"):
            wire.unpack(part, range(24), damaged, value)
        assert bool(pool.data.isfinite().all())
        wire.unpack(part, range(24), payload, value)
        assert torch.equal(pool.data, before)


def test_a_part_that_is_not_inside_its_rows_is_refused(copies: HostCopies, tiny_pool) -> None:
    pool = tiny_pool(16, 4, GEOMETRY)
    compiled, before = PoolBytes(pool, (2, 2, 2)), pool.data.clone()
    whole = KvPart(layer_start=0, layer_end=1, head_start=2, head_end=5, token_start=0, token_end=64)
    flat = np.zeros(compiled.part_bytes(whole), dtype=np.uint8)
    place = compiled._place(whole, range(4))
    assert place is not None
    end = ROW_BYTES * 64
    for wrong in (
        replace(place, planes=[(-64, 64), *place.planes[1:]]),
        replace(place, planes=[(end, 64), *place.planes[1:]]),
        replace(place, blocks=[0, 1, 4, 2]),
        replace(place, blocks=[0, 1, 2]),
        replace(place, first_token=1),
    ):
        for move in (copies.gather, copies.scatter):
            with pytest.raises(IndexError):
                move(compiled.rows, wrong, flat)
    with pytest.raises(ValueError, match="bytes for a part"):
        copies.scatter(compiled.rows, place, flat[1:])
    assert torch.equal(pool.data, before)


class Damaging(KvSender):
    """Its first frame of KV has a bit flipped on its way, once."""

    is_over = False

    async def _send(self, out: Any, stream: object, write: Any, way: Any) -> None:
        async def damaged(frame: bytes) -> None:
            if FrameHeader.unpack(frame).kind is FrameKind.DATA and not self.is_over:
                self.is_over = True
                frame = frame[:-1] + bytes([frame[-1] ^ 0x40])
            await write(frame)

        if way.lane is not None and not self.is_over:
            self.is_over = True
            way = replace(way, lane=DamagingLane(way.lane))
        await super()._send(out, stream, damaged, way)


class DamagingLane:
    def __init__(self, lane: Any) -> None:
        self._lane = lane
        self.abort = lane.abort

    def send(self, data: torch.Tensor) -> Any:
        data[-1] ^= 0x40
        return self._lane.send(data)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("transport", ["grpc", "gloo"])
async def test_a_damaged_frame_is_sent_again(pair, transport: str) -> None:
    async with pair(transport, geometry=GEOMETRY, sender_type=Damaging) as p:
        request = p.request(150)
        grant = p.grant(request)
        p.complete(grant, request)
        await p.receive(grant, request)
        p.assert_arrived(grant)
        assert p.receiver_metrics.transfer_resumes._value.get() == 1


@pytest.mark.parametrize("how", ["closed", "failed", "replaced"])
async def test_nothing_is_summed_up_for_a_transfer_that_ended_while_its_frame_was_written(pair, how: str) -> None:
    """Nor does it end in an error of ours."""
    async with pair("shared_memory", geometry=GEOMETRY) as p:
        request = p.request(150)
        grant = p.grant(request)
        p.complete(grant, request)
        out = p.sender._offers._by_request[request.request_id]
        way = Way(framing=framing_of(kv_transfer_pb2.TRANSPORT_SHARED_MEMORY))
        stream = out.stream = object()
        summed: list[object] = []
        p.sender._sending._check = lambda *of: summed.append(of)

        async def write(_: bytes) -> None:
            if how == "closed":
                await p.sender.close()
            elif how == "failed":
                p.sender.fail(request.request_id, Unavailable("the test says so"))
            else:
                out.stream = object()

        with pytest.raises({"closed": Draining, "failed": Unavailable, "replaced": StaleMessage}[how]):
            await p.sender._sending.send(out, stream, write, way)
        assert not summed


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("transport", ["shared_memory", "grpc", "gloo"])
@pytest.mark.parametrize("who", ["both", "sender", "receiver"])
async def test_a_side_that_compiles_and_one_that_cannot_agree(
    pair, transport: str, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_size = 16 if transport == "shared_memory" else 32
    async with pair(transport, geometry=GEOMETRY, target_block_size=block_size) as p:
        for side, name in ((p.sender, "sender"), (p.receiver, "receiver")):
            if who not in ("both", name):
                monkeypatch.setattr(side._bytes, "_copies", None)
        request = p.request(150)
        grant = p.grant(request)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        assert received.transport == transport
        p.assert_arrived(grant)
