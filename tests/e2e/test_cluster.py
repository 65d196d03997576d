"""Router, prefill and decode workers together, over real gRPC, with a tiny model."""

from __future__ import annotations

import asyncio
import math
import socket
from collections import Counter
from pathlib import Path

import grpc
import grpc.aio
import pytest
from splitserve.client import (
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    FinishReason,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    ProtocolMismatch,
    RetryPolicy,
    SplitserveError,
    Unavailable,
)
from splitserve.core.errors import AddressInUse
from splitserve.decode_worker.server import DecodeServer
from splitserve.engine.options import EngineOptions
from splitserve.engine.runner import CpuRunner
from splitserve.proto import inference_pb2, inference_pb2_grpc
from splitserve.proto.convert import PROTOCOL_VERSION
from splitserve.proto.rpc import from_rpc_error
from splitserve.router.server import Router, RouterOptions
from splitserve.worker.options import WorkerOptions

from .conftest import Cluster, StartCluster

TRANSPORTS = [("shared_memory",), ("grpc",)]


def prompt(number: int, length: int = 40) -> list[int]:
    return [5 + (number * 31 + 7 * i) % 200 for i in range(length)]


@pytest.mark.parametrize("transports", TRANSPORTS, ids=lambda names: names[0])
async def test_split_equals_colocated_and_moves_each_byte_once(
    start_cluster: StartCluster, transports: tuple[str, ...]
) -> None:
    options = {"max_tokens": 16, "temperature": 0.9, "top_k": 20, "seed": 7, "ignore_eos": True}
    prompts = [prompt(number, 3 + 11 * number) for number in range(12)]

    async def serve(cluster: Cluster) -> list:
        results = await asyncio.gather(*(cluster.client.generate(p, **options) for p in prompts))
        await cluster.idle()
        return results

    split = await start_cluster(transports=transports, prefix_cache=False)
    moved = await serve(split)
    stayed = await serve(await start_cluster(prefill=0, decode=0, colocated=1))
    assert [r.token_ids for r in moved] == [r.token_ids for r in stayed]
    assert [r.text for r in moved] == [r.text for r in stayed]
    per_token = split.engines[0].geometry.bytes_per_token
    assert [r.timing.kv_bytes for r in moved] == [len(p) * per_token for p in prompts]
    assert {r.timing.transport for r in moved} == {transports[0]}
    assert {r.timing.transport for r in stayed} == {"none"}
    assert split.host("decode-0").engine.recomputed_prompt_tokens == 0


