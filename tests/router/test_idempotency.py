"""One key, one request: later calls go on with it, other requests are refused, and a finished answer is told again."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from splitserve.core.errors import IdempotencyConflict, PoisonRequest, RetryBudgetSpent, SplitserveError, Superseded
from splitserve.core.request import seed_of_key
from splitserve.proto import inference_pb2, worker_pb2
from splitserve.proto.rpc import from_rpc_error
from splitserve.router.idempotency import digest_of
from splitserve.scheduling.attempts import first_attempt

from .conftest import ANSWER, PROMPT, WAIT_S, Scene, ScriptedWorker, StartScene, ask, end_of, granted, speak
from .test_logprobs import first_token, tokens


class Call:
    """One Generate call as a client without the SDK's retries makes it."""

    def __init__(self, scene: Scene, **fields: Any) -> None:
        fields = {"token_ids": {"ids": PROMPT}, "max_tokens": len(ANSWER), "idempotency_key": "k", **fields}
        stub = scene.client.inference(scene.router.address)
        self.call = stub.Generate(inference_pb2.GenerateRequest(**fields))
        self.token_ids: list[int] = []
        self.seed = 0
        self.index: int | None = None  # of its first token
        self.error: SplitserveError | None = None
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for message in self.call:
                if message.HasField("started"):
                    self.seed = message.started.seed
                if message.HasField("tokens"):
                    self.index = message.tokens.index if self.index is None else self.index
                    self.token_ids += message.tokens.token_ids
        except grpc.aio.AioRpcError as error:
            self.error = from_rpc_error(error)

    async def has(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.token_ids) < count:
                await asyncio.sleep(0.002)

    async def end(self) -> list[int]:
        async with asyncio.timeout(WAIT_S):
            await self.reading
        if self.error is not None:
            raise self.error
        return self.token_ids


async def begun(scene: Scene, num_tokens: int) -> worker_pb2.WorkRequest:
    """The only request is being decoded, and its first tokens are out."""
    prefill, work = await granted(scene)
    prefill.first_token(work, ANSWER[0])
    scene.decode.transfer_done(work, ANSWER[0])
    speak(scene.decode, work, 1, num_tokens)
    return work


async def test_kept_logprobs_count_as_what_they_take(start_scene: StartScene) -> None:
    scene = await start_scene()
    calls = [Call(scene, idempotency_key=f"k{n}", logprobs=1) for n in range(2)]
    ended = scene.router.dispatcher._ended
    for call in calls:
        prefill, work = await granted(scene)
        first_token(prefill, work, ANSWER[0])
        scene.decode.transfer_done(work, ANSWER[0])
        tokens(scene.decode, work, 1, ANSWER[1:])
        await call.end()
    assert ended._num_tokens == 2 * (len(PROMPT) + 3 * len(ANSWER))  # a token, its logprob, and one of another


def test_a_digest_is_of_what_was_asked_for_and_not_of_what_a_template_made_of_it() -> None:
    def digest(prompt_ids: list[int], caller: str = "ada", **fields: Any) -> bytes:
        return digest_of(inference_pb2.GenerateRequest(**fields), prompt_ids, caller)

    by_text = digest([1, 2, 3], text="what day is it?")
    assert digest([1, 2, 4], text="what day is it?", call=1, received_token_ids=[9]) == by_text
    assert digest([1, 2, 3], text="what day was it?") != by_text
    by_ids = digest([1, 2, 3], token_ids={})
    assert digest([1, 2, 3], token_ids={"ids": [1, 2, 3]}) == by_ids  # whether or not they were taken out
    others = [
        digest([1, 2, 4], token_ids={}),
        digest([1, 2, 3], token_ids={}, max_tokens=5),
        digest([1, 2, 3], "eve", token_ids={}),
        by_text,
    ]
    assert by_ids not in others
    # The bytes of one tenant are those of one token id; nothing is taken for the end of what goes before.
    assert digest([66154, 5], token_ids={}) != digest([5], token_ids={}, tenant="\x01\x00")


