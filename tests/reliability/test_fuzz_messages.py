"""Random bytes as messages and as KV frames: what reads them returns, or raises a typed error."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from splitserve.client import results
from splitserve.core.errors import KvCorrupted, SplitserveError
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.kv_transfer.codecs import WireFormat
from splitserve.kv_transfer.frames import HEADER_BYTES, FrameHeader, FrameKind, KvPart, checksum
from splitserve.kv_transfer.grants import Grant
from splitserve.kv_transfer.incoming import Incoming
from splitserve.kv_transfer.ranges import KvLayout, check_pair, known_dtype, route
from splitserve.kv_transfer.wire import payload_bytes
from splitserve.proto import convert, inference_pb2, kv_transfer_pb2, worker_pb2
from splitserve.worker.edge import sequence_from_proto

from .random_messages import damaged, message_classes, random_bytes, readable

CASES = pytest.mark.parametrize("num_cases", [5_000, pytest.param(100_000, marks=pytest.mark.verify)])
READERS: list[tuple[Any, Callable[[Any], object]]] = [
    (worker_pb2.WorkRequest, sequence_from_proto),
    (worker_pb2.Failure, convert.failure_from_proto),
    (worker_pb2.SequenceTokens, lambda m: convert.reason_from_proto(m.finish_reason)),
    (inference_pb2.SamplingParams, convert.sampling_from_proto),
    (inference_pb2.OutputFormat, convert.format_from_proto),
    (inference_pb2.TokenLogprob, convert.logprob_from_proto),
    (inference_pb2.ListModelsResponse, results.models_from_proto),
    (inference_pb2.TokenizeResponse, results.tokenization_from_proto),
    (inference_pb2.GetRouterStatusResponse, results.status_from_proto),
    (inference_pb2.RequestTiming, results.timing_from_proto),
    (inference_pb2.Usage, results.usage_from_proto),
    (kv_transfer_pb2.KvShape, lambda m: check_pair(KvLayout.from_proto(m), KvLayout.from_proto(m))),
    (kv_transfer_pb2.Grant, lambda m: known_dtype(Grant.from_proto(m).wire_dtype)),
]
GEOMETRY = KvGeometry(
    model_id="m",
    layers=tuple(LayerGeometry(num_kv_heads=2, key_dim=4, value_dim=4) for _ in range(3)),
    dtype="float32",
)
PLAIN = WireFormat(codec="none", dtype="float32")
GRANT = Grant(
    grant_id="0" * 32,
    request_id="r",
    attempt=1,
    epoch=1,
    decode_boot_id="d",
    prefill_boot_id="p",
    geometry_digest=GEOMETRY.digest(),
    num_cached_tokens=0,
    num_tokens=32,
    lease_s=1.0,
    codec="none",
    wire_dtype="float32",
)


@CASES
def test_bytes_are_a_message_or_are_refused_by_the_parser(num_cases: int) -> None:
    choose = random.Random(num_cases)
    kinds = message_classes()
    for number in range(num_cases):
        kind = kinds[number % len(kinds)]
        with suppress(DecodeError):
            kind.FromString(random_bytes(choose, kind)).SerializeToString()


@CASES
def test_what_reads_a_message_returns_or_raises_a_typed_error(num_cases: int) -> None:
    choose = random.Random(num_cases)
    refused = 0
    for number in range(num_cases):
        kind, read = READERS[number % len(READERS)]
        message = readable(choose, kind)
        try:
            read(message)
        except SplitserveError:
            refused += 1
    assert 0 < refused < num_cases


def random_frame(choose: random.Random) -> bytes:
    """Nearly one that would be taken next."""
    part = KvPart(
        layer_start=0, layer_end=3, head_start=0, head_end=2, token_start=0, token_end=choose.choice((16, 32))
    )
    payload = choose.randbytes(payload_bytes(GEOMETRY, PLAIN, part))
    header = FrameHeader(
        kind=choose.choice((FrameKind.DATA, FrameKind.END, FrameKind.WAIT)),
        grant_id=GRANT.grant_id,
        attempt=1,
        epoch=1,
        part=part,
        wire=PLAIN,
        sequence=choose.choice((0, 0, 0, 1)),
        payload_bytes=len(payload),
        checksum=checksum(payload),
    )
    if header.kind is FrameKind.END:
        payload = random_bytes(choose, kv_transfer_pb2.TransferEnd)
        header = replace(header, payload_bytes=len(payload), checksum=checksum(payload))
    frame = header.pack() + payload
    match choose.randrange(4):
        case 0:
            return choose.randbytes(choose.randrange(2 * HEADER_BYTES))
        case 1:
            return frame
        case 2:  # only the header
            return damaged(choose, frame[:HEADER_BYTES]) + frame[HEADER_BYTES:]
        case _:
            return damaged(choose, frame)


@CASES
def test_a_frame_of_random_bytes_is_taken_whole_or_is_corrupt(num_cases: int) -> None:
    choose = random.Random(num_cases)
    layout = KvLayout(geometry=GEOMETRY)
    due = route(layout, 0, layout, 0)
    taken = corrupt = 0
    for _ in range(num_cases):
        incoming = Incoming(GRANT, GEOMETRY, due, range(32))
        frame = random_frame(choose)
        try:
            header = FrameHeader.unpack(frame)
            if incoming.is_stale(header):
                continue
            if header.kind is FrameKind.END:
                incoming.accept_end(header, memoryview(frame)[HEADER_BYTES:])
            elif header.kind is not FrameKind.WAIT:
                incoming.accept_data(header, frame)
                assert incoming.num_bytes == payload_bytes(GEOMETRY, PLAIN, header.part)
            taken += 1
        except KvCorrupted:
            corrupt += 1
    assert taken > 0 < corrupt
