"""Workers that repeat, reorder, refuse, contradict, hang and die: each token once, in order, and exactly one end."""

from __future__ import annotations

import asyncio
import math
import random
import time
from itertools import pairwise

import grpc.aio
import pytest
from splitserve.client import DeadlineExceeded, FinishReason, SplitserveError
from splitserve.core.errors import EngineFailed, InvalidRequest, KvCorrupted, WorkerLost
from splitserve.proto import inference_pb2, worker_pb2
from splitserve.router import session

from .conftest import ANSWER, LENGTH, PROMPT, WAIT_S, StartScene, ask, end_of, granted, speak


@pytest.mark.parametrize("seed", range(8))
async def test_repeated_reordered_and_foreign_messages_change_nothing(start_scene: StartScene, seed: int) -> None:
    """What is said, cut anywhere, twice and shuffled, mixed with words of other attempts and of requests nobody has."""
    scene, rng = await start_scene(), random.Random(seed)
    stub = scene.client.inference(scene.router.address)
    request = inference_pb2.GenerateRequest(token_ids={"ids": PROMPT}, max_tokens=len(ANSWER))
    call = stub.Generate(request)
    reading = asyncio.create_task(read_all(call))
    prefill, work = await granted(scene)
    edges = [1, *sorted(rng.sample(range(2, len(ANSWER)), rng.randrange(8))), len(ANSWER)]
    words = [
        lambda: prefill.first_token(work, ANSWER[0]),
        lambda: scene.decode.transfer_done(work, ANSWER[0]),
        *(lambda a=a, b=b: speak(scene.decode, work, a, b) for a, b in pairwise(edges)),
    ]
    stranger = worker_pb2.WorkRequest(request_id="nobody", attempt=1)
    noise = [
        lambda: scene.decode.tokens(work, 1, [7, 7, 7], attempt=work.attempt + 1),
        lambda: scene.decode.tokens(stranger, 0, [7], finish=LENGTH),
        lambda: prefill.first_token(stranger, 7),
        lambda: scene.decode.transfer_done(stranger, 7),
        lambda: scene.decode.fail(stranger, "internal"),
        lambda: scene.decode.grant(work),
    ]
    said = [*words, *rng.sample(words, 2), *noise]
    rng.shuffle(said)
    for say in said:
        say()
    messages = await asyncio.wait_for(reading, WAIT_S)
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds == ["started", *["tokens"] * (len(kinds) - 2), "finished"]
    got = [token for message in messages for token in message.tokens.token_ids]
    assert got == ANSWER
    indices = [message.tokens.index for message in messages if message.HasField("tokens")]
    assert indices == sorted(set(indices))
    assert messages[-1].finished.reason == LENGTH
    assert messages[-1].finished.timing.attempts == 1
    scene.check_nothing_left()


async def read_all(call: grpc.aio.UnaryStreamCall) -> list[inference_pb2.GenerateResponse]:
    return [message async for message in call]


async def test_a_full_decode_worker_is_asked_again_when_it_has_room(start_scene: StartScene) -> None:
    scene = await start_scene()
    scene.decode.status.num_free_blocks = 1
    task = ask(scene)
    for _ in range(3):  # more refusals than a request may have failures: none of these is one
        scene.decode.fail((await scene.decode.receive("grant")).request, "overloaded")
        scene.decode.say_status()
    prefill, work = await granted(scene)
    prefill.first_token(work, ANSWER[0])
    speak(scene.decode, work, 1, len(ANSWER))
    result = await end_of(task)
    assert list(result.token_ids) == ANSWER
    assert result.timing.attempts == 1
    scene.check_nothing_left()


async def test_an_ended_request_holds_no_reader(start_scene: StartScene) -> None:
    """They would be in a cycle, whose prompt and answer only the garbage collector frees."""
    scene = await start_scene()
    task = ask(scene)
    prefill, work = await granted(scene)
    job = scene.router.dispatcher._jobs[work.request_id]
    assert job.reading is not None
    prefill.first_token(work, ANSWER[0])
    speak(scene.decode, work, 1, len(ANSWER))
    await end_of(task)
    async with asyncio.timeout(WAIT_S):
        while job.reading is not None:
            await asyncio.sleep(0.002)


