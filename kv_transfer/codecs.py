"""What KV looks like on the wire: its own dtype, a narrower one, or quantised to a byte with scales.

Plain torch on tensors of any device. A quantised payload is `[scales][codes]`, each in canonical order; scales are
bfloat16, rounded up. K has one scale per 16 tokens and channel, because some channels of K are large for all tokens;
V has one per token and head. Codes times scales are exact in float32, so every device decodes to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.errors import KvCorrupted
from ..core.kv_geometry import DTYPE_BYTES, KvDtype

CodecName = Literal["none", "fp8", "int8"]
CODEC_NAMES: tuple[CodecName, ...] = get_args(CodecName)
GROUP_TOKENS = 16  # tokens that share K's scales; parts begin at multiples of it, however they are cut
SCALE_BYTES = 2
TORCH_DTYPES: dict[KvDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LARGEST = {"fp8": 448.0, "int8": 127.0}  # 127.5 would wrap around in a cast to int8, and 464 is NaN in e4m3
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class WireFormat:
    """How one transfer's KV travels; both sides know it from the grant."""

    codec: CodecName
    dtype: KvDtype  # of unquantised KV; quantised KV does not depend on it

    @property
    def is_lossy(self) -> bool:
        return self.codec != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneShape:
    """K or V of one layer of a part, `[heads, tokens, dim]`."""

    is_key: bool
    heads: int
    tokens: int
    dim: int

    @property
    def elements(self) -> int:
        return self.heads * self.tokens * self.dim

    @property
    def scales(self) -> int:
        if self.is_key:
            return self.heads * -(-self.tokens // GROUP_TOKENS) * self.dim
        return self.heads * self.tokens


def narrower(source: KvDtype, target: KvDtype) -> KvDtype:
    """The dtype that unquantised KV travels in: what the target cannot hold is not sent."""
    return source if DTYPE_BYTES[source] < DTYPE_BYTES[target] else target


def codec_history(wire: WireFormat, target: KvDtype) -> str:
    """What the target's prefix hashes must name, so that KV that lost precision never passes for KV that did not.

    Rounding once to the pool's own dtype is what a prefill there would have done: that is no loss.
    """
    return wire.codec if wire.is_lossy else "none" if wire.dtype == target else wire.dtype


def wire_bytes(wire: WireFormat, planes: Sequence[PlaneShape]) -> int:
    """Exact payload bytes of some planes."""
    if not wire.is_lossy:
        return sum(plane.elements for plane in planes) * DTYPE_BYTES[wire.dtype]
    return sum(plane.elements + SCALE_BYTES * plane.scales for plane in planes)


def encode(wire: WireFormat, planes: Sequence[tuple[PlaneShape, Tensor]], out: Tensor) -> None:
    """Fill `out` (uint8, `wire_bytes` long, on the planes' device) from planes of any KV dtype.

    Raises: KvCorrupted: a value is not finite, or not in the narrower dtype; nothing is sent then.
    """
    for (shape, values), (scales, codes) in zip(
        planes, _places(wire, [shape for shape, _ in planes], out), strict=True
    ):
        if wire.is_lossy:
            _quantise(wire, shape, values.float(), scales, codes)
            continue
        narrowed = values.to(TORCH_DTYPES[wire.dtype])
        if narrowed.dtype != values.dtype and not bool(narrowed.isfinite().all()):
            raise _not_finite(f"dtype {wire.dtype}")
        codes.copy_(narrowed.reshape(-1).view(torch.uint8))


def decode(wire: WireFormat, shapes: Sequence[PlaneShape], payload: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Planes `[heads, tokens, dim]` of `dtype` from a payload of `wire_bytes`, one at a time.

    Raises: KvCorrupted: its length or a scale is impossible.
    """
    if payload.numel() != wire_bytes(wire, shapes):
        raise KvCorrupted(f"{payload.numel()} bytes came for KV that has {wire_bytes(wire, shapes)} as {wire.codec}")
    for shape, (scales, codes) in zip(shapes, _places(wire, shapes, payload), strict=True):
        if wire.is_lossy:
            values, most = _restore(wire.codec, shape, scales, codes), torch.finfo(dtype).max
            yield values.clamp_(-most, most).to(dtype)  # a scale is rounded up, and so may the largest be
        else:
            values = codes.view(TORCH_DTYPES[wire.dtype]).view(shape.heads, shape.tokens, shape.dim)
            yield values.to(dtype)


def _places(wire: WireFormat, shapes: Sequence[PlaneShape], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Where each plane's scales and codes lie in a payload."""
    scale = 0
    code = SCALE_BYTES * sum(shape.scales for shape in shapes) if wire.is_lossy else 0
    for shape in shapes:
        scale_end = scale + (SCALE_BYTES * shape.scales if wire.is_lossy else 0)
        code_end = code + shape.elements * (1 if wire.is_lossy else DTYPE_BYTES[wire.dtype])
        yield flat[scale:scale_end], flat[code:code_end]
        scale, code = scale_end, code_end


def _quantise(wire: WireFormat, shape: PlaneShape, values: Tensor, scales: Tensor, codes: Tensor) -> None:
    """values: [heads, tokens, dim], float32."""
    codec, largest = wire.codec, _LARGEST[wire.codec]
    if shape.is_key:
        grouped = _grouped(values)  # [heads, groups, GROUP_TOKENS, dim]
        amax = grouped.abs().amax(dim=2, keepdim=True)
    else:
        grouped = values
        amax = grouped.abs().amax(dim=2, keepdim=True)  # [heads, tokens, 1]
    if not bool((amax <= torch.finfo(TORCH_DTYPES[wire.dtype]).max).all()):  # nor is NaN
        raise _not_finite(f"codec {codec} and dtype {wire.dtype}")
    # The floor keeps a group of zeros from being divided by zero. Up, so that the largest value is never cut off.
    bits = (amax / largest).clamp_min(_TINY).view(torch.int32)
    scale = ((bits + 0xFFFF) & -0x10000).view(torch.float32)
    scaled = (grouped / scale).clamp_(-largest, largest)
    quantised = scaled.round_().to(torch.int8) if codec == "int8" else scaled.to(torch.float8_e4m3fn)
    if shape.is_key:
        quantised = quantised.flatten(1, 2)[:, : shape.tokens]
    codes.copy_(quantised.reshape(-1).view(torch.uint8))
    scales.copy_(scale.reshape(-1).to(torch.bfloat16).view(torch.uint8))


def _restore(codec: CodecName, shape: PlaneShape, scales: Tensor, codes: Tensor) -> Tensor:
    scale = scales.view(torch.bfloat16).float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise KvCorrupted(f"a scale of codec {codec} is not a positive number")
    code = codes.view(torch.int8).float() if codec == "int8" else _e4m3_to_float(codes)
    values = code.view(shape.heads, shape.tokens, shape.dim)
    if not shape.is_key:
        return values * scale.view(shape.heads, shape.tokens, 1)
    padded = _grouped(values) * scale.view(shape.heads, -1, 1, shape.dim)
    return padded.flatten(1, 2)[:, : shape.tokens]


def _e4m3_to_float(codes: Tensor) -> Tensor:
    """The cast, three times as fast on a CPU: e4m3's bits are those of a float16 256 times smaller."""
    wide = codes.to(torch.int16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.view(torch.float16).float().mul_(256.0)


def _grouped(values: Tensor) -> Tensor:
    """[heads, tokens, dim] -> [heads, groups, GROUP_TOKENS, dim], padded with zeros."""
    heads, tokens, dim = values.shape
    if tokens % GROUP_TOKENS:
        values = torch.nn.functional.pad(values, (0, 0, 0, -tokens % GROUP_TOKENS))
    return values.view(heads, -1, GROUP_TOKENS, dim)


def _not_finite(what: str) -> KvCorrupted:
    return KvCorrupted(
        f"KV holds NaN, infinity or a value too large for {what}; it was not sent: check the model's output, or use "
        "codec none and one KV dtype"
    )
