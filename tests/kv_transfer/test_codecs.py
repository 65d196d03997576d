"""Codecs: how far a value may move, exactly how many bytes travel, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve.core.errors import KvCorrupted
from splitserve.kv_transfer.codecs import (
    CODEC_NAMES,
    GROUP_TOKENS,
    TORCH_DTYPES,
    PlaneShape,
    WireFormat,
    codec_history,
    decode,
    encode,
    narrower,
    wire_bytes,
)

DTYPES = list(TORCH_DTYPES)


def planes(seed: int, heads: int, tokens: int, dims: tuple[int, int], magnitude: float, dtype: str):
    """One layer's K and V; some channels of K are a hundred times larger, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for is_key, dim in zip((True, False), dims, strict=True):
        values = torch.randn(heads, tokens, dim, generator=generator) * magnitude
        if is_key:
            values[..., 0] *= 100
        values[0, 0] = 0.0
        shape = PlaneShape(is_key=is_key, heads=heads, tokens=tokens, dim=dim)
        made.append((shape, values.to(TORCH_DTYPES[dtype])))
    return made


def moved(wire: WireFormat, made, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [shape for shape, _ in made]
    payload = torch.full((wire_bytes(wire, shapes),), 0xAA, dtype=torch.uint8)
    encode(wire, made, payload)
    return list(decode(wire, shapes, payload, dtype))


def scale_of(shape: PlaneShape, values: torch.Tensor, largest: float) -> torch.Tensor:
    """The largest scale that each value may have got: by hand, token by token."""
    amax = torch.empty_like(values)
    for token in range(shape.tokens):
        group = slice(token - token % GROUP_TOKENS, token - token % GROUP_TOKENS + GROUP_TOKENS)
        span = values[:, group].abs().amax(1) if shape.is_key else values[:, token].abs().amax(1, keepdim=True)
        amax[:, token] = span
    return (amax / largest).clamp_min(torch.finfo(torch.float32).tiny) * (1 + 2.0**-7)


SHAPES = {
    "seed": st.integers(0, 1 << 30),
    "heads": st.integers(1, 3),
    "tokens": st.integers(1, 40),
    "dims": st.tuples(st.integers(1, 9), st.integers(1, 9)),
    "magnitude": st.sampled_from([1e-30, 1e-4, 1.0, 300.0, 1e30]),
}


@given(**SHAPES, source=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=60, deadline=None)
def test_int8_moves_a_value_by_half_a_step_at_most(seed, heads, tokens, dims, magnitude, source) -> None:
    made = planes(seed, heads, tokens, dims, magnitude, source)
    wire = WireFormat(codec="int8", dtype="float32")
    for (shape, values), came in zip(made, moved(wire, made, torch.float32), strict=True):
        error = (came - values.float()).abs()
        assert (error <= scale_of(shape, values.float(), 127.0) * (0.5 + 1e-5)).all()


@given(**SHAPES, source=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=60, deadline=None)
def test_fp8_moves_a_value_by_a_sixteenth_at_most(seed, heads, tokens, dims, magnitude, source) -> None:
    made = planes(seed, heads, tokens, dims, magnitude, source)
    wire = WireFormat(codec="fp8", dtype="float32")
    for (shape, values), came in zip(made, moved(wire, made, torch.float32), strict=True):
        values = values.float()
        step = scale_of(shape, values, 448.0) * 2.0**-10  # half of e4m3's smallest step
        assert ((came - values).abs() <= torch.maximum(values.abs() * (2.0**-4 + 1e-5), step)).all()


@given(**SHAPES, source=st.sampled_from(DTYPES), target=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_without_a_codec_only_the_narrower_dtype_rounds(seed, heads, tokens, dims, magnitude, source, target) -> None:
    made = planes(seed, heads, tokens, dims, min(magnitude, 1.0), source)
    wire = WireFormat(codec="none", dtype=narrower(source, target))
    for (_, values), came in zip(made, moved(wire, made, TORCH_DTYPES[target]), strict=True):
        assert came.dtype == TORCH_DTYPES[target]
        assert torch.equal(came, values.to(TORCH_DTYPES[wire.dtype]).to(TORCH_DTYPES[target]))
        if source == target:
            assert torch.equal(came.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_bytes_by_the_formula(codec) -> None:
    """SmolLM2's heads, 40 tokens: K has three groups of scales, V forty scales a head."""
    shapes = [PlaneShape(is_key=is_key, heads=3, tokens=40, dim=64) for is_key in (True, False)]
    elements = 2 * 3 * 40 * 64
    expected = {"none": 4 * elements, "fp8": elements + 2 * 3 * (3 * 64 + 40), "int8": elements + 2 * 3 * (3 * 64 + 40)}
    assert wire_bytes(WireFormat(codec=codec, dtype="float32"), shapes) == expected[codec]


@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_how_a_prompt_is_cut_into_parts_changes_no_bit(codec) -> None:
    made = planes(1, 2, 70, (8, 6), 1.0, "float32")
    wire = WireFormat(codec=codec, dtype="float32")
    whole = moved(wire, made, torch.float32)
    for cut in (16, 48, 64):
        for part in (slice(0, cut), slice(cut, 70)):
            cut_planes = [
                (PlaneShape(is_key=s.is_key, heads=2, tokens=len(range(70)[part]), dim=s.dim), v[:, part])
                for s, v in made
            ]
            for came, reference in zip(moved(wire, cut_planes, torch.float32), whole, strict=True):
                assert torch.equal(came, reference[:, part])


def test_every_e4m3_code_is_decoded_as_the_cast_does() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)  # those are NaN
    shape = PlaneShape(is_key=False, heads=1, tokens=1, dim=len(codes))
    payload = torch.cat([torch.ones(1, dtype=torch.bfloat16).view(torch.uint8), codes])
    (came,) = decode(WireFormat(codec="fp8", dtype="float32"), [shape], payload, torch.float32)
    assert torch.equal(came.view(-1), codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_values_that_are_not_finite_are_refused(codec, value: float) -> None:
    for plane in (0, 1):
        made = planes(1, 2, 20, (4, 4), 1.0, "float32")
        made[plane][1][1, 17, 2] = value
        with pytest.raises(KvCorrupted, match="not sent"):
            moved(WireFormat(codec=codec, dtype="float32"), made, torch.float32)


def test_a_value_too_large_for_the_narrower_dtype_is_refused() -> None:
    made = planes(1, 1, 4, (4, 4), 1.0, "float32")
    made[0][1][0, 2, 1] = 70_000.0
    with pytest.raises(KvCorrupted, match="too large for dtype float16"):
        moved(WireFormat(codec="none", dtype="float16"), made, torch.float16)


@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_a_codec_keeps_within_the_dtype_of_the_other_side(codec) -> None:
    wire = WireFormat(codec=codec, dtype="float16")
    made = planes(1, 1, 4, (4, 4), 1.0, "float32")
    made[0][1][0, 2, 1] = 65_504.0  # the largest
    for came in moved(wire, made, torch.float16):
        assert bool(came.isfinite().all())
    made[1][1][0, 2, 1] = 70_000.0
    with pytest.raises(KvCorrupted, match=f"too large for codec {codec} and dtype float16"):
        moved(wire, made, torch.float16)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_scale_and_a_wrong_length_are_refused(scale: float) -> None:
    made = planes(1, 1, 4, (4, 4), 1.0, "float32")
    shapes = [shape for shape, _ in made]
    wire = WireFormat(codec="int8", dtype="float32")
    payload = torch.empty(wire_bytes(wire, shapes), dtype=torch.uint8)
    encode(wire, made, payload)
    with pytest.raises(KvCorrupted, match="bytes came"):
        list(decode(wire, shapes, payload[:-1], torch.float32))
    payload[:2] = torch.tensor([scale], dtype=torch.bfloat16).view(torch.uint8)
    with pytest.raises(KvCorrupted, match="scale"):
        list(decode(wire, shapes, payload, torch.float32))


def test_history_names_what_lost_precision() -> None:
    def history(codec: str, source: str, target: str) -> str:
        return codec_history(WireFormat(codec=codec, dtype=narrower(source, target)), target)

    assert history("none", "float32", "float32") == "none"
    assert history("none", "float32", "bfloat16") == "none"  # what a prefill in bfloat16 stores, too
    assert history("none", "bfloat16", "float32") == "bfloat16"
    assert history("int8", "float32", "float32") == "int8"
    assert history("fp8", "bfloat16", "bfloat16") == "fp8"
