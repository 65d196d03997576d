"""Prefill and decode workers over their real gRPC edge, with a tiny model: the order of a request and its ends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from splitserve.core.errors import ProtocolMismatch
from splitserve.core.request import Request, SamplingParams
from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.testing import make_tiny_model
from splitserve.proto import inference_pb2, kv_transfer_pb2, worker_pb2
from splitserve.proto.convert import PROTOCOL_VERSION, request_to_proto
from splitserve.proto.rpc import from_rpc_error

from .conftest import OpenPair, Pair, connect, held_step, until

PROMPT = tuple(3 + (7 * i) % 200 for i in range(100))
TRANSPORTS = [("shared_memory",), ("grpc",), ("gloo",)]


def request(request_id: str = "r", prompt: tuple[int, ...] = PROMPT, **changes: object) -> Request:
    fields = {"max_tokens": 12, "timeout_s": 60.0, **changes}
    return Request(request_id=request_id, prompt_token_ids=prompt, **fields)


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> Engine:
    """One engine that does everything itself: what a split pair must equal."""
    options = EngineOptions(model=str(model_dir), dtype="float32", num_threads=1, num_kv_blocks=64, self_check=False)
    return Engine(load_model(options), options)


def run_alone(engine: Engine, work: Request) -> list[int]:
    engine.add(work)
    tokens = []
    while (output := engine.step()) is not None:
        tokens += [token.token_id for token in output.tokens]
    return tokens


@pytest.mark.parametrize("transports", TRANSPORTS, ids=lambda names: names[0])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=5)])
async def test_split_tokens_equal_one_engine(
    open_pair: OpenPair, alone: Engine, transports: tuple[str, ...], sampling: SamplingParams
) -> None:
    pair = await open_pair(transports=transports)
    work = request(sampling=sampling)
    tokens = await pair.serve(work)
    assert tokens == run_alone(alone, work)
    assert len(set(tokens)) > 3, "a constant answer would prove nothing"
    await pair.idle()
    assert pair.decode.worker.host.engine.recomputed_prompt_tokens == 0


async def test_kv_bytes_equal_the_layouts_formula_and_a_prefix_is_not_sent_twice(pair: Pair) -> None:
    per_token = pair.prefill_info.kv_bytes_per_token
    moved = []
    for number in (1, 2):
        work = request(f"r{number}")
        grant = await pair.grant(work)
        await pair.prefill_run(work, grant)
        await pair.prefill_end.next("first_token")
        done = await pair.decode_end.next("transfer_done")
        moved.append((grant.num_cached_tokens, done.num_bytes))
        await pair.rest(1)
    cached = moved[1][0]
    assert moved[0] == (0, len(PROMPT) * per_token)
    assert 0 < cached < len(PROMPT)
    assert cached % 16 == 0
    assert moved[1][1] == (len(PROMPT) - cached) * per_token


async def test_a_resumed_request_goes_on_with_the_same_tokens(pair: Pair) -> None:
    sampling = SamplingParams(temperature=1.0, seed=11)
    whole = await pair.serve(request("whole", sampling=sampling))
    half = tuple(whole[:5])
    work = request("half", sampling=sampling, output_token_ids=half)
    await pair.prefill_run(work, await pair.grant(work))
    first = await pair.prefill_end.next("first_token")
    assert first.index == 5
    await pair.decode_end.next("transfer_done")
    assert [*half, first.token_id, *await pair.rest(6)] == whole


@pytest.mark.parametrize("transports", TRANSPORTS, ids=lambda names: names[0])
@pytest.mark.parametrize("when", ["before its first token", "after it"])
async def test_a_grant_may_follow_the_prompt(
    open_pair: OpenPair, alone: Engine, transports: tuple[str, ...], when: str
) -> None:
    pair = await open_pair(transports=transports)
    work = request()
    if when == "after it":
        await pair.prefill_run(work)
        first = await pair.prefill_end.next("first_token")
        await asyncio.sleep(0.2)
        await pair.prefill_end.send(grant=await pair.grant(work))
    else:
        grant = await pair.grant(work)
        with held_step(pair.prefill):
            await pair.prefill_run(work)
            await pair.prefill_end.send(grant=grant)
        first = await pair.prefill_end.next("first_token")
    done = await pair.decode_end.next("transfer_done")
    if when == "after it":
        assert done.transfer_exposed_s > 0.2  # counted from the end of the prompt, not from the grant
    assert [first.token_id, *await pair.rest(1)] == run_alone(alone, work)
    await pair.idle()


@pytest.mark.parametrize("end", ["cancelled", "final", "deadline", "of another boot", "router gone"])
async def test_a_prompt_whose_grant_does_not_come_is_freed(pair: Pair, end: str) -> None:
    work = request(max_tokens=1 if end == "final" else 12, timeout_s=1.0 if end == "deadline" else 60.0)
    await pair.prefill_run(work)
    await pair.prefill_end.next("first_token")
    if end == "cancelled":
        await pair.prefill_end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    elif end == "deadline":
        assert (await pair.prefill_end.next("failed")).failure.code == "deadline_exceeded"
    elif end == "of another boot":
        await pair.prefill_end.send(grant=await pair.grant(work, prefill_boot_id="0" * 16))
        assert (await pair.prefill_end.next("failed")).failure.code == "stale"
        assert (await pair.decode_end.next("failed")).request_id == "r"
    elif end == "router gone":
        pair.prefill_end.call.cancel()
    await pair.idle()


async def test_a_final_first_token_before_its_grant_leaves_nothing(pair: Pair) -> None:
    """The decode worker has asked for KV that is gone; the router's cancel ends that, not a time-out."""
    work = request(max_tokens=1)
    await pair.prefill_run(work)
    assert (await pair.prefill_end.next("first_token")).ungranted
    await pair.prefill_end.send(grant=await pair.grant(work))
    await pair.decode_end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    async with asyncio.timeout(3):  # a Fetch whose request does not come is given up after 10 s
        await pair.idle()