async def test_prompts_reach_the_workers_as_they_are_whatever_they_came_as(start_scene: StartScene) -> None:
    scene = await start_scene()
    hello = list((await scene.client.tokenize("hello")).token_ids)
    for input_, expected in (({"token_ids": {"ids": PROMPT}}, PROMPT), ({"text": "hello"}, hello)):
        fields = {"token_ids": None, "idempotency_key": str(input_), **input_}
        call = Call(scene, **fields)
        prefill, work = await granted(scene)
        assert list(work.prompt_token_ids) == expected
        prefill.fail(work, "worker_lost")
        _, again = await granted(scene)
        assert again.attempt > work.attempt
        assert list(again.prompt_token_ids) == expected
        call.call.cancel()
        await asyncio.wait({call.reading})
        await scene.decode.cancels.get()


async def test_a_second_call_goes_on_with_the_live_request_and_the_first_is_told(start_scene: StartScene) -> None:
    scene = await start_scene()
    first = Call(scene)
    work = await begun(scene, 6)
    await first.has(6)
    second = Call(scene, received_token_ids=ANSWER[:4], call=1)
    with pytest.raises(Superseded):
        await first.end()
    await second.has(2)
    speak(scene.decode, work, 6, len(ANSWER))
    assert await second.end() == ANSWER[4:]
    assert (second.index, second.seed) == (4, first.seed)
    assert scene.decode.inbox.empty()  # nothing was computed again
    assert scene.decode.cancels.empty()
    scene.check_nothing_left()


async def test_a_finished_answer_is_told_again(start_scene: StartScene) -> None:
    scene = await start_scene()
    first = Call(scene)
    speak(scene.decode, await begun(scene, 3), 3, len(ANSWER))
    assert await first.end() == ANSWER
    again = Call(scene, received_token_ids=ANSWER[:-1], call=1)
    assert await again.end() == ANSWER[-1:]
    assert await Call(scene).end() == ANSWER
    assert scene.decode.inbox.empty()
    scene.check_nothing_left()


async def test_an_answer_that_is_no_longer_kept_is_made_again(start_scene: StartScene) -> None:
    scene = await start_scene(keep_answers_s=0.0)
    for _ in range(2):
        call = Call(scene)
        speak(scene.decode, await begun(scene, 3), 3, len(ANSWER))
        assert await call.end() == ANSWER
    scene.check_nothing_left()


@pytest.mark.parametrize("finished", [False, True], ids=["live", "finished"])
async def test_another_request_with_the_same_key_is_refused(start_scene: StartScene, finished: bool) -> None:
    scene = await start_scene()
    first = Call(scene)
    work = await begun(scene, 3)
    if finished:
        speak(scene.decode, work, 3, len(ANSWER))
        await first.end()
    for other in ({"token_ids": {"ids": [*PROMPT, 40]}}, {"max_tokens": 5}, {"sampling": {"temperature": 0.5}}):
        with pytest.raises(IdempotencyConflict):
            await Call(scene, **other).end()
    if not finished:
        speak(scene.decode, work, 3, len(ANSWER))
    assert await first.end() == ANSWER


async def test_a_call_whose_tokens_are_not_the_live_answers_begins_anew(start_scene: StartScene) -> None:
    """It comes back from another router, which got further, or further along another way."""
    scene = await start_scene()
    first = Call(scene)
    old = await begun(scene, 3)
    second = Call(scene, received_token_ids=ANSWER[:8], call=3)
    with pytest.raises(Superseded):
        await first.end()
    prefill, work = await granted(scene)
    assert work.attempt >= first_attempt(3)
    assert list(work.output_token_ids) == ANSWER[:8]
    stale = scene.num_stale
    speak(scene.decode, old, 3, len(ANSWER))  # of the old attempt: matches nothing
    while scene.num_stale == stale:
        await asyncio.sleep(0.002)
    prefill.first_token(work, ANSWER[8])
    speak(scene.decode, work, 9, len(ANSWER))
    assert await second.end() == ANSWER[8:]
    scene.check_nothing_left()


async def test_late_words_of_a_cancelled_request_are_nothing_to_the_next_one_of_its_key(
    start_scene: StartScene,
) -> None:
    scene = await start_scene()
    first = Call(scene)
    old = await begun(scene, 3)
    await first.has(3)
    first.call.cancel()
    assert (await scene.decode.receive_cancel()).attempt == old.attempt
    other = Call(scene, token_ids={"ids": [1, 2]})
    prefill, work = await granted(scene)
    assert work.attempt > old.attempt
    stale = scene.num_stale
    speak(scene.decode, old, 3, len(ANSWER))
    while scene.num_stale == stale:
        await asyncio.sleep(0.002)
    mine = [token + 50 for token in ANSWER]
    prefill.first_token(work, mine[0])
    scene.decode.tokens(work, 1, mine[1:], finish=inference_pb2.FINISH_REASON_LENGTH)
    assert await other.end() == mine


