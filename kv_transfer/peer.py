"""Links of a decode worker to its prefill workers: one channel each, one agreed transport, dropped when they break."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol

import grpc
import grpc.aio

from ..core.errors import ConfigError, SplitserveError, StaleMessage, TransferFailed
from ..proto import kv_transfer_pb2 as pb
from ..proto.convert import PROTOCOL_VERSION
from ..proto.rpc import from_rpc_error
from ..proto.tls import PeerRole, Tls, open_channel
from .channel import Lane
from .channels import CHANNELS, is_usable, rendezvous_of
from .frames import SERVICE, KvPart
from .host_copies import Ids
from .identity import WorkerIdentity
from .layout import PoolBytes
from .pool import KvPool
from .ranges import KvLayout
from .shared_memory import PeerPool

logger = logging.getLogger(__name__)

# Setting up a link may take 5 s in all. A connection that hangs is given up before that and made anew: what stalled one
# (a lost packet, a paused machine) seldom stalls the next.
CONNECT_TRIES_S = (2.0, 3.0)
TRANSPORTS = {
    "grpc": pb.TRANSPORT_GRPC,
    "shared_memory": pb.TRANSPORT_SHARED_MEMORY,
    "cuda_ipc": pb.TRANSPORT_CUDA_IPC,
    "gloo": pb.TRANSPORT_GLOO,
    "nccl": pb.TRANSPORT_NCCL,
}
TRANSPORT_NAMES = {number: name for name, number in TRANSPORTS.items()}
REOPEN_S, MAX_REOPEN_S = 30.0, 600.0  # until a channel that could not be set up is tried again; doubles
MAX_IDLE = 16  # streams of a link that wait for a transfer
# The receiver maps the sender's pool and copies whole blocks itself; frames hold their numbers.
MAPPED = (pb.TRANSPORT_SHARED_MEMORY, pb.TRANSPORT_CUDA_IPC)


class LinkTimeout(TransferFailed):
    """A prefill worker did not answer in time."""


class LinkClosed(TransferFailed):
    """We closed the link ourselves."""


async def ask(stream: Any, request: pb.FetchRequest | None, timeout_s: float) -> Any:
    """Send a request, if there is one, on a stream of Fetch, and read the next message: bytes, or EOF.

    Raises: TimeoutError. grpc.aio.AioRpcError. LinkClosed.
    """
    try:
        async with asyncio.timeout(timeout_s):
            if request is not None:
                with suppress(asyncio.InvalidStateError):  # the call is over: reading tells why
                    await stream.write(request)
            return await stream.read()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise LinkClosed("the link to the prefill worker was closed") from None


class MappedPool(Protocol):
    """A peer's pool in our address space."""

    def copy(self, part: KvPart, source_ids: Ids, own: PoolBytes, block_ids: Ids) -> int: ...

    def close(self) -> None: ...


