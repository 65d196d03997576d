"""Workers that repeat, reorder, refuse, contradict, hang and die: each token once, in order, and exactly one end."""

from __future__ import annotations

import asyncio
import math
import random
import time
from itertools import pairwise
from typing import Any

import grpc.aio
import pytest
from splitserve.client import DeadlineExceeded, FinishReason, GenerationResult, SplitserveError
from splitserve.core.errors import EngineFailed, InvalidRequest, KvCorrupted, Overloaded, WorkerLost
from splitserve.proto import inference_pb2, worker_pb2
from splitserve.proto.convert import PROTOCOL_VERSION
from splitserve.router import session

from .conftest import LENGTH, WAIT_S, Scene, ScriptedWorker, StartScene

PROMPT = [10, 20, 30]
ANSWER = list(range(100, 120))


def ask(scene: Scene, **options: object) -> asyncio.Task[GenerationResult]:
    """One request for all of ANSWER."""
    return asyncio.create_task(scene.client.generate(PROMPT, **{"max_tokens": len(ANSWER), **options}))


async def granted(scene: Scene, decode: ScriptedWorker | None = None) -> tuple[ScriptedWorker, worker_pb2.WorkRequest]:
    """The decode worker grants what it is asked for; returns the prefill worker and the work it is given."""
    request = await (decode or scene.decode).receive("grant")
    (decode or scene.decode).grant(request.request)
    async with asyncio.timeout(WAIT_S):
        while all(worker.inbox.empty() for worker in scene.prefills):
            await asyncio.sleep(0.002)
    prefill = next(worker for worker in scene.prefills if not worker.inbox.empty())
    run = await prefill.receive("run")
    if not run.HasField("grant"):  # it did not wait for the grant, which follows
        await prefill.receive("grant")
    assert run.request.prompt_token_ids, "a run without its prompt"
    assert run.request.prompt_token_ids == request.request.prompt_token_ids
    return prefill, run.request


async def end_of(task: asyncio.Task[GenerationResult]) -> GenerationResult:
    async with asyncio.timeout(WAIT_S):
        return await task


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


def speak(decode: ScriptedWorker, work: worker_pb2.WorkRequest, start: int, end: int) -> None:
    decode.tokens(work, start, ANSWER[start:end], finish=LENGTH if end == len(ANSWER) else 0)


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


async def test_a_prompt_does_not_wait_for_its_grant_where_there_is_room(start_scene: StartScene) -> None:
    scene = await start_scene()
    await scene.heard(scene.decode)
    task = ask(scene)
    wanted = await scene.decode.receive("grant")
    run = await scene.prefill.receive("run")
    assert not run.HasField("grant")
    work = run.request
    scene.prefill.first_token(work, ANSWER[0])
    while scene.router.metrics.tokens._value.get() == 0:  # it is on its way to the client
        await asyncio.sleep(0.002)
    scene.decode.grant(wanted.request)
    told = await scene.prefill.receive("grant")
    assert (told.grant_id, told.request_id, told.attempt) == ("a" * 32, work.request_id, work.attempt)
    scene.decode.transfer_done(work, ANSWER[0])
    speak(scene.decode, work, 1, len(ANSWER))
    result = await end_of(task)
    assert list(result.token_ids) == ANSWER
    names = [event.event for event in result.timing.events]
    assert names.index("prefill_queued") < names.index("first_token") < names.index("granted")
    scene.check_nothing_left()


@pytest.mark.parametrize(
    ("num_tokens", "is_early", "can_wait"), [(1500, True, True), (100, True, False), (1500, False, False)]
)
async def test_a_grant_can_wait_only_while_its_long_prompt_is_computed(
    start_scene: StartScene, num_tokens: int, is_early: bool, can_wait: bool
) -> None:
    scene = await start_scene()
    if not is_early:  # a prefill worker of a build before
        await scene.prefill.die()
        scene.prefill.info.late_grants = False
        await scene.prefill.start()
        await scene.becomes(scene.prefill.address, "ready")
    await scene.heard(scene.decode)
    task = asyncio.create_task(scene.client.generate([10] * num_tokens, max_tokens=2))
    assert (await scene.decode.receive("grant")).can_wait is can_wait
    task.cancel()


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


@pytest.mark.parametrize("grants", ["before the token", "after it"])
async def test_an_answer_complete_before_its_grant_frees_the_decode_worker(
    start_scene: StartScene, grants: str
) -> None:
    """The prefill worker had not heard of the grant when it freed the KV: nobody else would end the transfer."""
    scene = await start_scene()
    await scene.heard(scene.decode)
    task = ask(scene, max_tokens=1)
    wanted = (await scene.decode.receive("grant")).request
    work = (await scene.prefill.receive("run")).request
    if grants == "before the token":
        scene.decode.grant(wanted)
        await scene.prefill.receive("grant")
    scene.prefill.first_token(work, ANSWER[0], finish=LENGTH, ungranted=True)
    assert list((await end_of(task)).token_ids) == ANSWER[:1]
    cancel = await scene.decode.receive_cancel()
    assert (cancel.request_id, cancel.attempt) == (work.request_id, work.attempt)
    if grants == "after it":
        scene.decode.grant(wanted)
        while scene.num_stale == 0:
            await asyncio.sleep(0.002)
    assert scene.prefill.inbox.empty()
    scene.check_nothing_left()


