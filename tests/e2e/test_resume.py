"""A stream outlives its router: another one goes on with the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from splitserve.client import AsyncClient
from splitserve.core.errors import Superseded
from splitserve.proto import inference_pb2
from splitserve.proto.rpc import from_rpc_error
from splitserve.router.server import Router, RouterOptions

from .conftest import WAIT_S, Cluster, StartCluster

PROMPT = list(range(70, 110))
NUM_LONG = 400  # tokens: far from its end when the other router takes it
OPTIONS = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True, "logprobs": 1}


@asynccontextmanager
async def second_router(cluster: Cluster) -> AsyncIterator[Router]:
    """Another one before the same workers."""
    options = cluster.router.options
    router = Router(RouterOptions(model=options.model, prefill=options.prefill, decode=options.decode, port=0))
    await router.start()
    try:
        yield router
    finally:
        await router.stop()


async def test_a_stream_goes_on_at_another_router_with_the_same_answer(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    whole = await cluster.client.generate(PROMPT, **OPTIONS)
    async with (
        second_router(cluster) as second,
        AsyncClient([cluster.router.address, second.address]) as client,
        client.stream(PROMPT, **OPTIONS) as stream,
    ):
        first = await anext(stream)
        await next(router for router in (cluster.router, second) if router.dispatcher.num_live).stop()
        result = await stream.result()
        assert first.index == 0
        assert (result.token_ids, result.text) == (whole.token_ids, whole.text)
        assert result.usage.num_output_tokens == 60
        assert [row.token_id for row in result.logprobs] == list(whole.token_ids)
        await cluster.idle()


@pytest.mark.parametrize(
    "call", [pytest.param(1, id="numbered"), pytest.param(0, id="not numbered", marks=pytest.mark.verify)]
)
async def test_a_router_that_lives_cannot_go_on_with_what_another_one_took(
    start_cluster: StartCluster, call: int
) -> None:
    """Its connection to the client is open and silent; the client asks elsewhere, from the tokens that it has."""
    cluster = await start_cluster()
    long = {**OPTIONS, "max_tokens": NUM_LONG}
    whole = (await cluster.client.generate(PROMPT, **long)).token_ids
    async with second_router(cluster) as second, AsyncClient(second.address) as client:
        await client.generate([5], max_tokens=1)  # it has sessions with both workers
        request = inference_pb2.GenerateRequest(
            token_ids={"ids": PROMPT},
            sampling={"temperature": 1.0, "seed": 3},
            max_tokens=NUM_LONG,
            ignore_eos=True,
            idempotency_key="k",
        )
        old = cluster.client.inference(cluster.router.address).Generate(request)
        received: list[int] = []
        async with asyncio.timeout(WAIT_S):
            while len(received) < 3:
                received += (await old.read()).tokens.token_ids
            request.call = call
            request.received_token_ids.extend(received)
            new = client.inference(second.address).Generate(request)
            async for message in new:
                received += message.tokens.token_ids
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await to_the_end(old)
        assert isinstance(from_rpc_error(caught.value), Superseded)
        assert tuple(received) == whole
        await cluster.idle()


async def to_the_end(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