async def test_forty_requests_land_on_all_four_workers(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(prefill=2, decode=2)
    results = await asyncio.gather(*(cluster.client.generate(prompt(n), max_tokens=8) for n in range(40)))
    await cluster.idle()
    assert all(result.token_ids for result in results)
    places = Counter(place for r in results for place in (r.timing.prefill_worker, r.timing.decode_worker))
    assert set(places) == set(cluster.workers)
    assert min(places.values()) >= 5, places


async def test_the_first_token_does_not_wait_for_the_transfer(start_cluster: StartCluster) -> None:
    """The decode worker is stopped from receiving; the first token arrives all the same."""
    cluster = await start_cluster()
    held = asyncio.Event()
    receiver = cluster.workers["decode-0"].worker.receiver
    receive = receiver.receive

    async def late(*args: object, **options: object) -> object:
        received = await receive(*args, **options)
        await held.wait()
        return received

    receiver.receive = late
    async with cluster.client.stream(prompt(1), max_tokens=4, ignore_eos=True) as stream:
        first = await anext(stream)
        assert (first.index, len(first.token_ids)) == (0, 1)
        held.set()
        result = await stream.result()
    assert len(result.token_ids) == 4
    names = [event.event for event in result.timing.events]
    assert names.index("first_token") < names.index("transfer_finished")
    await cluster.idle()


async def test_the_timeline_adds_up(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    timing = (await cluster.client.generate(prompt(1), max_tokens=8, ignore_eos=True)).timing
    parts = timing.queue_s + timing.prefill_queue_s + timing.prefill_s
    assert 0 < parts <= timing.ttft_s <= timing.e2e_s
    assert 0 < timing.grant_s <= timing.e2e_s  # the prompt does not wait for it
    assert 0 < timing.transfer_s <= timing.e2e_s
    assert 0 < timing.transfer_exposed_s <= timing.e2e_s
    assert timing.ttft_s + timing.decode_s == pytest.approx(timing.e2e_s, abs=0.05)
    offsets = [event.offset_s for event in timing.events]
    assert offsets == sorted(offsets)
    assert [timing.events[0].event, timing.events[-1].event] == ["arrived", "finished"]


# -- bad input: a typed error with a clear message, and nothing leaks --


@pytest.mark.parametrize(
    ("input_", "options", "error", "words"),
    [
        ("", {}, InvalidRequest, "empty"),
        ([], {}, InvalidRequest, "empty"),
        (prompt(1, 3000), {}, PromptTooLong, "max_model_len"),
        ("hello", {"max_tokens": 0}, InvalidRequest, "max_tokens"),
        ("hello", {"max_tokens": 100_000}, PromptTooLong, "max_tokens"),
        ("hello", {"temperature": math.nan}, InvalidRequest, "temperature"),
        ("hello", {"top_p": 0.0}, InvalidRequest, "top_p"),
        ("hello", {"model": "gpt-17"}, ModelNotFound, "gpt-17"),
        ("lone surrogate \ud800", {}, InvalidRequest, "UTF-8"),
        ([1, 10**6], {}, InvalidRequest, "vocabulary"),
        ("hello", {"timeout_s": -1.0}, DeadlineExceeded, "deadline"),
        ("hello", {"stop": ["x"] * 17}, InvalidRequest, "stop"),
    ],
)
async def test_bad_input(
    start_cluster: StartCluster, input_: str | list[int], options: dict, error: type[SplitserveError], words: str
) -> None:
    cluster = await start_cluster()
    with pytest.raises(error, match=words):
        await cluster.client.generate(input_, **options)
    await cluster.idle()


async def test_a_client_of_the_future_is_refused(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(text="hello", protocol_version=PROTOCOL_VERSION + 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request).read()
    assert isinstance(from_rpc_error(caught.value), ProtocolMismatch)


async def test_bytes_that_are_not_utf8_are_refused(start_cluster: StartCluster) -> None:
    """protobuf refuses to build such a message, so it is made by hand: field 2 (text), two bytes."""
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.router.address) as channel:
        generate = channel.unary_stream("/splitserve.v1.Inference/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(b"\x12\x02\xff\xfe").read()
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert "UTF-8" in error.message
    await cluster.idle()


# -- ends that the client makes --


async def test_cancel_before_the_first_token(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(max_step_tokens=16)
    task = asyncio.create_task(cluster.client.generate(prompt(1, 900), max_tokens=4))
    while not cluster.host("prefill-0").num_runs:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await cluster.idle()


async def test_cancel_after_the_first_token(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    async with cluster.client.stream(prompt(1), max_tokens=500, ignore_eos=True) as stream:
        await anext(stream)
        await anext(stream)
    await cluster.idle()


async def test_cancel_by_another_call(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    async with cluster.client.stream(prompt(1), max_tokens=500, ignore_eos=True) as stream:
        await anext(stream)
        assert await cluster.client.cancel(stream.request_id)
        with pytest.raises(Cancelled):
            await stream.result()
    await cluster.idle()
    assert not await cluster.client.cancel(stream.request_id)


async def test_a_client_that_vanishes_is_cleaned_up_after(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    gone = AsyncClient(cluster.router.address, retry=RetryPolicy(max_attempts=1))
    stream = gone.stream(prompt(1), max_tokens=500, ignore_eos=True)
    await anext(stream)
    await gone.close()
    await cluster.idle()


async def test_a_deadline_that_passes_while_decoding(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    with pytest.raises(DeadlineExceeded):
        await cluster.client.generate(prompt(1), max_tokens=1900, ignore_eos=True, timeout_s=0.5)
    await cluster.idle()


async def test_a_stop_string_ends_the_answer_before_it(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    whole = await cluster.client.generate(prompt(3), max_tokens=40, ignore_eos=True)
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = await cluster.client.generate(prompt(3), max_tokens=40, ignore_eos=True, stop=stop)
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.text == whole.text[: whole.text.index(stop)]
    await cluster.idle()


async def test_received_tokens_are_not_sent_again(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    whole = await cluster.client.generate(prompt(2), **options)
    rest = await cluster.client.generate(prompt(2), received_token_ids=whole.token_ids[:8], **options)
    assert rest.token_ids == whole.token_ids[8:]


# -- clusters that cannot serve --


async def test_no_worker_is_a_typed_error_in_time(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(prefill=0, decode=1, router={"no_worker_wait_s": 0.2})
    with pytest.raises(Unavailable, match="worker"):
        await cluster.client.generate(prompt(1))
    assert not await cluster.client.health()


async def test_a_wrong_worker_address_is_told_in_the_status(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    cluster.router.pool.set_workers(
        ["127.0.0.1:1", cluster.host("decode-0").rpc.address], [], cluster.router.dispatcher
    )
    async with asyncio.timeout(60):
        while True:
            views = {view.address: view for view in (await cluster.client.status()).workers}
            if views["127.0.0.1:1"].reason != "not connected yet" and len(views) == 2:
                listed_wrong = views[cluster.host("decode-0").rpc.address]
                if listed_wrong.state == "ready":  # under the role that it has
                    break
            await asyncio.sleep(0.02)
    assert views["127.0.0.1:1"].state == "connecting"
    assert "UNAVAILABLE" in views["127.0.0.1:1"].reason
    assert listed_wrong.role == "decode"


async def test_a_metrics_port_in_use_is_told_by_every_role(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        router = Router(RouterOptions(model=str(tiny), port=0, metrics_port=port))
        with pytest.raises(AddressInUse, match=f"{port}.*--metrics-port"):
            await router.start()
        options = EngineOptions(model=str(tiny), dtype="float32", num_kv_blocks=8, self_check=False)
        worker = DecodeServer(WorkerOptions(engine=options, role="decode", metrics_port=port))
        with pytest.raises(AddressInUse, match=f"{port}.*--metrics-port"):
            await worker.worker.host.start()


async def test_a_failing_step_fails_its_requests_and_not_the_worker(start_cluster: StartCluster) -> None:
    """The model raises once, in the decode worker: the router's next attempt gives the same answer."""
    cluster = await start_cluster()
    wanted = await cluster.client.generate(prompt(4), max_tokens=12, ignore_eos=True)
    runner = cluster.host("decode-0").engine._runner
    assert isinstance(runner, CpuRunner)
    model = runner._model
    calls = 0

    def once(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("injected")

    hook = model.register_forward_pre_hook(once)
    result = await cluster.client.generate(prompt(4), max_tokens=12, ignore_eos=True)
    hook.remove()
    assert result.token_ids == wanted.token_ids
    assert result.timing.attempts == 2
    await cluster.idle()
