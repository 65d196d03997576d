"""A stream outlives its router: another one goes on with the same answer."""

from __future__ import annotations

from splitserve.client import AsyncClient
from splitserve.router.server import Router, RouterOptions

from .conftest import StartCluster

PROMPT = list(range(70, 110))
OPTIONS = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True, "logprobs": 1}


async def test_a_stream_goes_on_at_another_router_with_the_same_answer(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    whole = await cluster.client.generate(PROMPT, **OPTIONS)
    options = cluster.router.options
    second = Router(RouterOptions(model=options.model, prefill=options.prefill, decode=options.decode, port=0))
    address = (await second.start()).address
    try:
        async with AsyncClient([cluster.router.address, address]) as client, client.stream(PROMPT, **OPTIONS) as stream:
            first = await anext(stream)
            await next(router for router in (cluster.router, second) if router.dispatcher.num_live).stop()
            result = await stream.result()
        assert first.index == 0
        assert (result.token_ids, result.text) == (whole.token_ids, whole.text)
        assert result.usage.num_output_tokens == 60
        assert [row.token_id for row in result.logprobs] == list(whole.token_ids)
        await cluster.idle()
    finally:
        await second.stop()
