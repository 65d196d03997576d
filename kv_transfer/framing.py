"""What the frames of each transport are like."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto import kv_transfer_pb2 as pb

FRAME_BYTES = 2 << 20  # gRPC: 64 KiB costs three times the CPU, tens of MiB stall the stream
SHARED_FRAME_BYTES = 32 << 20  # shared memory: only block numbers travel; this bounds what is copied in one go
LANE_FRAME_BYTES = 8 << 20  # gloo: two of them are in flight
DEVICE_FRAME_BYTES = 256 << 20  # CUDA IPC: two thirds of a millisecond
NCCL_FRAME_BYTES = 128 << 20  # less than half a millisecond between GPUs of a host; smaller ones wait for their headers
MAX_LINK_BYTES, MAX_BYTES = 32 << 20, 256 << 20  # packed and not handed over, to one receiver and to all
MAX_DEVICE_LINK_BYTES, MAX_DEVICE_BYTES = 384 << 20, 768 << 20  # the same, in a GPU's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What the frames of a transport are like."""

    max_bytes: int  # KV bytes of one
    mapped: bool = False  # it holds the numbers of whole blocks; the receiver copies them while we compute checksums
    in_lane: bool = False  # the payload moves by the link's channel
    on_device: bool = False  # from GPU to GPU: it never is in a host's memory


def framing_of(transport: int) -> Framing:
    match transport:
        case pb.TRANSPORT_SHARED_MEMORY:
            return Framing(max_bytes=SHARED_FRAME_BYTES, mapped=True)
        case pb.TRANSPORT_CUDA_IPC:
            return Framing(max_bytes=DEVICE_FRAME_BYTES, mapped=True, on_device=True)
        case pb.TRANSPORT_GLOO:
            return Framing(max_bytes=LANE_FRAME_BYTES, in_lane=True)
        case pb.TRANSPORT_NCCL:
            return Framing(max_bytes=NCCL_FRAME_BYTES, in_lane=True, on_device=True)
        case _:
            return Framing(max_bytes=FRAME_BYTES)
