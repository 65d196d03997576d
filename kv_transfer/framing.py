"""What the frames of each transport are like."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto import kv_transfer_pb2 as pb

FRAME_BYTES = 2 << 20  # gRPC: 64 KiB costs three times the CPU, tens of MiB stall the stream
SHARED_FRAME_BYTES = 32 << 20  # shared memory: only block numbers travel; this bounds what is copied in one go
LANE_FRAME_BYTES = 8 << 20  # gloo: two of them are in flight
DEVICE_FRAME_BYTES = 256 << 20  # CUDA IPC: two thirds of a millisecond
NCCL_FRAME_BYTES = 256 << 20  # 0.77 ms between GPUs of a host, half of it 0.53; smaller ones wait for headers
MAX_LINK_BYTES, MAX_BYTES = 32 << 20, 256 << 20  # packed and not handed over, to one receiver and to all
MAX_DEVICE_LINK_BYTES, MAX_DEVICE_BYTES = 768 << 20, 1536 << 20  # the same, in a GPU's memory

# Waking the event loop for every layer of a small chunk takes the interpreter from the thread that computes the next
# one: 30 wake-ups slowed a 64-token prefill by 15 %. What is left at the end is at most this, under a millisecond.
# A transfer that is no larger than this as a whole waits for the first token: packing it meanwhile delayed that by 0.4
# ms, and packing it afterwards takes no longer.
WAKE_BYTES = 1 << 20
# Between GPUs a frame costs its receiver a copy in pieces of a block each, a checksum behind whatever its decode step
# has running, and turns of two threads: half a millisecond, for a layer of 2,048 tokens every 1.5. What they leave is a
# tenth of a millisecond of the link at most.
DEVICE_WAKE_BYTES, DEVICE_WAKE_SHARE = 32 << 20, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What the frames of a transport are like."""

    max_bytes: int  # KV bytes of one
    mapped: bool = False  # it holds the numbers of whole blocks; the receiver copies them while we compute checksums
    in_lane: bool = False  # the payload moves by the link's channel
    on_device: bool = False  # from GPU to GPU: it never is in a host's memory
    wake_bytes: int = WAKE_BYTES  # KV that is worth a frame while more is being computed, and
    wake_share: float = 0.0  # as a share of what is yet to be computed: of a link that is much faster than prefill


def framing_of(transport: int) -> Framing:
    match transport:
        case pb.TRANSPORT_SHARED_MEMORY:
            return Framing(max_bytes=SHARED_FRAME_BYTES, mapped=True)
        case pb.TRANSPORT_CUDA_IPC:
            return _between_gpus(DEVICE_FRAME_BYTES, mapped=True)
        case pb.TRANSPORT_GLOO:
            return Framing(max_bytes=LANE_FRAME_BYTES, in_lane=True)
        case pb.TRANSPORT_NCCL:
            return _between_gpus(NCCL_FRAME_BYTES, in_lane=True)
        case _:
            return Framing(max_bytes=FRAME_BYTES)


def _between_gpus(max_bytes: int, *, mapped: bool = False, in_lane: bool = False) -> Framing:
    """Few frames while much is yet to be computed, and small ones towards the end, which the decode step waits for."""
    return Framing(
        max_bytes=max_bytes,
        mapped=mapped,
        in_lane=in_lane,
        on_device=True,
        wake_bytes=DEVICE_WAKE_BYTES,
        wake_share=DEVICE_WAKE_SHARE,
    )
