"""Workers that go out of service: what runs ends or is handed over, nothing new begins, routers hear of it first."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc.aio
from splitserve.core.request import Request, SamplingParams
from splitserve.decode_worker.server import DecodeServer
from splitserve.prefill_worker.server import PrefillServer
from splitserve.proto import worker_pb2, worker_pb2_grpc

from .conftest import Pair, held_step, until

PROMPT = tuple(3 + (7 * i) % 200 for i in range(100))
SAMPLING = SamplingParams(temperature=1.0, seed=11)


def request(request_id: str = "r", **changes: object) -> Request:
    fields = {"max_tokens": 60, "timeout_s": 60.0, "sampling": SAMPLING, **changes}
    return Request(request_id=request_id, prompt_token_ids=PROMPT, **fields)


async def admin(stack: AsyncExitStack, server: PrefillServer | DecodeServer) -> worker_pb2_grpc.WorkerAdminStub:
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.worker.host.rpc.address))
    return worker_pb2_grpc.WorkerAdminStub(channel)


async def test_drain_refuses_new_work_and_waits_for_the_old(pair: Pair, stack: AsyncExitStack) -> None:
    await pair.prefill_run(request(), await pair.grant(request()))
    await pair.decode_end.next("transfer_done")
    drain = (await admin(stack, pair.decode)).Drain(worker_pb2.DrainRequest(timeout_s=30.0))
    assert len(await pair.rest(1)) == 59
    drained = await drain
    assert (drained.num_left, drained.num_handed_over) == (0, 0)
    await pair.ask_grant(request("late"))
    assert (await pair.decode_end.next("failed")).failure.code == "draining"


async def test_what_the_grace_period_is_too_short_for_is_handed_over_and_goes_on_with_the_same_tokens(
    pair: Pair, stack: AsyncExitStack
) -> None:
    whole = await pair.serve(request("whole"))
    await pair.prefill_run(request(), await pair.grant(request()))
    given = [(await pair.prefill_end.next("first_token")).token_id]
    await pair.decode_end.next("transfer_done")
    (first,) = (await pair.decode_end.next("tokens")).sequences
    given += first.token_ids
    stub = await admin(stack, pair.decode)
    drain = stub.Drain(worker_pb2.DrainRequest(timeout_s=0.0))
    was_told = False
    while True:
        message = await asyncio.wait_for(pair.decode_end.call.read(), 20.0)
        match message.WhichOneof("message"):
            case "status":
                was_told = was_told or message.status.draining
            case "tokens":
                given += message.tokens.sequences[0].token_ids
            case "failed":
                break
    assert message.failed.failure.code == "draining"
    assert was_told, "the router must know that the worker drains before it looks for another one"
    drained = await drain
    assert (drained.num_left, drained.num_handed_over) == (0, 1)
    assert len(given) < len(whole)
    await pair.idle()

    await stub.Undrain(worker_pb2.UndrainRequest())
    rest = request("rest", output_token_ids=tuple(given))
    await pair.prefill_run(rest, await pair.grant(rest))
    token = (await pair.prefill_end.next("first_token")).token_id
    await pair.decode_end.next("transfer_done")
    assert [*given, token, *await pair.rest(len(given) + 1)] == whole


async def test_a_prefill_worker_waits_until_its_kv_is_fetched(pair: Pair, stack: AsyncExitStack) -> None:
    grant = await pair.grant(request())
    await pair.prefill_run(request(), grant)
    await until(lambda usage: usage.blocks_live > 0, pair.prefill.worker.host)
    drained = await (await admin(stack, pair.prefill)).Drain(worker_pb2.DrainRequest(timeout_s=30.0))
    assert (drained.num_left, drained.num_handed_over) == (0, 0)
    usage, _ = pair.usages()
    assert usage.blocks_live == usage.num_held == 0
    await pair.prefill_end.next("first_token")
    await pair.decode_end.next("transfer_done")
    assert len(await pair.rest(1)) == 59


async def test_a_prompt_is_handed_over_by_both_sides(pair: Pair, stack: AsyncExitStack) -> None:
    """Its KV will never come: the decode worker, too, ends the attempt as one that did not fail."""
    with held_step(pair.prefill):
        await pair.prefill_run(request(), await pair.grant(request()))
        await until(lambda usage: usage.num_running > 0, pair.prefill.worker.host)
        drained = await (await admin(stack, pair.prefill)).Drain(worker_pb2.DrainRequest(timeout_s=0.0))
        assert (drained.num_left, drained.num_handed_over) == (0, 1)
    assert (await pair.prefill_end.next("failed")).failure.code == "draining"
    assert (await pair.decode_end.next("failed")).failure.code == "draining"
    await pair.idle()


async def test_a_worker_that_stops_ends_its_sessions_in_order(pair: Pair) -> None:
    await pair.decode.worker.stop()
    while (message := await asyncio.wait_for(pair.decode_end.call.read(), 20.0)) is not grpc.aio.EOF:
        assert message.WhichOneof("message") == "status"
    assert await pair.decode_end.call.code() is grpc.StatusCode.OK
