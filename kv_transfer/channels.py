"""Which transports have a channel, how each is set up, and where its payloads are packed."""

from __future__ import annotations

from ..proto import kv_transfer_pb2 as pb
from .channel import Rendezvous
from .gloo import GlooRendezvous
from .lanes import MAX_COMMUNICATORS, MAX_LANES, Lanes
from .layout import PoolBytes
from .pool import KvPool
from .staging import HostStaging, Staging

CHANNELS = (pb.TRANSPORT_GLOO, pb.TRANSPORT_NCCL)


def is_usable(transport: int, pool: KvPool) -> bool:
    """Whether this side could take part: NCCL needs a pool in a GPU's memory, and a library."""
    if transport != pb.TRANSPORT_NCCL:
        return True
    if pool.keys(0).device.type != "cuda":
        return False
    from .nccl_library import is_available

    return is_available()


def rendezvous_of(transport: int, pool: KvPool, host: str = "127.0.0.1") -> Rendezvous:
    """Args: transport: one of CHANNELS that is usable. host: address that a sender listens on."""
    if transport == pb.TRANSPORT_GLOO:
        return GlooRendezvous(host)
    from .nccl import NcclRendezvous

    return NcclRendezvous(pool.keys(0).device)


def lanes_of(transport: int, pool: KvPool, host: str) -> Lanes:
    """A sender's."""
    most = MAX_COMMUNICATORS if transport == pb.TRANSPORT_NCCL else MAX_LANES
    return Lanes(rendezvous_of(transport, pool, host), most)


def staging_of(transport: int, pool_bytes: PoolBytes) -> Staging:
    """Args: transport: one of CHANNELS that is usable."""
    if transport == pb.TRANSPORT_GLOO:
        return HostStaging()
    from .device_layout import DevicePoolBytes
    from .device_staging import DeviceStaging

    assert isinstance(pool_bytes, DevicePoolBytes)
    return DeviceStaging(pool_bytes)
