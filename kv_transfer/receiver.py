"""The decode side: pulls a granted request's KV into its own blocks, verifies all of it, commits."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from ..core.errors import SplitserveError, StaleMessage, TransferFailed
from ..core.kv_geometry import DTYPE_BYTES
from ..core.metrics import WorkerMetrics
from ..core.request import Request
from ..proto import kv_transfer_pb2 as pb
from ..proto.tls import Tls
from .capability import Granter
from .codec_choice import LinkSpeed, is_codec_worth_it
from .codecs import CodecName, WireFormat, narrower
from .fetching import Fetcher, LaneGone, Received, Transfer
from .frames import KvPart
from .grants import Grant, KvSource
from .identity import WorkerIdentity
from .incoming import Incoming
from .layout import pool_bytes
from .peer import MAPPED, TRANSPORTS, Peers
from .pool import KvPool
from .ranges import KvLayout, route
from .wire import payload_bytes

logger = logging.getLogger(__name__)

COMMIT_TIMEOUT_S = 5.0
AUTO_CODEC: CodecName = "int8"  # as many bytes as fp8, a smaller error: docs/kv_transfer.md
CODEC_BYTES_PER_S = 1e9  # of KV in its own dtype; one CPU core codes 1.3 to 3.8 GB/s
MAX_RESUMES = 2
CLOSE_WAIT_S = 1.0  # for senders to hear that transfers were given up


class KvReceiver:
    """Lives on the decode worker's event loop; copies run in threads of its own.

    Args:
        transports: what may be used, best first.
        codec: how KV is coded where its bytes travel; "auto" decides by a link's measured speed.
        layout, rank: how the worker's ranks hold the model's KV, and which of them this pool is; one rank holds all.
        granter: of all ranks of a worker; None: this one is alone.
        lease_s: how long the sender shall keep KV without a sign of life.
        silence_s: a stream that says nothing for this long is given up.
        stall_s: the same, once the first KV has come.
        tls: of this worker; None: plain text.
        pause: waits for a moment in which a part of KV that is not urgent disturbs nobody.
    """

    def __init__(
        self,
        pool: KvPool,
        identity: WorkerIdentity,
        *,
        transports: Sequence[str] = ("cuda_ipc", "shared_memory", "grpc"),
        codec: CodecName | Literal["auto"] = "none",
        metrics: WorkerMetrics | None = None,
        layout: KvLayout | None = None,
        rank: int = 0,
        granter: Granter | None = None,
        lease_s: float = 30.0,
        silence_s: float = 10.0,
        stall_s: float = 5.0,
        tls: Tls | None = None,
        pause: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._pool = pool
        self._layout = layout or KvLayout(geometry=pool.geometry)
        self._rank = rank
        self._bytes = pool_bytes(pool, self._layout.first_heads(rank))
        self._identity = identity
        self._codec = codec
        self._metrics = metrics
        self._lease_s = lease_s
        self._granter = granter or Granter.new()
        self._geometry_digest = self._layout.geometry.digest()
        self._peers = Peers(pool, self._bytes, self._layout, rank, identity, transports, tls)
        self._epochs: defaultdict[str, int] = defaultdict(lambda: 1)  # per address, raised after every failure
        self._speeds: defaultdict[str, LinkSpeed] = defaultdict(LinkSpeed)  # per address
        self._abandoning: set[asyncio.Task[None]] = set()
        self._fetcher = Fetcher(
            pool, self._bytes, self._granter, metrics=metrics, silence_s=silence_s, stall_s=stall_s, pause=pause
        )

    def choose_wire(self, source: KvSource, num_tokens: int) -> WireFormat:
        """How KV from there shall travel: what is configured or, with codec auto, what its link's speed asks for."""
        own = self._pool.geometry
        plain = WireFormat(codec="none", dtype=narrower(source.dtype or own.dtype, own.dtype))
        if self._codec != "auto":
            return replace(plain, codec=self._codec)
        whole = KvPart(
            layer_start=0,
            layer_end=own.num_layers,
            head_start=0,
            head_end=own.layers[0].num_kv_heads,
            token_start=0,
            token_end=num_tokens,
        )
        coded = replace(plain, codec=AUTO_CODEC)
        speed = self._speeds[source.address]
        worth_it = is_codec_worth_it(
            num_bytes=payload_bytes(own, plain, whole),
            coded_bytes=payload_bytes(own, coded, whole),
            link_bytes_per_s=speed.link_bytes_per_s,
            prefill_s=num_tokens / speed.prefill_tokens_per_s if speed.prefill_tokens_per_s else 0.0,
            codec_bytes_per_s=CODEC_BYTES_PER_S,
        )
        return coded if worth_it else plain

    def make_grant(
        self,
        request: Request,
        source: KvSource,
        wire: WireFormat,
        num_cached_tokens: int,
        decode_rank: int | None = None,
    ) -> Grant:
        """Promise blocks, which the caller has reserved, for one attempt; of another rank if `decode_rank` says so."""
        grant = Grant(
            grant_id=secrets.token_hex(16),
            request_id=request.request_id,
            attempt=request.attempt,
            epoch=self._epochs[source.address],
            decode_boot_id=self._identity.boot_id,
            prefill_boot_id=source.boot_id,
            geometry_digest=self._geometry_digest,
            num_cached_tokens=num_cached_tokens,
            num_tokens=request.num_tokens,
            lease_s=self._lease_s,
            codec=wire.codec,
            wire_dtype=wire.dtype,
            prefill_ranks=source.num_ranks,
            prefill_rank=source.rank,
            decode_ranks=self._layout.num_ranks,
            decode_rank=self._rank if decode_rank is None else decode_rank,
        )
        return self._granter.seal(grant)

    async def receive(
        self,
        grant: Grant,
        kv_address: str,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        on_end: Callable[[], None] = lambda: None,
    ) -> Received:
        """Pull the KV of `token_ids` into `block_ids`; all of it is verified when this returns, not yet committed.

        `on_end` is called when the end of all KV came: what is left are the last copies, and half a millisecond.

        When it returns, raises or is cancelled, nothing writes to the blocks any more.
        Raises: TransferFailed, KvCorrupted, LeaseExpired, StaleMessage, GeometryMismatch, or the error that the
            request ended with on the prefill worker.
        """
        source = KvLayout(geometry=self._layout.geometry, num_ranks=grant.prefill_ranks)
        due = route(source, grant.prefill_rank, self._layout, self._rank)
        transfer = Transfer(
            grant=grant,
            block_ids=block_ids,
            on_end=on_end,
            incoming=Incoming(grant, self._layout.geometry, due, token_ids),
        )
        try:
            received = await self._until_whole(transfer, kv_address)
        except SplitserveError as error:
            self.failed(kv_address)
            if isinstance(error, TransferFailed) and not transfer.is_over:
                self._abandon(grant, kv_address)
            raise
        except asyncio.CancelledError:
            self._abandon(grant, kv_address)
            raise
        if self._metrics is not None:
            self._metrics.transfer_bytes.inc(received.num_bytes)
        return received

    async def commit(self, grant: Grant, kv_address: str, received: Received) -> None:
        """Tell the sender that it may free its copy. Best effort: if it does not hear, its lease frees it."""
        if self._metrics is not None:
            self._metrics.transfers.inc()
        try:
            async with self._peers.use(kv_address, grant.prefill_boot_id, lane=False) as peer:
                await peer.tell(self._commit(grant, digest=received.digest), COMMIT_TIMEOUT_S)
        except SplitserveError as error:
            logger.warning("commit of %s was not taken: %s", grant, error)

    async def close(self) -> None:
        """Close every link. Cancel what is receiving first."""
        if self._abandoning:
            _, late = await asyncio.wait(self._abandoning, timeout=CLOSE_WAIT_S)
            for task in late:
                task.cancel()
        await self._peers.close()
        self._fetcher.close()

    async def _until_whole(self, transfer: Transfer, kv_address: str) -> Received:
        """Fetch, and fetch what is missing anew when a stream breaks: once the same way, then by gRPC if it may be.

        Raises: what broke the first stream, or what the prefill worker said.
        """
        grant = transfer.grant
        first: TransferFailed | None = None
        num_gone = 0
        while True:
            transfer.was_open = False
            try:
                async with self._peers.use(kv_address, grant.prefill_boot_id) as peer:
                    fallback = transfer.round == MAX_RESUMES and self._peers.may_use(pb.TRANSPORT_GRPC)
                    try:
                        received = await self._fetcher.fetch(peer, transfer, pb.TRANSPORT_GRPC if fallback else None)
                    except TransferFailed:
                        if transfer.is_link_lost:
                            self._peers.lost(peer)
                        raise
                    # What a last stream took is the time of its own frames, not of those that were kept.
                    if TRANSPORTS[received.transport] not in MAPPED and not transfer.round:
                        self._observe(kv_address, grant, received)
                    return received
            except LaneGone as error:
                num_gone += 1
                if num_gone > MAX_RESUMES:
                    raise first or error from error
            except TransferFailed as error:
                first = first or error
                if transfer.is_over or transfer.round == MAX_RESUMES or not transfer.was_open:
                    raise (error if transfer.is_over else first) from error
                transfer.round += 1
                logger.warning(
                    "%s; fetching what is missing behind %d frames, stream %d",
                    error.message,
                    transfer.num_kept,
                    transfer.round,
                )
                if self._metrics is not None:
                    self._metrics.transfer_resumes.inc()
            except StaleMessage as error:
                raise first or error from error

    def _observe(self, kv_address: str, grant: Grant, received: Received) -> None:
        """What the link's speed was."""
        value_bytes = DTYPE_BYTES[grant.wire_dtype] if grant.wire.is_lossy else 1  # a coded value takes about one
        self._speeds[kv_address] = self._speeds[kv_address].observe(
            num_bytes=received.num_bytes * value_bytes,
            wire_bytes=received.num_bytes,
            write_s=received.write_s,
            num_tokens=grant.num_tokens - grant.num_cached_tokens,
            prefill_s=received.prefill_s,
        )

    def _abandon(self, grant: Grant, kv_address: str) -> None:
        """Let the sender free its copy at once. Best effort: if it does not hear, it waits a while for us to come."""

        async def tell() -> None:
            with suppress(SplitserveError):  # it has freed it already, or is gone
                async with self._peers.use(kv_address, grant.prefill_boot_id, lane=False) as peer:
                    await peer.tell(self._commit(grant, abandoned=True), COMMIT_TIMEOUT_S)

        task = asyncio.create_task(tell())
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)

    def _commit(self, grant: Grant, *, digest: bytes = b"", abandoned: bool = False) -> pb.FetchRequest:
        commit = pb.Commit(digest=digest, abandoned=abandoned)
        return pb.FetchRequest(grant=grant.to_peer(), proof=self._granter.proof(grant), commit=commit)

    def failed(self, kv_address: str) -> None:
        """A transfer from there failed, also to another rank: later grants are of another epoch."""
        self._epochs[kv_address] += 1
        if self._metrics is not None:
            self._metrics.transfer_failures.inc()