async def test_a_request_goes_on_elsewhere_when_its_decode_worker_dies(start_scene: StartScene) -> None:
    """The next attempt is told the tokens that the client has; what the dead one still says is stale."""
    scene = await start_scene(decode=2)
    task = ask(scene)
    first = await scene.placed()
    prefill, work = await granted(scene, first)
    prefill.first_token(work, ANSWER[0])
    first.transfer_done(work, ANSWER[0])
    speak(first, work, 1, 4)
    while scene.router.metrics.tokens._value.get() < 4:
        await asyncio.sleep(0.002)
    await first.die()
    second = next(worker for worker in scene.decodes if worker is not first)
    prefill, again = await granted(scene, second)
    assert (again.attempt, list(again.output_token_ids)) == (2, ANSWER[:4])
    await first.start()
    await scene.becomes(first.address, "ready")
    stale = scene.num_stale
    speak(first, work, 4, len(ANSWER))
    while scene.num_stale == stale:
        await asyncio.sleep(0.002)
    assert not task.done()
    prefill.first_token(again, ANSWER[4])
    second.transfer_done(again, ANSWER[4])
    speak(second, again, 5, len(ANSWER))
    result = await end_of(task)
    assert list(result.token_ids) == ANSWER
    assert result.timing.attempts == 2
    scene.check_nothing_left()


