"""What a worker holds is listed with who asked for it, page by page, and blocks that do not add up are noticed."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc.aio
import pytest
from splitserve.core.request import Request
from splitserve.proto import worker_pb2, worker_pb2_grpc

from .conftest import WAIT_S, Pair, held_step, until

PROMPT = tuple(3 + (7 * i) % 200 for i in range(40))


def request(request_id: str) -> Request:
    return Request(request_id=request_id, prompt_token_ids=PROMPT, max_tokens=4, timeout_s=60.0)


async def listed(stack: AsyncExitStack, address: str, **page: object) -> worker_pb2.ListHoldingsResponse:
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    return await worker_pb2_grpc.WorkerAdminStub(channel).ListHoldings(worker_pb2.ListHoldingsRequest(**page))


async def test_both_sides_tell_what_they_hold_for_whom(pair: Pair, stack: AsyncExitStack) -> None:
    prefill, decode = pair.prefill.worker.host, pair.decode.worker.host
    with held_step(pair.prefill):
        await pair.prefill_run(request("r"), await pair.grant(request("r")))
        await until(lambda usage: usage.num_running > 0, prefill)
        (source,) = (await listed(stack, prefill.rpc.address)).holdings
        (target,) = (await listed(stack, decode.rpc.address)).holdings
    assert (source.state, target.state) == ("running", "reserved")
    for holding in (source, target):
        assert (holding.request_id, holding.attempt, holding.router_id) == ("r", 1, "test")
        assert holding.num_blocks >= 3
        assert 0 <= holding.age_s < WAIT_S
    await pair.prefill_end.next("first_token")
    await pair.decode_end.next("transfer_done")
    await pair.rest(1)
    await pair.idle()
    answer = await listed(stack, decode.rpc.address)
    assert (len(answer.holdings), answer.num_orphaned_blocks) == (0, 0)
    assert answer.num_cached_blocks > 0


async def test_kv_that_nobody_fetches_shows_what_is_left_of_its_lease(pair: Pair, stack: AsyncExitStack) -> None:
    grant = await pair.grant(request("r"))
    await pair.decode_end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    await until(lambda usage: usage.blocks_granted == 0, pair.decode.worker.host)
    grant.grant_id = "f" * 32  # one that no decode worker will ever fetch
    await pair.prefill_run(request("r"), grant)
    await pair.prefill_end.next("first_token")
    await until(lambda usage: usage.num_held == 1, pair.prefill.worker.host)
    (held,) = (await listed(stack, pair.prefill.worker.host.rpc.address)).holdings
    assert held.state == "held"
    assert 0 < held.lease_left_s <= 30.0


async def test_pages_hold_every_sequence_once(pair: Pair, stack: AsyncExitStack) -> None:
    engine = pair.decode.worker.host.engine
    names = [f"r{number}" for number in range(5)]
    for name in names:
        engine.add(request(name))  # nobody wakes the device, and nobody asked for them
    token, found = "", []
    while True:
        page = await listed(stack, pair.decode.worker.host.rpc.address, page_size=2, page_token=token)
        assert page.num_holdings == 5
        found += page.holdings
        token = page.next_page_token
        if not token:
            break
    assert [holding.sequence_id for holding in found] == names
    assert {holding.router_id for holding in found} == {""}, "what nobody asked for says so"
    for name in names:
        engine.release(name)


async def test_a_lost_block_is_an_orphan_at_once_when_idle(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    engine = pair.decode.worker.host.engine
    engine._scheduler.blocks._free.pop()  # what a bug would do
    assert engine.num_orphaned_blocks() == 1
    await pair.serve(request("r"))
    async with asyncio.timeout(WAIT_S):
        while "unaccounted for" not in caplog.text:
            await asyncio.sleep(0.01)
    engine._scheduler.blocks._free.append(0)
