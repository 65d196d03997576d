"""Both clients against a real gRPC router that each test scripts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from splitserve.client import (
    AsyncClient,
    Cancelled,
    Client,
    ConfigError,
    DeadlineExceeded,
    EngineFailed,
    FinishReason,
    GenerationResult,
    InvalidRequest,
    Message,
    Overloaded,
    RetryPolicy,
    SplitserveError,
    Unavailable,
    WorkerLost,
)
from splitserve.client.routers import Rotation
from splitserve.client.testing import ScriptedRouter, count_up, finished, started, token
from splitserve.core.errors import BY_CODE
from splitserve.core.state import ClusterState, write_state
from splitserve.proto import inference_pb2 as pb

Generate = Callable[..., GenerationResult]
NO_RETRY = RetryPolicy(max_attempts=1)
FAST_RETRY = RetryPolicy(max_attempts=3, initial_backoff_s=0.001)


def _generate(address: str | list[str], prompt: Any, retry: RetryPolicy, **options: Any) -> GenerationResult:
    with Client(address, retry=retry) as client:
        return client.generate(prompt, **options)


def _generate_async(address: str | list[str], prompt: Any, retry: RetryPolicy, **options: Any) -> GenerationResult:
    client = AsyncClient(address, retry=retry)  # outside of an event loop on purpose

    async def run() -> GenerationResult:
        async with client:
            return await client.generate(prompt, **options)

    return asyncio.run(run())


@pytest.fixture(params=[_generate, _generate_async], ids=["sync", "async"])
def generate(request: pytest.FixtureRequest) -> Generate:
    return request.param


async def hang_after_two_tokens(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield started("r-hang")
    yield token(0)
    yield token(1)
    await asyncio.Event().wait()


def test_a_finished_answer_holds_everything(generate: Generate) -> None:
    with ScriptedRouter() as router:
        result = generate(router.address, "three short words", NO_RETRY, max_tokens=5, seed=3)
    assert result.text == "0 1 2 3 4 "
    assert result.token_ids == (0, 1, 2, 3, 4)
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.request_id, result.model, result.seed) == ("r-1", "tiny", 3)
    assert (result.usage.num_prompt_tokens, result.usage.num_output_tokens) == (3, 5)
    assert result.timing.attempts == 1
    assert len(result.token_times_s) == 5
    assert result.ttft_s is not None
    assert 0 < result.ttft_s <= result.e2e_s
    assert result.tpot_s == pytest.approx((result.e2e_s - result.ttft_s) / 4)
    assert sum(result.itl_s) == pytest.approx(result.token_times_s[-1] - result.ttft_s)


def test_a_resumed_answer_goes_on_after_what_was_received(generate: Generate) -> None:
    with ScriptedRouter() as router:
        result = generate(router.address, "a", NO_RETRY, max_tokens=4, received_token_ids=[0, 1])
    assert result.token_ids == (2, 3)
    assert result.usage.num_output_tokens == 4


def test_every_typed_error_arrives_as_itself(generate: Generate) -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise BY_CODE[request.text]("what went wrong", retry_after_s=1.5, field="prompt")
        yield

    with ScriptedRouter(fail) as router:
        for code, kind in BY_CODE.items():
            with pytest.raises(SplitserveError, match="what went wrong") as caught:
                generate(router.address, code, NO_RETRY)
            assert (type(caught.value), caught.value.retry_after_s, caught.value.field) == (kind, 1.5, "prompt")


@pytest.mark.parametrize(
    ("error", "num_requests"),
    [(Overloaded("full", retry_after_s=0.001), 3), (WorkerLost("gone"), 3), (InvalidRequest("bad"), 1)],
)
def test_only_retryable_errors_are_retried(generate: Generate, error: SplitserveError, num_requests: int) -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        raise error

    with ScriptedRouter(fail) as router:
        with pytest.raises(type(error)):
            generate(router.address, "a", FAST_RETRY)
        assert len(router.requests) == num_requests


def test_a_retry_that_succeeds_is_an_ordinary_answer(generate: Generate) -> None:
    async def fail_twice(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started("r-failed")
        if len(router.requests) < 3:
            raise Unavailable("no worker is ready")
        async for message in count_up(request):
            yield message

    with ScriptedRouter(fail_twice) as router:
        result = generate(router.address, "a", FAST_RETRY, idempotency_key="key-1")
        assert (result.request_id, result.token_ids) == ("r-1", (0, 1, 2, 3))
        assert [(request.idempotency_key, request.call) for request in router.requests] == [
            ("key-1", 0),
            ("key-1", 1),
            ("key-1", 2),
        ]


def test_a_stream_that_breaks_goes_on_after_the_tokens_that_came(generate: Generate) -> None:
    """One token an attempt: progress is no failure, however many attempts it takes."""

    async def one_token(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        index = len(request.received_token_ids)
        yield started(seed=9)
        yield token(index)
        if index < 5:
            raise EngineFailed("the step failed")
        yield finished(num_output_tokens=6)

    with ScriptedRouter(one_token) as router:
        result = generate(router.address, "a", FAST_RETRY, idempotency_key="key")
        assert (result.token_ids, result.text) == ((0, 1, 2, 3, 4, 5), "0 1 2 3 4 5 ")
        assert [list(request.received_token_ids) for request in router.requests] == [list(range(n)) for n in range(6)]
        assert [request.sampling.seed for request in router.requests[1:]] == [9] * 5
        assert [(request.idempotency_key, request.call) for request in router.requests[:3]] == [
            ("key", 0),
            ("key", 1),
            ("key", 2),
        ]


def test_a_stream_that_breaks_without_progress_fails(generate: Generate) -> None:
    async def fail_late(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        if not request.received_token_ids:
            yield token(0)
        raise EngineFailed("the step failed")

    with ScriptedRouter(fail_late) as router:
        with pytest.raises(EngineFailed):
            generate(router.address, "a", FAST_RETRY)
        assert len(router.requests) == 1 + 2


def test_the_tail_of_an_answer_is_taken_once(generate: Generate) -> None:
    async def lose_the_end(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        if not request.received_token_ids:
            yield token(0)
        yield pb.GenerateResponse(tokens=pb.Tokens(index=1, text="tail"))
        if not request.received_token_ids:
            raise WorkerLost("the last message is lost")
        yield finished(num_output_tokens=1)

    with ScriptedRouter(lose_the_end) as router:
        assert generate(router.address, "a", FAST_RETRY).text == "0 tail"


def test_another_router_stands_in_for_one_that_dies_in_the_middle(generate: Generate) -> None:
    dying: list[ScriptedRouter] = []

    async def die(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield token(0)
        yield token(1)
        threading.Thread(target=dying[0].stop).start()
        await asyncio.Event().wait()

    with ScriptedRouter(die) as first, ScriptedRouter() as second:
        dying.append(first)
        for _ in range(20):  # until the one that dies begins
            if not first.requests:
                assert generate([first.address, second.address], "a", FAST_RETRY).token_ids == (0, 1, 2, 3)
        assert len(first.requests) == 1
        assert [0, 1] in [list(request.received_token_ids) for request in second.requests]


def test_calls_are_shared_out_among_routers() -> None:
    with ScriptedRouter() as first, ScriptedRouter() as second, Client([first.address, second.address]) as client:
        for _ in range(10):
            client.generate("a")
        assert (len(first.requests), len(second.requests)) == (5, 5)
        second.stop()
        for _ in range(4):
            client.generate("a")
        assert len(first.requests) == 9


def test_a_router_that_fails_rests_and_comes_back() -> None:
    rotation = Rotation(["a:1", "b:1"])
    assert rotation.failed("a:1") is True
    assert {rotation.pick() for _ in range(4)} == {"b:1"}
    assert rotation.failed("b:1") is False
    rotation.answered("a:1")
    assert {rotation.pick() for _ in range(4)} == {"a:1"}


def test_a_router_that_has_been_gone_for_long_only_rests() -> None:
    rotation = Rotation(["a:1"])
    for _ in range(3_000):
        assert rotation.failed("a:1") is False
    assert rotation.pick() == "a:1"


async def test_a_request_is_cancelled_though_another_router_is_gone() -> None:
    with ScriptedRouter() as gone, ScriptedRouter() as router:
        addresses = [gone.address, router.address]
        gone.stop()
        with Client(addresses, retry=NO_RETRY) as client:
            assert await asyncio.to_thread(client.cancel, "r-1") is True
            with pytest.raises(Unavailable):  # it may have been there
                await asyncio.to_thread(client.cancel, "r-2")
        async with AsyncClient(addresses, retry=NO_RETRY) as other:
            assert await other.cancel("r-1") is True
            with pytest.raises(Unavailable):
                await other.cancel("r-2")
        assert router.cancelled_ids == ["r-1", "r-2"] * 2


def test_a_batch_is_bounded_and_in_order() -> None:
    running, most = 0, 0

    async def count(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        try:
            if request.text == "bad":
                raise InvalidRequest("bad")
            yield started(request_id=request.text)
            yield finished()
        finally:
            running -= 1

    prompts = [str(number) for number in range(20)]
    with ScriptedRouter(count) as router, Client(router.address) as client:
        assert [result.request_id for result in client.batch(prompts, concurrency=4)] == prompts
        assert 1 < most <= 4
        with_error = client.batch(["1", "bad", "2"], return_errors=True)
        assert [type(row) for row in with_error] == [GenerationResult, InvalidRequest, GenerationResult]
        with pytest.raises(InvalidRequest):
            client.batch(["1", "bad", "2"])
        with pytest.raises(InvalidRequest, match="concurrency"):
            client.batch(prompts, concurrency=0)


async def test_an_async_batch_is_bounded_and_in_order() -> None:
    prompts = [f"{number} words" for number in range(20)]
    with ScriptedRouter() as router:
        async with AsyncClient(router.address) as client:
            results = await client.batch(prompts, concurrency=3, max_tokens=2)
    assert [result.token_ids for result in results] == [(0, 1)] * 20
    assert sorted(request.text for request in router.requests) == sorted(prompts)


def test_a_retry_that_would_outlast_the_deadline_is_not_waited_for(generate: Generate) -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise Overloaded("full", retry_after_s=60.0)
        yield

    with ScriptedRouter(fail) as router:
        before_s = time.monotonic()
        with pytest.raises(Overloaded) as caught:
            generate(router.address, "a", FAST_RETRY, timeout_s=20.0)
        assert time.monotonic() - before_s < 10
        assert caught.value.retry_after_s == 60.0


def test_backoff_grows_is_bounded_and_never_undercuts_the_server() -> None:
    policy = RetryPolicy(max_attempts=10, initial_backoff_s=0.1, max_backoff_s=1.0)
    for attempt in range(1, 10):
        ceiling_s = min(1.0, 0.1 * 2 ** (attempt - 1))
        delay_s = policy.delay_s(attempt, Unavailable("x"))
        assert delay_s is not None
        assert ceiling_s / 2 <= delay_s <= ceiling_s
        later_s = policy.delay_s(attempt, Overloaded("x", retry_after_s=3.0))
        assert later_s is not None
        assert 3.0 < later_s <= 3.0 + ceiling_s
    assert policy.delay_s(10, Unavailable("x")) is None
    assert policy.delay_s(1, InvalidRequest("x")) is None


def test_the_deadline_ends_the_call_on_both_sides(generate: Generate) -> None:
    with ScriptedRouter(hang_after_two_tokens) as router:
        with pytest.raises(DeadlineExceeded, match=r"no end within timeout_s 0\.3"):
            generate(router.address, "a", FAST_RETRY, timeout_s=0.3)
        assert router.freed.acquire(timeout=30)


@pytest.mark.parametrize(
    ("timeout_s", "kind"), [(0.0, DeadlineExceeded), (-1.0, DeadlineExceeded), (float("nan"), InvalidRequest)]
)
def test_a_deadline_in_the_past_sends_nothing(generate: Generate, timeout_s: float, kind: type[Exception]) -> None:
    with ScriptedRouter() as router:
        with pytest.raises(kind, match="timeout_s"):
            generate(router.address, "a", FAST_RETRY, timeout_s=timeout_s)
        assert router.requests == []


@pytest.mark.parametrize("timeout_s", [1e10, float("inf")])
def test_a_deadline_too_far_away_for_grpc_has_not_passed(generate: Generate, timeout_s: float) -> None:
    with ScriptedRouter() as router:
        assert generate(router.address, "a", NO_RETRY, max_tokens=2, timeout_s=timeout_s).token_ids == (0, 1)


def test_an_unreachable_router_is_named(generate: Generate) -> None:
    with ScriptedRouter() as router:
        address = router.address
    with pytest.raises(Unavailable, match=f"no router answers at {address} .*splitserve status"):
        generate(address, "a", FAST_RETRY)


def test_a_router_that_dies_in_the_middle_is_a_typed_error(generate: Generate) -> None:
    async def die(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield token(0)
        threading.Thread(target=router.stop).start()
        await asyncio.Event().wait()

    with ScriptedRouter(die) as router, pytest.raises((Unavailable, Cancelled)):
        generate(router.address, "a", NO_RETRY)


def test_an_answer_cut_short_is_never_a_result(generate: Generate) -> None:
    async def cut(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield token(0)

    with ScriptedRouter(cut) as router, pytest.raises(Unavailable, match="in the middle of the answer"):
        generate(router.address, "a", NO_RETRY)


def test_a_missing_token_is_never_glossed_over(generate: Generate) -> None:
    async def skip(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield token(0)
        yield token(2)
        yield finished()

    with ScriptedRouter(skip) as router, pytest.raises(SplitserveError, match="token 2 where 1 was due"):
        generate(router.address, "a", NO_RETRY)


def test_leaving_the_block_frees_the_request() -> None:
    with ScriptedRouter(hang_after_two_tokens) as router, Client(router.address) as client:
        with client.stream("a") as stream:
            assert next(stream).token_ids == (0,)
            assert stream.request_id == "r-hang"
            assert not router.freed.acquire(blocking=False)
        assert router.freed.acquire(timeout=30)
        with pytest.raises(Cancelled):
            next(stream)


async def test_leaving_the_async_block_frees_the_request() -> None:
    with ScriptedRouter(hang_after_two_tokens) as router:
        async with AsyncClient(router.address) as client:
            async with client.stream("a") as stream:
                assert (await anext(stream)).token_ids == (0,)
                assert stream.request_id == "r-hang"
            assert await asyncio.to_thread(router.freed.acquire, timeout=30)
            with pytest.raises(Cancelled):
                await anext(stream)


def test_closing_from_another_thread_ends_the_reading() -> None:
    with ScriptedRouter(hang_after_two_tokens) as router, Client(router.address) as client:
        stream = client.stream("a")
        assert [next(stream).index, next(stream).index] == [0, 1]
        closer = threading.Timer(0.05, stream.close)
        closer.start()
        with pytest.raises(Cancelled):
            next(stream)
        closer.join()
        assert router.freed.acquire(timeout=30)


async def test_closing_from_another_task_ends_the_reading() -> None:
    with ScriptedRouter(hang_after_two_tokens) as router:
        async with AsyncClient(router.address) as client:
            stream = client.stream("a")
            await anext(stream)
            await anext(stream)
            reading = asyncio.ensure_future(anext(stream))
            asyncio.get_running_loop().call_later(0.05, asyncio.ensure_future, stream.aclose())
            with pytest.raises(Cancelled):
                await reading
            assert await asyncio.to_thread(router.freed.acquire, timeout=30)


async def test_cancelling_the_task_frees_the_request() -> None:
    with ScriptedRouter(hang_after_two_tokens) as router:
        async with AsyncClient(router.address) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate("a"), timeout=0.2)
            assert await asyncio.to_thread(router.freed.acquire, timeout=30)


def test_chunks_arrive_while_the_answer_is_being_made() -> None:
    may_go_on = threading.Event()

    async def wait_for_reader(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield token(0)
        await asyncio.to_thread(may_go_on.wait, 5)
        yield token(1)
        yield finished()

    with ScriptedRouter(wait_for_reader) as router, Client(router.address) as client, client.stream("a") as stream:
        chunks = [next(stream)]
        may_go_on.set()
        chunks += stream
        assert [chunk.text for chunk in chunks] == ["0 ", "1 "]
        assert 0 < chunks[0].at_s < chunks[1].at_s
        assert stream.result().text == "0 1 "


def test_the_other_calls() -> None:
    with ScriptedRouter() as router, Client(router.address) as client:
        assert [model.name for model in client.models()] == ["tiny"]
        assert client.tokenize("two words").tokens == ("two", "words")
        assert client.tokenize([Message(role="user", content="hi")]).token_ids == (0,)
        assert (client.cancel("r-1"), client.cancel("r-2")) == (True, False)
        assert client.status().workers[0].role == "decode"
        assert client.chat([{"role": "user", "content": "hi"}]).token_ids == (0, 1, 2, 3)
        assert client.health() is True
        router.set_serving(False)
        assert client.health() is False


async def test_the_other_calls_async() -> None:
    with ScriptedRouter() as router:
        async with AsyncClient(router.address) as client:
            assert [model.name for model in await client.models()] == ["tiny"]
            assert (await client.tokenize("two words")).tokens == ("two", "words")
            assert (await client.cancel("r-1"), await client.cancel("r-2")) == (True, False)
            assert (await client.status()).workers[0].role == "decode"
            assert (await client.chat([Message(role="user", content="hi")])).token_ids == (0, 1, 2, 3)
            assert await client.health() is True


def test_what_cannot_be_sent_is_a_typed_error_of_the_other_calls_too() -> None:
    with ScriptedRouter() as router, Client(router.address) as client:
        with pytest.raises(InvalidRequest, match="type or range"):
            client.detokenize([-1])
        with pytest.raises(InvalidRequest, match="request_id is not valid Unicode"):
            client.cancel("\ud800")


@pytest.mark.parametrize("address", ["", "localhost", "http://localhost:7000", "a b:1", "h:port", ":1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Client(address)


def test_importing_the_sdk_imports_nothing_heavy() -> None:
    code = (
        "import sys, splitserve.client; "
        "print([name for name in ('torch', 'ray', 'transformers', 'numpy', 'grpc_health.v1') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_without_an_address_the_local_clusters_router_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("SPLITSERVE_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="splitserve up"):
        Client()
    write_state(ClusterState(router_addresses=("127.0.0.1:7001",), namespace="n", pid=1))
    with Client() as client:
        assert client.address == "127.0.0.1:7001"
    monkeypatch.setenv("SPLITSERVE_ADDRESS", "127.0.0.1:7002")
    with Client() as client:
        assert client.address == "127.0.0.1:7002"