async def test_a_grant_that_comes_again_or_for_nobody_changes_nothing(pair: Pair, alone: Engine) -> None:
    work = request()
    grant = await pair.grant(work)
    for told in (grant, kv_transfer_pb2.Grant(request_id="nobody", attempt=1)):
        await pair.prefill_end.send(grant=told)
    await pair.prefill_run(work)
    for _ in range(2):
        await pair.prefill_end.send(grant=grant)
    first = await pair.prefill_end.next("first_token")
    await pair.decode_end.next("transfer_done")
    assert [first.token_id, *await pair.rest(1)] == run_alone(alone, work)
    await pair.idle()
    assert (
        pair.prefill.worker.host.registry.get_sample_value("splitserve_stale_messages_total", {"role": "prefill"}) == 3
    )


async def test_a_final_first_token_ends_the_request_and_frees_both_sides(pair: Pair) -> None:
    work = request(max_tokens=1)
    await pair.prefill_run(work, await pair.grant(work))
    first = await pair.prefill_end.next("first_token")
    assert (first.finish_reason, first.ungranted) == (inference_pb2.FINISH_REASON_LENGTH, False)
    await pair.idle()


async def test_a_prefill_before_the_fetch_and_a_fetch_before_the_prefill_both_work(pair: Pair) -> None:
    """D fetches as soon as it grants, so here P parks the fetch; the sender's own tests cover the other order."""
    work = request()
    grant = await pair.grant(work)
    await until(lambda usage: usage.blocks_granted > 0, pair.decode.worker.host)
    await pair.prefill_run(work, grant)
    await pair.prefill_end.next("first_token")
    await pair.decode_end.next("transfer_done")
    assert len(await pair.rest(1)) == 11


async def test_cancel_after_the_grant_frees_both_sides(pair: Pair) -> None:
    work = request()
    await pair.grant(work)
    await pair.decode_end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    await pair.idle()


async def test_cancel_while_decoding_frees_both_sides(pair: Pair) -> None:
    work = request(max_tokens=400)
    await pair.prefill_run(work, await pair.grant(work))
    await pair.decode_end.next("transfer_done")
    await pair.decode_end.next("tokens")
    await pair.decode_end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    await until(lambda usage: usage.blocks_live == 0, pair.decode.worker.host)
    await pair.idle()