async def test_an_answer_complete_with_its_grant_ends_by_the_transfer(start_scene: StartScene) -> None:
    scene = await start_scene()
    await scene.heard(scene.decode)
    task = ask(scene, max_tokens=1)
    scene.decode.grant((await scene.decode.receive("grant")).request)
    work = (await scene.prefill.receive("run")).request
    await scene.prefill.receive("grant")
    scene.prefill.first_token(work, ANSWER[0], finish=LENGTH)
    await end_of(task)
    second = ask(scene, max_tokens=1)  # behind whatever would have been said about the first
    await scene.decode.receive("grant")
    assert scene.decode.cancels.empty()
    second.cancel()


@pytest.mark.parametrize("why", ["refused", "old"])
async def test_a_prompt_waits_where_a_grant_was_refused_or_may_not_follow(start_scene: StartScene, why: str) -> None:
    scene = await start_scene()
    if why == "old":  # a prefill worker of a build before
        await scene.prefill.die()
        scene.prefill.info.late_grants = False
        await scene.prefill.start()
        await scene.becomes(scene.prefill.address, "ready")
    await scene.heard(scene.decode)
    task = ask(scene, max_tokens=1)
    wanted = (await scene.decode.receive("grant")).request
    if why == "refused":
        await scene.prefill.receive("run")
        scene.decode.fail(wanted, "overloaded")
        await scene.prefill.receive_cancel()
        scene.decode.say_status()
        assert (await scene.decode.receive("grant")).request.attempt == wanted.attempt + 1
        task.cancel()
        task = ask(scene, max_tokens=1)
        wanted = (await scene.decode.receive("grant")).request
    scene.decode.grant(wanted)
    run = await scene.prefill.receive("run")
    assert run.HasField("grant")
    assert run.request.request_id == wanted.request_id
    scene.prefill.first_token(run.request, ANSWER[0], finish=LENGTH)
    assert list((await end_of(task)).token_ids) == ANSWER[:1]


async def test_where_there_is_little_room_it_waits(start_scene: StartScene) -> None:
    scene = await start_scene()
    scene.decode.status.num_free_blocks = 1  # as many as it needs
    link = await scene.heard(scene.decode)
    task = ask(scene)
    await scene.decode.receive("grant")
    while any(link.runs.values()):  # a status later, still nothing
        await asyncio.sleep(0.002)
    assert scene.prefill.inbox.empty()
    task.cancel()


async def test_a_grant_refused_after_the_first_token_is_no_failure(start_scene: StartScene) -> None:
    """The next attempt waits for its grant, and goes on behind the token that the client has."""
    scene = await start_scene()
    await scene.heard(scene.decode)
    task = ask(scene)
    wanted = await scene.decode.receive("grant")
    work = (await scene.prefill.receive("run")).request
    scene.prefill.first_token(work, ANSWER[0])
    while scene.router.metrics.tokens._value.get() == 0:
        await asyncio.sleep(0.002)
    scene.decode.fail(wanted.request, "overloaded")
    assert (await scene.prefill.receive_cancel()).attempt == work.attempt
    scene.decode.say_status()
    wanted = await scene.decode.receive("grant")
    assert list(wanted.request.output_token_ids) == ANSWER[:1]
    assert scene.prefill.inbox.empty()
    scene.decode.grant(wanted.request)
    run = await scene.prefill.receive("run")
    assert run.HasField("grant")
    scene.prefill.first_token(run.request, ANSWER[1])
    speak(scene.decode, run.request, 2, len(ANSWER))
    result = await end_of(task)
    assert list(result.token_ids) == ANSWER
    assert scene.router.metrics.retries._value.get() == 0
    scene.check_nothing_left()


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


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("role", worker_pb2.ROLE_PREFILL, "is a prefill worker"),
        ("model", "another", "serves model 'another'"),
        ("protocol_version", PROTOCOL_VERSION + 1, "protocol"),
    ],
    ids=["role", "model", "future"],
)
async def test_a_worker_that_does_not_fit_is_refused_with_the_reason(
    start_scene: StartScene, field: str, value: object, reason: str
) -> None:
    scene = await start_scene()
    odd = ScriptedWorker("decode", scene.decode.info.model)
    setattr(odd.info, field, value)
    await odd.start()
    try:
        scene.router.pool.set_workers(
            [scene.prefill.address], [scene.decode.address, odd.address], scene.router.dispatcher
        )
        assert reason in await scene.becomes(odd.address, "refused")
        task = ask(scene)
        prefill, work = await granted(scene)
        prefill.first_token(work, ANSWER[0])
        speak(scene.decode, work, 1, len(ANSWER))
        assert list((await end_of(task)).token_ids) == ANSWER
        assert odd.inbox.empty()
    finally:
        await odd.die()