async def test_a_prefill_worker_that_fails_is_avoided_and_both_sides_are_told(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2)
    task = ask(scene)
    first, work = await granted(scene)
    first.fail(work, "engine_failed")
    revoked = await scene.decode.receive_cancel()
    assert (revoked.request_id, revoked.attempt) == (work.request_id, 1)
    second, again = await granted(scene)
    assert second is not first
    assert again.attempt == 2
    second.first_token(again, ANSWER[0])
    speak(scene.decode, again, 1, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER
    scene.check_nothing_left()


async def test_a_failed_transfer_is_blamed_on_the_sender(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2)
    task = ask(scene)
    first, work = await granted(scene)
    first.first_token(work, ANSWER[0])
    scene.decode.fail(work, "transfer_failed")
    await first.receive_cancel()
    second, again = await granted(scene)
    assert second is not first
    assert list(again.output_token_ids) in ([], ANSWER[:1])  # the two streams have no order between them
    start = len(again.output_token_ids)
    second.first_token(again, ANSWER[start])
    speak(scene.decode, again, start + 1, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER
    scene.check_nothing_left()


async def test_a_token_that_contradicts_another_costs_the_attempt_not_the_answer(start_scene: StartScene) -> None:
    """Prefill and decode worker disagree about token 0: one of them has another prompt's KV."""
    scene = await start_scene()
    task = ask(scene)
    prefill, work = await granted(scene)
    prefill.first_token(work, ANSWER[0])
    while not scene.router.metrics.tokens._value.get():
        await asyncio.sleep(0.002)
    scene.decode.transfer_done(work, ANSWER[0] + 1)
    await scene.decode.receive_cancel()  # the prefill worker's part ended with the transfer
    prefill, again = await granted(scene)
    assert list(again.output_token_ids) == ANSWER[:1]
    prefill.first_token(again, ANSWER[1])
    speak(scene.decode, again, 2, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER
    scene.check_nothing_left()


async def test_contradictions_without_end_are_an_error(start_scene: StartScene) -> None:
    scene = await start_scene(max_attempts=2)
    task = ask(scene)
    for _ in range(2):
        prefill, work = await granted(scene)
        scene.decode.tokens(work, 5, [1])
        scene.decode.tokens(work, 5, [2])
        await scene.decode.receive_cancel()
        await prefill.receive_cancel()
    with pytest.raises(KvCorrupted, match="position 5"):
        await end_of(task)
    scene.check_nothing_left()


async def test_an_error_that_no_retry_can_help_ends_the_request_at_once(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2)
    task = ask(scene)
    prefill, work = await granted(scene)
    prefill.fail(work, "invalid_request", "the worker knows better")
    with pytest.raises(InvalidRequest, match="knows better"):
        await end_of(task)
    assert (await scene.decode.receive_cancel()).attempt == 1
    scene.check_nothing_left()


async def test_failures_end_with_the_last_error(start_scene: StartScene) -> None:
    scene = await start_scene(max_attempts=3)
    task = ask(scene)
    for number in range(3):
        prefill, work = await granted(scene)
        prefill.fail(work, "engine_failed", f"failure {number + 1}")
        await scene.decode.receive_cancel()
    with pytest.raises(EngineFailed, match="failure 3"):
        await end_of(task)
    scene.check_nothing_left()


@pytest.mark.chaos
async def test_a_worker_that_hangs_is_given_up(start_scene: StartScene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stays open and it says nothing: after SILENCE_S its requests go elsewhere."""
    monkeypatch.setattr(session, "SILENCE_S", 1.5)
    scene = await start_scene(decode=2)
    task = ask(scene)
    hung = await scene.placed()
    prefill, work = await granted(scene, hung)
    prefill.first_token(work, ANSWER[0])
    hung.silent, hung.says_hello, silent_at = True, False, time.monotonic()  # nor does it answer a new session
    other = next(worker for worker in scene.decodes if worker is not hung)
    prefill, again = await granted(scene, other)
    assert time.monotonic() - silent_at < 10.0
    assert list(again.output_token_ids) == ANSWER[:1]
    prefill.first_token(again, ANSWER[1])
    speak(other, again, 2, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER
    assert "no word" in (await scene.state(hung.address))[1]
    scene.check_nothing_left()


async def test_a_load_that_is_no_number_costs_a_worker_its_session(start_scene: StartScene) -> None:
    """Loads are kept in order, and such a one has no place there."""
    scene = await start_scene(decode=2)
    bad, good = scene.decodes
    bad.status.decode_step_s, bad.says_hello = math.nan, False
    bad.say_status()
    async with asyncio.timeout(WAIT_S):
        while "decode_step_s is nan" not in (await scene.state(bad.address))[1]:
            await asyncio.sleep(0.01)
    task = ask(scene)
    prefill, work = await granted(scene, good)
    prefill.first_token(work, ANSWER[0])
    speak(good, work, 1, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER


async def test_the_only_worker_dies(start_scene: StartScene) -> None:
    """A typed error once the wait for another is over, not a hang."""
    scene = await start_scene(prefill=0, decode=0, colocated=1, no_worker_wait_s=0.3, max_attempts=1)
    task = ask(scene)
    await scene.decode.receive("run")
    await scene.decode.die()
    with pytest.raises(WorkerLost):
        await end_of(task)
    with pytest.raises(SplitserveError, match="no pair of prefill and decode worker"):
        await end_of(ask(scene))
    scene.check_nothing_left()


async def test_a_cancelled_request_is_cancelled_on_both_workers(start_scene: StartScene) -> None:
    scene = await start_scene()
    task = ask(scene)
    prefill, work = await granted(scene)
    task.cancel()
    assert (await prefill.receive_cancel()).request_id == work.request_id
    assert (await scene.decode.receive_cancel()).attempt == work.attempt
    stale = scene.num_stale
    prefill.first_token(work, ANSWER[0])
    while scene.num_stale == stale:
        await asyncio.sleep(0.002)
    scene.check_nothing_left()


async def test_a_request_past_its_deadline_is_cancelled_on_both_workers(start_scene: StartScene) -> None:
    scene = await start_scene()
    task = ask(scene, timeout_s=0.5)
    prefill, _ = await granted(scene)
    with pytest.raises(DeadlineExceeded):
        await end_of(task)
    await prefill.receive_cancel()
    await scene.decode.receive_cancel()
    scene.check_nothing_left()


async def test_an_answer_complete_with_its_first_token_needs_no_decode(start_scene: StartScene) -> None:
    scene = await start_scene()
    task = ask(scene)
    prefill, work = await granted(scene)
    prefill.first_token(work, 1, finish=inference_pb2.FINISH_REASON_STOP)
    result = await end_of(task)
    assert (result.token_ids, result.finish_reason) == ((1,), FinishReason.STOP)
    scene.check_nothing_left()


@pytest.mark.parametrize("why", ["length", "stop token"])
async def test_the_end_of_an_answer_is_not_lost_with_the_prefill_worker_that_alone_knows_of_it(
    start_scene: StartScene, why: str
) -> None:
    """Its decode worker has the KV of a first token that is the last, and will say nothing more."""
    scene = await start_scene(prefill=2)
    options = {"max_tokens": 1} if why == "length" else {"stop_token_ids": [ANSWER[0]]}
    task = ask(scene, **options)
    prefill, work = await granted(scene)
    scene.decode.transfer_done(work, ANSWER[0])
    async with asyncio.timeout(WAIT_S):
        while next(iter(scene.router.dispatcher._jobs.values())).timeline.transfer is None:
            await asyncio.sleep(0.002)
    await prefill.die()
    other, again = await granted(scene)
    assert other is not prefill
    assert (again.attempt, list(again.output_token_ids)) == (2, [])
    scene.decode.transfer_done(again, ANSWER[0])
    other.first_token(again, ANSWER[0], finish=LENGTH)
    result = await end_of(task)
    assert list(result.token_ids) == [ANSWER[0]]
    scene.check_nothing_left()
