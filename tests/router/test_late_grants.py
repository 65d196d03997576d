"""A prompt is computed before its grant is there, wherever that is all but certain to come."""

from __future__ import annotations

import asyncio

import pytest

from .conftest import ANSWER, LENGTH, StartScene, ask, end_of, speak


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
