"""Two routers and one request: the later call has it, on every worker, and the other router is told."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

from splitserve.engine.engine import Engine
from splitserve.proto import worker_pb2
from splitserve.proto.convert import PROTOCOL_VERSION
from splitserve.scheduling.attempts import first_attempt

from .conftest import End, Pair, connect
from .test_roles import alone, request, run_alone  # noqa: F401  alone is a fixture

LONG = 400  # tokens of a request that is still running when the other router comes


async def other_router(pair: Pair, stack: AsyncExitStack) -> Pair:
    """The same workers as another router sees them."""
    ends: list[End] = []
    for server in (pair.prefill, pair.decode):
        end = await connect(stack, server)
        await end.send(hello=worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="other"))
        await end.next("hello")
        ends.append(end)
    return replace(pair, prefill_end=ends[0], decode_end=ends[1])


async def test_a_router_that_takes_over_gets_the_answer_and_the_other_is_told(
    pair: Pair,
    stack: AsyncExitStack,
    alone: Engine,  # noqa: F811
) -> None:
    taker = await other_router(pair, stack)
    first = request(max_tokens=LONG)
    await pair.prefill_run(first, await pair.grant(first))
    await pair.decode_end.next("transfer_done")
    later = request(attempt=first_attempt(1))
    assert await taker.serve(later) == run_alone(alone, later)
    failed = await pair.decode_end.next("failed", "tokens")
    while isinstance(failed, worker_pb2.StepTokens):
        failed = await pair.decode_end.next("failed", "tokens")
    assert (failed.attempt, failed.failure.code) == (1, "superseded")
    await pair.idle()


async def test_a_claim_frees_what_the_other_router_has_and_keeps_it_from_coming_back(
    pair: Pair, stack: AsyncExitStack
) -> None:
    """As a router does that goes on elsewhere: the other one may have the request in its queue."""
    await pair.grant(request())
    taker = await other_router(pair, stack)
    claim = worker_pb2.CancelRun(request_id="r", attempt=first_attempt(1) - 1)
    for end in (taker.decode_end, taker.prefill_end):
        await end.send(cancel=claim)
    assert (await pair.decode_end.next("failed")).failure.code == "superseded"
    await pair.idle()
    await pair.ask_grant(request(attempt=2))
    failed = await pair.decode_end.next("failed")
    assert (failed.attempt, failed.failure.code, failed.failure.newest_call) == (2, "superseded", 1)
    assert failed.failure.newest_age_s > 0
    grant = await taker.grant(request(attempt=first_attempt(1)))  # a claim is no end
    await pair.prefill_run(request(attempt=2), grant)
    assert (await pair.prefill_end.next("failed")).failure.code == "superseded"
    await taker.decode_end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=first_attempt(1)))
    await pair.idle()


async def test_a_call_without_a_number_is_told_how_old_the_one_is_that_has_the_request(
    pair: Pair, stack: AsyncExitStack
) -> None:
    taker = await other_router(pair, stack)
    work = request(max_tokens=LONG)
    await pair.prefill_run(work, await pair.grant(work))
    await pair.decode_end.next("transfer_done")
    await taker.ask_grant(work)
    failed = await taker.decode_end.next("failed")
    assert (failed.failure.code, failed.failure.newest_call) == ("superseded", 0)
    assert failed.failure.newest_age_s > 0
    await pair.decode_end.next("tokens")  # and goes on
    await pair.decode_end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    await pair.idle()


async def test_a_late_cancel_of_the_old_router_does_not_hit_the_new_one(
    pair: Pair,
    stack: AsyncExitStack,
    alone: Engine,  # noqa: F811
) -> None:
    await pair.grant(request())
    taker = await other_router(pair, stack)
    later = request(attempt=first_attempt(1))
    grant = await taker.grant(later)
    await pair.decode_end.next("failed")
    for end in (pair.decode_end, pair.prefill_end):
        await end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    await taker.prefill_run(later, grant)
    first = await taker.prefill_end.next("first_token")
    await taker.decode_end.next("transfer_done")
    assert [first.token_id, *await taker.rest(1)] == run_alone(alone, later)
    await pair.idle()