class Peer:
    """A link to one boot of one prefill worker."""

    def __init__(self, channel: grpc.aio.Channel, response: pb.ConnectResponse, pool: MappedPool | None) -> None:
        self.boot_id = response.boot_id
        self.transport = response.transport
        self.pool = pool
        self.lane: Lane | None = None
        self.reopening: asyncio.Task[None] | None = None  # of a channel that could not be set up
        self.link_epoch = 0
        self._fetch: Any = channel.stream_stream(
            f"/{SERVICE}/Fetch", request_serializer=pb.FetchRequest.SerializeToString, response_deserializer=None
        )
        self._idle: list[Any] = []  # streams of Fetch whose last request was answered
        self.channel = channel
        self.users = 0
        self.retired = False
        self.unused = asyncio.Event()
        self.watch: asyncio.Task[None] | None = None

    def stream(self) -> Any:
        """A stream of Fetch that nobody else asks: the one used last, if it still lives, or a new one."""
        while self._idle:
            if not (call := self._idle.pop()).done():
                return call
        return self._fetch()

    def keep(self, stream: Any) -> None:
        """Everything asked was answered: the next transfer finds it open. A call costs either side more than its
        messages, and on a worker that takes the interpreter from the thread that computes."""
        if self.retired or len(self._idle) == MAX_IDLE:
            stream.cancel()
        else:
            self._idle.append(stream)

    async def tell(self, request: pb.FetchRequest, timeout_s: float) -> None:
        """A commit. Raises: TransferFailed, and what the prefill worker refuses it with."""
        stream, is_taken = self.stream(), False
        try:
            is_taken = await ask(stream, request, timeout_s) == b""
        except TimeoutError:
            raise LinkTimeout(f"the prefill worker did not answer within {timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            if not is_taken:
                stream.cancel()
        if not is_taken:
            raise TransferFailed("the prefill worker answered a commit with something else")
        self.keep(stream)


class Peers:
    """All links, by address."""

    def __init__(
        self,
        pool: KvPool,
        pool_bytes: PoolBytes,
        layout: KvLayout,
        rank: int,
        identity: WorkerIdentity,
        transports: Sequence[str],
        tls: Tls | None = None,
    ) -> None:
        unknown = [name for name in transports if name not in TRANSPORTS]
        if unknown or not transports:
            raise ConfigError(f"unknown KV transports {unknown}; choose from {', '.join(TRANSPORTS)}")
        self._pool = pool
        self._pool_bytes = pool_bytes
        self._identity = identity
        self._tls = tls
        self._transports = tuple(TRANSPORTS[name] for name in transports if is_usable(TRANSPORTS[name], pool))
        if not self._transports:
            raise ConfigError(
                f"this worker can use none of the KV transports {', '.join(transports)}: NCCL needs a GPU and the "
                "library that PyTorch brings; use --transport auto"
            )
        self._layout = layout
        self._rank = rank
        self._rendezvous = {
            transport: rendezvous_of(transport, pool) for transport in CHANNELS if transport in self._transports
        }
        self._peers: dict[str, Peer] = {}
        self._link_epochs: Counter[str] = Counter()  # by address
        self._connecting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._watches: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def use(self, address: str, boot_id: str, *, lane: bool = True) -> AsyncIterator[Peer]:
        """The link to that boot of the worker at `address`, open until the block is left.

        Args: lane: wait until its channel is open, if it has one.

        Raises: StaleMessage: another boot runs there now. TransferFailed: nobody answers.
        """
        peer = self._peers.get(address)
        if peer is None or peer.boot_id != boot_id:
            peer = await self._set_up(address, boot_id)
        peer.users += 1  # from here on, a link that breaks is not closed under us
        try:
            if lane and peer.lane is not None:
                await self._await_lane(address, peer)
            yield peer
        finally:
            peer.users -= 1
            if peer.users == 0:
                peer.unused.set()

    async def _set_up(self, address: str, boot_id: str) -> Peer:
        """Connect, or wait for who does. Raises: what `use` does."""
        async with self._setting_up(address):
            peer = self._peers.get(address)
            if peer is None or peer.boot_id != boot_id:
                peer = await self._replace(address, peer)
            if peer.boot_id != boot_id:
                raise StaleMessage(f"boot {boot_id} of the prefill worker at {address} is gone, {peer.boot_id} runs")
            return peer

    @asynccontextmanager
    async def _setting_up(self, address: str) -> AsyncIterator[None]:
        """One at a time sets a link up, and has as long as that takes, its turn included: if nobody answers, those who
        wait fail with the first of them, and not one after the other.

        Raises: LinkTimeout.
        """
        limit_s = sum(CONNECT_TRIES_S) + 0.5  # a set-up's own errors say more
        try:
            async with asyncio.timeout(limit_s), self._connecting[address]:
                yield
        except TimeoutError:
            raise LinkTimeout(f"there was no link to the prefill worker at {address} within {limit_s:g} s") from None

    def may_use(self, transport: pb.Transport.ValueType) -> bool:
        return transport in self._transports

    def lost(self, peer: Peer) -> None:
        """A stream broke as if its link had: whoever comes next connects anew, sooner than the link itself is seen
        to break."""
        if peer.retired:
            return
        peer.retired = True
        for address in [address for address, known in self._peers.items() if known is peer]:
            del self._peers[address]
        if peer.watch is not None:
            peer.watch.cancel()

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    async def _replace(self, address: str, known: Peer | None) -> Peer:
        """Connect anew; keep a known link if the worker there is still the same."""
        if known is not None and not known.retired:
            other = await self._connect(address, [pb.TRANSPORT_GRPC])  # another transport may end that link's channel
            await other.channel.close()
            if known.boot_id == other.boot_id and not known.retired:
                return known
        peer = await self._connect(address, self._transports)
        if known is not None and known.watch is not None:  # another boot in the same process: that link did not break
            known.watch.cancel()
        self._peers[address] = peer
        peer.watch = watch = asyncio.create_task(self._watch(address, peer))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return peer

    async def _connect(self, address: str, transports: Sequence[pb.Transport.ValueType]) -> Peer:
        for timeout_s in CONNECT_TRIES_S[:-1]:
            try:
                return await self._try_to_connect(address, transports, timeout_s)
            except LinkTimeout as error:
                logger.warning("%s; connecting anew", error.message)
        return await self._try_to_connect(address, transports, CONNECT_TRIES_S[-1])

    async def _try_to_connect(
        self, address: str, transports: Sequence[pb.Transport.ValueType], timeout_s: float
    ) -> Peer:
        channel = open_channel(address, self._tls, PeerRole.PREFILL)
        try:
            response = await self._introduce(address, channel, transports, timeout_s)
            pool = None
            if response.transport in MAPPED:
                try:
                    pool = self._map(response)
                except (OSError, ValueError) as error:
                    logger.warning("cannot map the KV pool of %s, using another transport: %s", address, error)
                    others = [transport for transport in transports if transport != response.transport]
                    await channel.close()
                    return await self._try_to_connect(address, others, timeout_s)
            peer = Peer(channel, response, pool)
            self._open_lane(address, peer, response)
            return peer
        except BaseException:
            await channel.close()
            raise

    async def _introduce(
        self,
        address: str,
        channel: grpc.aio.Channel,
        transports: Sequence[pb.Transport.ValueType],
        timeout_s: float,
    ) -> pb.ConnectResponse:
        """Raises: TransferFailed: nobody answers (LinkTimeout: in time). What the prefill worker refuses us with."""
        connect: Any = channel.unary_unary(
            f"/{SERVICE}/Connect",
            request_serializer=pb.ConnectRequest.SerializeToString,
            response_deserializer=pb.ConnectResponse.FromString,
        )
        self._link_epochs[address] += 1
        request = pb.ConnectRequest(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self._identity.worker_id,
            boot_id=self._identity.boot_id,
            geometry_digest=self._layout.geometry.digest(),
            shape=self._layout.to_proto(),
            rank=self._rank,
            block_size=self._pool.block_size,
            host_id=self._identity.host_id,
            transports=transports,
            link_epoch=self._link_epochs[address],
        )
        try:
            response: pb.ConnectResponse = await connect(request, timeout=timeout_s)
            return response
        except grpc.aio.AioRpcError as error:
            typed = from_rpc_error(error)
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                typed = LinkTimeout(f"the prefill worker at {address} did not answer within {timeout_s:g} s")
            elif error.code() is grpc.StatusCode.UNIMPLEMENTED:
                typed = TransferFailed(f"what is at {address} is no prefill worker, or none any more")
            elif error.code() is grpc.StatusCode.UNAVAILABLE:
                typed = TransferFailed(f"the prefill worker at {address} cannot be reached: {error.details()}")
            raise typed from error

    def _open_lane(self, address: str, peer: Peer, response: pb.ConnectResponse) -> None:
        """Join the channel that the answer to Connect invites to, if the transport has one."""
        if response.transport in self._rendezvous:
            peer.lane, peer.link_epoch = self._join(address, response)

    def _join(self, address: str, response: pb.ConnectResponse) -> tuple[Lane, int]:
        """The channel, and its epoch."""
        host = address.rpartition(":")[0].strip("[]")
        epoch = self._link_epochs[address]
        accept = self._rendezvous[response.transport].accept
        return Lane(f"the channel from {address}, epoch {epoch},", partial(accept, host, response.invitation)), epoch

    async def _await_lane(self, address: str, peer: Peer) -> None:
        """Until it is open; one that broke is set up anew, under a new epoch.

        A set-up that failed may fail again, and take its whole time-out: until one works, KV goes by gRPC, if it may.
        Raises: TransferFailed: it may not.
        """
        async with self._setting_up(address):
            if peer.lane is not None and peer.lane.error is not None:
                response = await self._introduce(address, peer.channel, [peer.transport], sum(CONNECT_TRIES_S))
                self._open_lane(address, peer, response)
        if (lane := peer.lane) is None:  # another user gave it up meanwhile
            return
        try:
            await lane.ready()
        except TransferFailed as error:
            if lane.was_open:  # and broke since: its next user connects anew
                return
            if pb.TRANSPORT_GRPC not in self._transports:
                raise
            if peer.lane is not lane:  # another user of it was here
                return
            logger.warning("%s; its KV goes by gRPC meanwhile", error.message)
            transport, peer.lane, peer.transport = peer.transport, None, pb.TRANSPORT_GRPC
            if not peer.retired:
                peer.reopening = asyncio.create_task(self._reopen(address, peer, transport))

    async def _reopen(self, address: str, peer: Peer, transport: pb.Transport.ValueType) -> None:
        """Set a channel up beside the transfers that go by gRPC, and let the next ones have it."""
        pause_s = REOPEN_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_REOPEN_S)
            lane: Lane | None = None
            try:
                async with self._setting_up(address):
                    response = await self._introduce(address, peer.channel, [transport], sum(CONNECT_TRIES_S))
                    lane, epoch = self._join(address, response)
                await lane.ready()
            except SplitserveError as error:
                logger.warning("%s; its KV goes by gRPC still", error.message)
            except BaseException:
                if lane is not None:
                    lane.abort("the link to the prefill worker broke or was closed")
                raise
            else:
                peer.lane, peer.link_epoch, peer.transport = lane, epoch, transport
                logger.info("%s is open", lane.name)
                return

    def _map(self, response: pb.ConnectResponse) -> MappedPool:
        """Raises: OSError, ValueError: it cannot be mapped."""
        if response.transport == pb.TRANSPORT_SHARED_MEMORY:
            return PeerPool(response.shared_pool, self._pool_bytes)
        from .cuda_ipc import PeerDevicePool

        return PeerDevicePool(response.device_pool, self._pool_bytes)

    async def _watch(self, address: str, peer: Peer) -> None:
        """Until the link breaks; then unmap at once, and close the channel when its last user has heard."""
        try:
            while (state := peer.channel.get_state()) is grpc.ChannelConnectivity.READY:
                await peer.channel.wait_for_state_change(state)
        finally:
            peer.retired = True
            if self._peers.get(address) is peer:
                del self._peers[address]
            if peer.lane is not None:
                peer.lane.abort("the link to the prefill worker broke or was closed")
            if peer.pool is not None:
                peer.pool.close()
            if peer.reopening is not None:
                peer.reopening.cancel()
                await asyncio.wait({peer.reopening})
            while peer.users:
                peer.unused.clear()
                await peer.unused.wait()
            if peer.lane is not None:  # its last users may have set it up anew
                peer.lane.abort("the link to the prefill worker was closed")
            await peer.channel.close()