async def test_the_seed_follows_from_the_key(start_scene: StartScene) -> None:
    scene = await start_scene()
    call = Call(scene, sampling={"temperature": 1.0})
    assert (await scene.decode.receive("grant")).request.sampling.seed == seed_of_key("k")
    call.call.cancel()


async def test_a_later_call_claims_the_request_on_every_worker(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2, decode=2)
    call = Call(scene, call=2)
    for worker in scene.prefills + scene.decodes:
        claim = await worker.receive_cancel()
        assert (claim.request_id, claim.attempt) == ("k", first_attempt(2) - 1)
    call.call.cancel()


async def test_a_request_that_another_router_took_ends_here(start_scene: StartScene) -> None:
    scene = await start_scene()
    call = Call(scene)
    work = await begun(scene, 3)
    supersede(scene.decode, work, newest_call=1, age_s=0.0)
    with pytest.raises(Superseded):
        await call.end()
    scene.check_nothing_left()


async def test_a_call_that_came_after_the_one_that_holds_the_request_takes_it(start_scene: StartScene) -> None:
    """Its client does not number its calls, so the worker tells how old the other one is."""
    scene = await start_scene()
    call = Call(scene)
    refused = (await scene.decode.receive("grant")).request
    supersede(scene.decode, refused, newest_call=4, age_s=3_600.0)
    assert (await scene.decode.receive_cancel()).attempt == first_attempt(5) - 1
    prefill, work = await granted(scene)
    assert work.attempt == first_attempt(5)
    prefill.first_token(work, ANSWER[0])
    speak(scene.decode, work, 1, len(ANSWER))
    assert await call.end() == ANSWER


def supersede(worker: ScriptedWorker, work: worker_pb2.WorkRequest, *, newest_call: int, age_s: float) -> None:
    failure = worker_pb2.Failure(code="superseded", newest_call=newest_call, newest_age_s=age_s)
    worker.say(failed=worker_pb2.RunFailed(request_id=work.request_id, attempt=work.attempt, failure=failure))


async def test_a_request_under_which_two_workers_died_is_not_tried_on_a_third(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=3, max_attempts=10)
    task = ask(scene)
    for _ in range(2):
        worker = await scene.placed()
        await worker.receive("run")
        await worker.die()
    with pytest.raises(PoisonRequest):
        await end_of(task)
    assert all(worker.inbox.empty() for worker in scene.decodes)
    scene.check_nothing_left()


async def test_a_worker_that_drains_away_is_not_held_against_its_requests(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=3, max_attempts=10)
    task = ask(scene)
    for _ in range(2):
        worker = await scene.placed()
        await worker.receive("run")
        worker.status.draining = True
        worker.say_status()
        await scene.becomes(worker.address, "draining")
        await worker.die()
    worker = await scene.placed()
    speak(worker, (await worker.receive("run")).request, 0, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER


async def test_past_the_retry_budget_failures_go_to_the_client(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=2, retry_floor=1, retry_ratio=0.0)
    tasks = [ask(scene), ask(scene)]
    for _ in range(3):
        worker = await scene.placed()
        worker.fail((await worker.receive("run")).request, "engine_failed", "the step failed")
        if any(task.done() for task in tasks):
            break
    with pytest.raises(RetryBudgetSpent, match="the step failed") as caught:
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*tasks)
    assert caught.value.retryable
    for task in tasks:
        task.cancel()


async def test_the_second_retry_waits_and_can_be_cancelled_meanwhile(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=1, max_attempts=10)
    task = ask(scene)
    for _ in range(2):
        worker = await scene.placed()
        worker.fail((await worker.receive("run")).request, "engine_failed")
    async with asyncio.timeout(WAIT_S):
        while scene.router.metrics.retries._value.get() < 2:
            await asyncio.sleep(0.001)
    assert scene.router.dispatcher.num_live == 1
    task.cancel()
    async with asyncio.timeout(WAIT_S):
        while scene.router.dispatcher.num_live:
            await asyncio.sleep(0.002)
    scene.check_nothing_left()