async def test_cancel_in_the_prefill_worker_fails_the_transfer_and_frees_both_sides(pair: Pair) -> None:
    work = request(prompt=PROMPT * 5, max_tokens=2)
    await pair.prefill_run(work, await pair.grant(work))
    await pair.prefill_end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    failed = await pair.decode_end.next("failed")
    assert failed.failure.code == "cancelled"
    await pair.idle()


async def test_a_router_that_goes_away_frees_both_sides(pair: Pair) -> None:
    work = request(max_tokens=400)
    await pair.prefill_run(work, await pair.grant(work))
    await pair.decode_end.next("transfer_done")
    pair.decode_end.call.cancel()
    pair.prefill_end.call.cancel()
    await pair.idle()


async def test_a_deadline_ends_a_grant_that_nobody_uses(pair: Pair) -> None:
    await pair.grant(request(timeout_s=0.3))
    failed = await pair.decode_end.next("failed")
    assert failed.failure.code == "deadline_exceeded"
    await pair.idle()


async def test_a_deadline_in_the_past_costs_nothing(pair: Pair) -> None:
    await pair.ask_grant(request(timeout_s=0.0))
    failed = await pair.decode_end.next("failed")
    assert failed.failure.code == "deadline_exceeded"
    await pair.idle()


async def test_no_blocks_means_a_retryable_refusal_that_takes_none(open_pair: OpenPair) -> None:
    pair = await open_pair(num_decode_blocks=20)
    await pair.grant(request("first"))
    before = pair.usages()[1]
    await pair.ask_grant(request("second", prompt=PROMPT[::-1] * 2))
    failed = await pair.decode_end.next("failed")
    assert (failed.request_id, failed.failure.code) == ("second", "overloaded")
    assert pair.usages()[1] == before


async def test_a_newer_attempt_replaces_the_older_one(pair: Pair, alone: Engine) -> None:
    await pair.grant(request())
    second = request(attempt=2)
    tokens = await pair.serve(second)
    assert tokens == run_alone(alone, second)
    await pair.idle()


async def test_a_repeated_attempt_is_counted_and_dropped(pair: Pair) -> None:
    work = request()
    grant = await pair.grant(work)
    await pair.ask_grant(work)
    await pair.prefill_run(work, grant)
    await pair.prefill_run(work, grant)
    await pair.prefill_end.next("first_token")
    await pair.decode_end.next("transfer_done")
    assert len(await pair.rest(1)) == 11
    await pair.idle()
    for server in (pair.prefill, pair.decode):
        stale = server.worker.host.registry.get_sample_value(
            "splitserve_stale_messages_total", {"role": server.worker.host.options.role}
        )
        assert stale == 1


async def test_a_wrong_kv_address_is_a_typed_failure(pair: Pair) -> None:
    await pair.grant(request(), kv_address="127.0.0.1:1")
    failed = await pair.decode_end.next("failed")
    assert failed.failure.code in ("transfer_failed", "unavailable", "worker_lost")
    await pair.idle()


async def test_another_boot_of_the_prefill_worker_is_fenced(pair: Pair) -> None:
    work = request()
    grant = await pair.grant(work, prefill_boot_id="0" * 16)
    await pair.prefill_run(work, grant)
    assert (await pair.prefill_end.next("failed")).failure.code == "stale"
    assert (await pair.decode_end.next("failed")).request_id == "r"
    await pair.idle()


async def test_workers_of_different_models_refuse_to_pair(open_pair: OpenPair, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path / "other", seed=1)
    pair = await open_pair(decode_model=tmp_path / "other")
    work = request()
    grant = await pair.grant(work)
    await pair.prefill_run(work, grant)
    assert (await pair.prefill_end.next("failed")).failure.code == "geometry_mismatch"
    assert (await pair.decode_end.next("failed")).failure.code == "geometry_mismatch"
    await pair.idle()


