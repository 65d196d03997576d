"""Two sides that differ: block size, number of blocks, KV dtype and a codec between them; real gRPC, real frames."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from splitserve.core.errors import GeometryMismatch, KvCorrupted
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.kv_transfer.codec_choice import LinkSpeed
from splitserve.kv_transfer.codecs import TORCH_DTYPES, PlaneShape, wire_bytes
from splitserve.kv_transfer.gloo import GlooChannel
from splitserve.kv_transfer.grants import Grant, KvSource

NUM_TOKENS = 100


def expected_bytes(geometry: KvGeometry, grant: Grant) -> int:
    tokens = grant.num_tokens - grant.num_cached_tokens
    return wire_bytes(
        grant.wire,
        [
            PlaneShape(is_key=is_key, heads=layer.num_kv_heads, tokens=tokens, dim=dim)
            for layer in geometry.layers
            for is_key, dim in ((True, layer.key_dim), (False, layer.value_dim))
        ],
    )


def planes(p, grant: Grant) -> list[tuple[torch.Tensor, torch.Tensor]]:
    span = (grant.num_cached_tokens, grant.num_tokens)
    return list(zip(p.source.tokens(p.source_table, *span), p.target.tokens(p.target_table, *span), strict=True))


@pytest.mark.parametrize(
    ("source", "target"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
@pytest.mark.parametrize("sizes", [(16, 32), (32, 16)])
async def test_kv_changes_its_dtype_once_and_travels_in_the_narrower_one(pair, tiny, source, target, sizes) -> None:
    geometry, other = replace(tiny, dtype=source), replace(tiny, dtype=target)
    options = {"source_block_size": sizes[0], "target_block_size": sizes[1], "source_blocks": 40}
    async with pair("shared_memory", "grpc", geometry=geometry, target_geometry=other, **options) as p:
        request = p.request(NUM_TOKENS)
        grant = p.grant(request, num_cached_tokens=32)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        assert received.transport == "grpc"  # rows of another dtype are not copied
        assert received.num_bytes == 2 * sum(layer.elements_per_token for layer in tiny.layers) * (NUM_TOKENS - 32)
        for sent, came in planes(p, grant):
            narrow = TORCH_DTYPES[grant.wire_dtype]
            assert torch.equal(came, sent.to(narrow).to(TORCH_DTYPES[target]))


@pytest.mark.parametrize("codec", ["fp8", "int8"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
async def test_a_codec_moves_its_formulas_bytes_and_errs_within_its_bound(
    pair, tiny, monkeypatch, codec, dtypes
) -> None:
    monkeypatch.setattr("splitserve.kv_transfer.framing.FRAME_BYTES", 3000)  # many parts
    geometry, other = (replace(tiny, dtype=dtype) for dtype in dtypes)
    async with pair(geometry=geometry, target_geometry=other, target_block_size=32) as p:
        p.source.data.sub_(0.5)
        request = p.request(NUM_TOKENS)
        grant = p.grant(request, num_cached_tokens=32, codec=codec)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        await p.receiver.commit(grant, p.address, received)
        assert p.released == ["r1"]
        assert received.num_bytes == expected_bytes(tiny, grant)
        for sent, came in planes(p, grant):
            error = (came.float() - sent.float()).abs()
            assert error.max() > 0
            assert error.max() <= 0.5 / (16 if codec == "fp8" else 127)  # of values up to one half


async def test_a_codec_gives_the_same_bits_however_prefill_was_chunked(pair, tiny) -> None:
    came = []
    async with pair() as p:
        for number, ends in enumerate(([100], [33, 70, 100], [1, 15, 17, 99, 100])):
            request = p.request(NUM_TOKENS, f"r{number}")
            grant = p.grant(request, codec="int8")
            p.offer(grant, request)
            for start, end in zip([0, *ends], ends, strict=False):
                p.sender.kv_written(grant.request_id, 0, tiny.num_layers, start, end)
            p.sender.finish(grant.request_id, 7, final=False)
            await p.receive(grant, request)
            came.append(p.target.tokens(p.target_table, 0, NUM_TOKENS))
    for other in came[1:]:
        assert all(torch.equal(a, b) for a, b in zip(came[0], other, strict=True))


async def test_kv_that_a_codec_cannot_carry_fails_the_transfer_on_both_sides(pair) -> None:
    async with pair() as p:
        p.source.data[p.source_table[1], 5] = float("nan")
        request = p.request(NUM_TOKENS)
        grant = p.grant(request, codec="fp8")
        p.complete(grant, request)
        with pytest.raises(KvCorrupted, match="NaN"):
            await p.receive(grant, request)
        assert p.released == ["r1"]
        assert [type(error) for _, error in p.reports] == [KvCorrupted]


async def test_over_shared_memory_kv_moves_as_it_is_whatever_the_codec(pair) -> None:
    async with pair("shared_memory") as p:
        request = p.request(NUM_TOKENS)
        grant = p.grant(request, codec="int8")
        p.complete(grant, request)
        received = await p.receive(grant, request)
        assert received.transport == "shared_memory"
        p.assert_arrived(grant)


async def test_a_grant_for_another_wire_or_rank_is_refused(pair, tiny) -> None:
    geometry = replace(tiny, dtype="bfloat16")
    async with pair(geometry=geometry) as p:
        request = p.request(NUM_TOKENS)
        for wrong, reason in (
            ({"codec": "zip"}, "codec zip"),
            ({"wire_dtype": "float32"}, "KV in float32; this worker has bfloat16"),
            ({"prefill_ranks": 2}, "rank 0 of 2, this is rank 0 of 1"),
            ({"decode_ranks": 4}, "which 4 ranks can neither divide nor share"),
        ):
            with pytest.raises(GeometryMismatch, match=reason):
                p.offer(replace(p.grant(request), **wrong), request)


async def test_a_pair_of_other_layers_is_refused_with_the_difference(pair, tiny) -> None:
    other = replace(tiny, layers=(replace(tiny.layers[0], value_dim=9), *tiny.layers[1:]))
    async with pair(target_geometry=other) as p:
        request = p.request(NUM_TOKENS)
        with pytest.raises(GeometryMismatch, match="layer 0 has value_dim 4 on the prefill worker and 9"):
            await p.receive(p.grant(request), request)


async def test_codec_auto_goes_by_what_a_links_transfers_have_shown(pair) -> None:
    async with pair(receiver_options={"codec": "auto"}) as p:
        request = p.request(NUM_TOKENS)
        source = KvSource(address=p.address, boot_id="prefill-boot")
        assert p.receiver.choose_wire(source, NUM_TOKENS).codec == "none"  # nothing is known yet
        grant = p.receiver.make_grant(request, source, p.receiver.choose_wire(source, NUM_TOKENS), 0)
        p.complete(grant, request)
        await p.receive(grant, request)
        speed = p.receiver._speeds[p.address]
        assert speed.prefill_tokens_per_s is not None  # the sender told, with END
        for bytes_per_s, codec in ((1e5, "int8"), (1e12, "none")):
            p.receiver._speeds[p.address] = replace(speed, link_bytes_per_s=bytes_per_s, prefill_tokens_per_s=1e9)
            assert p.receiver.choose_wire(source, NUM_TOKENS).codec == codec


async def test_what_goes_coded_measures_its_link_as_it_would_uncoded(pair, tiny) -> None:
    layer = LayerGeometry(num_kv_heads=8, key_dim=128, value_dim=128)  # 1.6 MB of a prompt in float32, 0.4 MB in int8
    async with pair(geometry=replace(tiny, layers=(layer, layer)), receiver_options={"codec": "auto"}) as p:
        stalled = LinkSpeed(link_bytes_per_s=1e4)
        p.receiver._speeds[p.address] = stalled
        request = p.request(NUM_TOKENS)
        source = KvSource(address=p.address, boot_id="prefill-boot")
        grant = p.receiver.make_grant(request, source, p.receiver.choose_wire(source, NUM_TOKENS), 0)
        assert grant.codec == "int8"
        p.complete(grant, request)
        received = await p.receive(grant, request)
        assert received.num_bytes < 1 << 20
        assert p.receiver._speeds[p.address].link_bytes_per_s > stalled.link_bytes_per_s


async def test_a_channels_speed_is_that_of_its_payloads_and_not_of_their_headers(pair, tiny, monkeypatch) -> None:
    moved, slow_s = GlooChannel.wait, 0.1

    def slow(self: GlooChannel, posted: Any, sleep: Callable[[float], None] = time.sleep) -> None:
        time.sleep(slow_s)
        moved(self, posted, sleep)

    monkeypatch.setattr(GlooChannel, "wait", slow)
    monkeypatch.setattr("splitserve.kv_transfer.framing.LANE_FRAME_BYTES", 400_000)
    layer = LayerGeometry(num_kv_heads=8, key_dim=128, value_dim=128)
    async with pair("gloo", geometry=replace(tiny, layers=(layer, layer))) as p:
        request = p.request(NUM_TOKENS)
        grant = p.grant(request)
        p.complete(grant, request)
        began_s = time.monotonic()
        received = await p.receive(grant, request)
        p.assert_arrived(grant)
        assert 4 * slow_s <= received.write_s <= time.monotonic() - began_s
        assert p.receiver._speeds[p.address].link_bytes_per_s <= received.num_bytes / (4 * slow_s)
