"""TP p to TP d over real transports: every rank ends with exactly its heads, and nothing is committed by halves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
import pytest
import torch
from splitserve.core.errors import GeometryMismatch, TransferFailed, Unavailable
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.core.request import Request
from splitserve.kv_transfer.capability import Granter
from splitserve.kv_transfer.codecs import WireFormat
from splitserve.kv_transfer.fetching import Received
from splitserve.kv_transfer.grants import Grant
from splitserve.kv_transfer.identity import WorkerIdentity
from splitserve.kv_transfer.ranges import KvLayout
from splitserve.kv_transfer.ranks import Endpoint, RankReceiver, ReceiverGroup
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.source_ranks import RankSender

NUM_TOKENS = 70
# Grouped heads with a window, MLA (K wider than V), and one head that all ranks share.
GEOMETRY = KvGeometry(
    model_id="ranks",
    layers=(
        LayerGeometry(num_kv_heads=4, key_dim=6, value_dim=6, sliding_window=8),
        LayerGeometry(num_kv_heads=4, key_dim=6, value_dim=6),
        LayerGeometry(num_kv_heads=2, key_dim=7, value_dim=5),
        LayerGeometry(num_kv_heads=1, key_dim=4, value_dim=4),
    ),
    dtype="float32",
)
PROMPT = tuple(range(1, NUM_TOKENS + 1))


@dataclass(kw_only=True)
class Workers:
    """A prefill worker of p ranks and a decode worker of d, each rank with its own pool."""

    source: KvLayout
    target: KvLayout
    endpoint: Endpoint
    senders: list[RankSender]
    receivers: ReceiverGroup
    source_pools: list[Any]
    target_pools: list[Any]
    source_table: list[int]
    target_table: list[int]
    released: list[list[str]]
    reports: list[list[str]]

    def grants(self, num_cached_tokens: int = 0, codec: str = "none", request_id: str = "r1") -> list[list[Grant]]:
        request = Request(request_id=request_id, prompt_token_ids=PROMPT, max_tokens=4)
        dtype = self.source.geometry.dtype if self.target.geometry.dtype == "float32" else self.target.geometry.dtype
        wire = WireFormat(codec=codec, dtype=dtype)
        return self.receivers.grants(request, self.endpoint, wire, num_cached_tokens)

    def offer(self, grants: list[list[Grant]], request_id: str = "r1") -> None:
        for rank, sender in enumerate(self.senders):
            own = [grant for grants_of in grants for grant in grants_of if grant.prefill_rank == rank]
            sender.offer(request_id, own, PROMPT, lambda _: self.source_table)

    def write_all(self, request_id: str = "r1") -> None:
        for sender in self.senders:
            for layer in range(GEOMETRY.num_layers):
                sender.kv_written(request_id, layer, layer + 1, 0, NUM_TOKENS)
            sender.finish(request_id, 7, final=False)

    async def hand_over(self, grants: list[list[Grant]]) -> Received:
        arrived = await self.receivers.receive(grants, self.endpoint, PROMPT, self.target_table)
        await self.receivers.commit(grants, self.endpoint, arrived)
        return arrived.whole

    def whole(self, pools: list[Any], layout: KvLayout, table: list[int], start: int) -> list[torch.Tensor]:
        """Planes over all heads, put together from the ranks; ranks that share a head must agree."""
        planes = []
        tokens = [pool.tokens(table, start, NUM_TOKENS) for pool in pools]
        for layer in range(GEOMETRY.num_layers):
            for plane in (2 * layer, 2 * layer + 1):
                heads: dict[int, torch.Tensor] = {}
                for rank in range(layout.num_ranks):
                    for place, head in enumerate(layout.heads(layer, rank)):
                        values = tokens[rank][plane][place]
                        assert torch.equal(heads.setdefault(head, values), values)
                planes.append(torch.stack([heads[head] for head in sorted(heads)]))
        return planes


@asynccontextmanager
async def workers(
    pool_type: Any, p: int, d: int, transport: str, *, block_sizes: tuple[int, int] = (16, 32), dtype: str = "float32"
) -> AsyncIterator[Workers]:
    source = KvLayout(geometry=GEOMETRY, num_ranks=p)
    target = KvLayout(geometry=replace(GEOMETRY, dtype=dtype), num_ranks=d)
    async with AsyncExitStack() as stack:
        released: list[list[str]] = [[] for _ in range(p)]
        reports: list[list[str]] = [[] for _ in range(p)]
        addresses, senders, source_pools, target_pools, receivers = [], [], [], [], []
        generator = torch.Generator().manual_seed(1)
        granter = Granter.new()
        for rank in range(p):
            pool = pool_type(block_sizes[0], geometry=source.rank_geometry(rank))
            source_pools.append(pool)
            stack.callback(pool.close)
            server = grpc.aio.server()

            def make_sender(release: Any, report: Any, rank: int = rank, pool: Any = pool, server: Any = server) -> Any:
                identity = WorkerIdentity(worker_id=f"p{rank}", boot_id=f"p-boot-{rank}", host_id="here")
                sender = KvSender(pool, identity, release=release, report=report, layout=source, rank=rank)
                sender.register(server)
                return sender

            senders.append(
                RankSender(
                    make_sender,
                    release=released[rank].append,
                    report=lambda request_id, _, rank=rank: reports[rank].append(request_id),
                )
            )
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            stack.push_async_callback(server.stop, 0)
            stack.push_async_callback(senders[-1].close)
        for rank in range(d):
            pool = pool_type(block_sizes[1], geometry=target.rank_geometry(rank))
            target_pools.append(pool)
            stack.callback(pool.close)
            identity = WorkerIdentity(worker_id=f"d{rank}", boot_id="d-boot", host_id="here")
            receiver = KvReceiver(pool, identity, transports=(transport,), layout=target, rank=rank, granter=granter)
            stack.push_async_callback(receiver.close)
            receivers.append(receiver)
        boots = tuple(f"p-boot-{rank}" for rank in range(p))
        found = Workers(
            source=source,
            target=target,
            endpoint=Endpoint(addresses=tuple(addresses), boot_ids=boots, dtype="float32"),
            senders=senders,
            receivers=ReceiverGroup(receivers[0], target, [RankReceiver(receiver) for receiver in receivers[1:]]),
            source_pools=source_pools,
            target_pools=target_pools,
            source_table=torch.randperm(24, generator=generator).tolist(),
            target_table=torch.randperm(24, generator=generator).tolist(),
            released=released,
            reports=reports,
        )
        share_heads(found)
        yield found


def share_heads(found: Workers) -> None:
    """Ranks that hold one head hold the same KV of it, as after a real prefill."""
    for layer in range(GEOMETRY.num_layers):
        first: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for rank, pool in enumerate(found.source_pools):
            for place, head in enumerate(found.source.heads(layer, rank)):
                own = (pool.keys(layer)[:, place], pool.values(layer)[:, place])
                for ours, theirs in zip(own, first.setdefault(head, own), strict=True):
                    ours.copy_(theirs)


@pytest.mark.parametrize("transport", ["gloo", "grpc"])
@pytest.mark.parametrize(("p", "d"), [(p, d) for p in (1, 2, 4) for d in (1, 2, 4)])
async def test_every_rank_gets_its_heads(tiny_pool, transport: str, p: int, d: int) -> None:
    async with workers(tiny_pool, p, d, transport) as w:
        grants = w.grants(num_cached_tokens=32)
        w.offer(grants)
        receiving = asyncio.ensure_future(w.hand_over(grants))
        w.write_all()
        received = await receiving
        assert received.transport == transport
        per_token = sum(pool.geometry.bytes_per_token for pool in w.target_pools)
        assert received.num_bytes == per_token * (NUM_TOKENS - 32)
        sent = w.whole(w.source_pools, w.source, w.source_table, 32)
        came = w.whole(w.target_pools, w.target, w.target_table, 32)
        assert all(torch.equal(a, b) for a, b in zip(sent, came, strict=True))
        assert w.released == [["r1"]] * p
        assert not any(w.reports)


@pytest.mark.parametrize(("p", "d"), [(1, 4), (4, 1), (2, 4)])
async def test_a_codec_and_another_dtype_give_every_layout_the_same_bits(tiny_pool, p: int, d: int) -> None:
    """How heads are divided must not change what a lossy codec makes of them."""
    async with workers(tiny_pool, p, d, "gloo", dtype="bfloat16") as w, workers(tiny_pool, 1, 1, "grpc") as alone:
        for pool in w.source_pools + alone.source_pools:
            pool.data.fill_(0.0)
        for layer in range(GEOMETRY.num_layers):
            for side in (w, alone):
                for rank, pool in enumerate(side.source_pools):
                    for place, head in enumerate(side.source.heads(layer, rank)):
                        for plane in (pool.keys(layer), pool.values(layer)):
                            ramp = torch.arange(plane[:, place].numel(), dtype=torch.float32)
                            plane[:, place] = (ramp * (head + 1) * 0.37).sin().view(plane[:, place].shape)
        came = []
        for side in (w, alone):
            grants = side.grants(codec="int8")
            side.offer(grants)
            side.write_all()
            await side.hand_over(grants)
            planes = side.whole(side.target_pools, side.target, side.target_table, 0)
            came.append([plane.to(torch.bfloat16) for plane in planes])
        assert w.source_table == alone.source_table
        assert all(torch.equal(a, b) for a, b in zip(*came, strict=True))


@pytest.mark.parametrize("transport", ["gloo", "grpc"])
async def test_one_rank_that_fails_fails_all_of_them(tiny_pool, transport: str) -> None:
    async with workers(tiny_pool, 2, 2, transport) as w:
        grants = w.grants()
        w.offer(grants)
        receiving = asyncio.ensure_future(w.hand_over(grants))
        w.senders[0].kv_written("r1", 0, GEOMETRY.num_layers, 0, NUM_TOKENS)
        w.senders[0].finish("r1", 7, final=False)
        w.senders[1].kv_written("r1", 0, 2, 0, NUM_TOKENS)
        w.senders[1].fail("r1", Unavailable("the test says so"))
        with pytest.raises((Unavailable, TransferFailed)):
            await receiving
        assert w.released[1] == ["r1"]
        assert "r1" not in w.reports[1]  # it knows why: it said so
        w.senders[0].fail("r1", Unavailable("the prefill worker gives the attempt up on every rank"))
        assert w.released == [["r1"], ["r1"]]
        # The next attempt works, over lanes of a new epoch.
        failed, grants = grants, w.grants(request_id="r2")
        assert grants[1][0].epoch > failed[1][0].epoch
        w.offer(grants, "r2")
        w.write_all("r2")
        await w.hand_over(grants)
        assert [ids[-1] for ids in w.released] == ["r2", "r2"]


async def test_heads_that_cannot_be_divided_are_refused_when_granting(tiny_pool) -> None:
    async with workers(tiny_pool, 1, 1, "grpc") as w:
        endpoint = Endpoint(addresses=("127.0.0.1:1",) * 3, boot_ids=("b",) * 3)
        request = Request(request_id="r", prompt_token_ids=PROMPT, max_tokens=1)
        with pytest.raises(GeometryMismatch, match="which 3 ranks can neither divide nor share"):
            w.receivers.grants(request, endpoint, WireFormat(codec="none", dtype="float32"), 0)