async def test_a_worker_that_speaks_before_its_hello_is_refused(start_scene: StartScene) -> None:
    scene = await start_scene()
    await scene.decode.die()
    scene.decode.says_hello = False
    await scene.decode.start()
    assert "before its hello" in await scene.becomes(scene.decode.address, "refused")


async def test_a_worker_is_found_under_the_role_that_it_has_and_not_that_it_is_listed_with(
    start_scene: StartScene,
) -> None:
    scene = await start_scene(prefill=2)
    moved = scene.prefills[1].address
    scene.router.pool.set_workers([scene.prefill.address], [scene.decode.address, moved], scene.router.dispatcher)
    async with asyncio.timeout(WAIT_S):
        while moved in scene.router.pool.decodes or moved not in scene.router.pool.prefills:
            await asyncio.sleep(0.01)
    await scene.becomes(moved, "ready")
    assert (await scene.client.status()).workers[1].role == "prefill"


async def test_what_speaks_neither_dialect_is_refused(start_scene: StartScene) -> None:
    scene, server = await start_scene(), grpc.aio.server()
    stranger = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        scene.router.pool.set_workers(
            [scene.prefill.address], [scene.decode.address, stranger], scene.router.dispatcher
        )
        assert "nothing at" in await scene.becomes(stranger, "refused")
    finally:
        await server.stop(0)


async def test_a_worker_on_a_broken_device_is_refused_with_the_reason(start_scene: StartScene) -> None:
    scene = await start_scene()
    scene.prefill.status.fault = "2 uncorrectable memory errors"
    scene.prefill.say_status()
    assert "out of service: 2 uncorrectable memory errors" in await scene.becomes(scene.prefill.address, "refused")


def busy(scene: Scene, *, tokens: int = 1_000, tokens_per_s: float = 1_000.0) -> None:
    """The prefill worker tells that it has prompts of another router."""
    status = scene.prefill.status
    status.num_outstanding_prefill_tokens, status.prefill_tokens_per_s = tokens, tokens_per_s
    status.num_running = status.num_waiting = 1 if tokens else 0
    scene.prefill.say_status()


async def knows_its_load(scene: Scene, tokens: int) -> None:
    (link,) = scene.router.pool.prefills.values()
    async with asyncio.timeout(WAIT_S):
        while link.status.num_outstanding_prefill_tokens != tokens:
            await asyncio.sleep(0.002)


async def test_a_first_token_that_would_come_too_late_is_refused_at_once(start_scene: StartScene) -> None:
    scene = await start_scene(ttft_target_s=5.0)
    busy(scene, tokens=30_000)
    await knows_its_load(scene, 30_000)
    with pytest.raises(Overloaded, match="after about 30 s, the target is 5 s") as caught:
        await end_of(ask(scene))
    assert caught.value.retry_after_s == pytest.approx(25.0, abs=0.1)
    assert scene.router.metrics.overloaded._value.get() == 1
    scene.check_nothing_left()


async def answered(scene: Scene, asked: list[Any]) -> None:
    """Let the prompts that a worker has been sent come to their ends."""
    for task, (prefill, work) in asked:
        prefill.first_token(work, ANSWER[0])
        speak(scene.decode, work, 1, len(ANSWER))
        await end_of(task)


async def test_who_waits_past_its_latest_start_is_told_so_and_not_timed_out(start_scene: StartScene) -> None:
    scene = await start_scene(ttft_target_s=1.5)
    busy(scene)  # for a second, and then it does not get any better
    await knows_its_load(scene, 1_000)
    asked = [(ask(scene), await granted(scene)) for _ in range(2)]  # that each router may have at a busy worker
    with pytest.raises(Overloaded, match="waited so long for a worker"):
        await end_of(ask(scene))
    assert scene.decode.inbox.empty()
    await answered(scene, asked)
    scene.check_nothing_left()


async def test_the_queue_serves_the_important_first_and_then_each_tenant_in_turn(start_scene: StartScene) -> None:
    scene = await start_scene()
    busy(scene)
    await knows_its_load(scene, 1_000)
    asked = [(ask(scene), await granted(scene)) for _ in range(2)]  # that each router may have at a busy worker
    wanted = [("a", 0), ("a", 0), ("a", 0), ("b", 0), ("c", 1)]
    tasks = []
    for number, (tenant, priority) in enumerate(wanted):
        tasks.append(ask(scene, tenant=tenant, priority=priority))
        async with asyncio.timeout(WAIT_S):
            while scene.router.dispatcher.waiting.num_queued <= number:
                await asyncio.sleep(0.002)
    busy(scene, tokens=0)
    await answered(scene, asked)
    served = []
    for _ in wanted:
        prefill, work = await granted(scene)
        served.append((work.tenant, work.priority))
        prefill.first_token(work, ANSWER[0])
        speak(scene.decode, work, 1, len(ANSWER))
    assert served == [("c", 1), ("a", 0), ("b", 0), ("a", 0), ("a", 0)]
    for task in tasks:
        assert list((await end_of(task)).token_ids) == ANSWER
    scene.check_nothing_left()