async def test_coded_kv_is_smaller_and_serves_only_requests_of_its_codec(open_pair: OpenPair) -> None:
    pair = await open_pair(transports=("grpc",), kv_codec="int8")
    plain = pair.prefill_info.kv_bytes_per_token * len(PROMPT)
    cached = []
    for number in (1, 2):
        work = request(f"r{number}")
        grant = await pair.grant(work)
        assert grant.codec == "int8"
        await pair.prefill_run(work, grant)
        await pair.prefill_end.next("first_token")
        done = await pair.decode_end.next("transfer_done")
        await pair.rest(1)
        cached.append(grant.num_cached_tokens)
        assert done.num_bytes < plain * 0.5
    assert cached[0] == 0
    assert cached[1] > 0  # the same codec: reused
    await pair.decode_end.send(run=worker_pb2.RunLocal(request=request_to_proto(request("local"), 60.0)))
    await pair.rest(0)
    assert pair.decode.worker.host.engine.cached_tokens == 0  # a local prefill is never built on coded KV
    await pair.idle()


async def test_a_pair_of_two_kv_dtypes_and_block_sizes_serves(open_pair: OpenPair) -> None:
    pair = await open_pair(decode_engine={"dtype": "bfloat16", "block_size": 32})
    work = request()
    grant = await pair.grant(work)
    assert grant.wire_dtype == "bfloat16"
    await pair.prefill_run(work, grant)
    await pair.prefill_end.next("first_token")
    done = await pair.decode_end.next("transfer_done")
    assert done.num_bytes * 2 == pair.prefill_info.kv_bytes_per_token * len(PROMPT)
    assert len(await pair.rest(1)) == work.max_tokens - 1
    await pair.idle()


@pytest.mark.parametrize("tokens", [(), (10**6,)], ids=["empty", "outside the vocabulary"])
async def test_bad_prompts_are_refused_by_the_worker_too(pair: Pair, tokens: tuple[int, ...]) -> None:
    await pair.ask_grant(request(prompt=tokens))
    assert (await pair.decode_end.next("failed")).failure.code == "invalid_request"
    await pair.idle()


async def test_ranks_that_cannot_share_the_heads_are_refused_and_leave_nothing(pair: Pair) -> None:
    await pair.ask_grant(request(), kv_rank_addresses=["127.0.0.1:1", "127.0.0.1:2"])
    assert (await pair.decode_end.next("failed")).failure.code == "geometry_mismatch"
    await pair.idle()
    assert len(await pair.serve(request("next"))) == 12  # the session lives on
    await pair.idle()


async def test_colocated_runs_equal_split_ones_on_the_same_worker(pair: Pair, alone: Engine) -> None:
    """RunLocal and a hand-over side by side: same code, same tokens."""
    local = request("local", sampling=SamplingParams(temperature=0.8, seed=3))
    run = worker_pb2.RunLocal(request=request_to_proto(local, 60.0))
    await pair.decode_end.send(run=run)
    tokens = await pair.rest(0)
    assert tokens == run_alone(alone, replace(local, request_id="again"))


async def test_a_protocol_of_the_future_is_refused_with_the_reason(pair: Pair, stack: AsyncExitStack) -> None:
    end = await connect(stack, pair.decode)
    await end.send(hello=worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION + 1, router_id="new"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end.call.read()
    error = from_rpc_error(caught.value)
    assert isinstance(error, ProtocolMismatch)
    assert f"version {PROTOCOL_VERSION + 1}" in error.message


async def test_a_session_must_open_with_a_hello(pair: Pair, stack: AsyncExitStack) -> None:
    end = await connect(stack, pair.prefill)
    await end.send(cancel=worker_pb2.CancelRun(request_id="r", attempt=1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end.call.read()
    assert isinstance(from_rpc_error(caught.value), ProtocolMismatch)


async def test_an_answer_that_is_complete_already_costs_no_step(pair: Pair) -> None:
    done = request("done", max_tokens=3, output_token_ids=(5, 6, 7))
    await pair.ask_grant(done)
    refused = [await pair.decode_end.next("failed")]
    await pair.decode_end.send(run=worker_pb2.RunLocal(request=request_to_proto(done, 60.0)))
    refused.append(await pair.decode_end.next("failed"))
    await pair.prefill_run(done, kv_transfer_pb2.Grant())
    refused.append(await pair.prefill_end.next("failed"))
    assert {(failed.failure.code, failed.failure.field) for failed in refused} == {
        ("invalid_request", "output_token_ids")
    }
    await pair.idle()
