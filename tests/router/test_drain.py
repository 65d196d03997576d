"""Workers that drain: their requests go on elsewhere, and none of it counts as a failure."""

from __future__ import annotations

from .conftest import ANSWER, Scene, ScriptedWorker, StartScene, ask, end_of, granted, speak


def other(workers: list[ScriptedWorker], one: ScriptedWorker) -> ScriptedWorker:
    return next(worker for worker in workers if worker is not one)


def drain(worker: ScriptedWorker) -> None:
    worker.status.draining = True
    worker.say_status()


def handed_over(scene: Scene) -> float:
    return scene.router.metrics.handed_over._value.get()


async def test_what_a_draining_decode_worker_hands_over_goes_on_elsewhere(start_scene: StartScene) -> None:
    scene = await start_scene(decode=2, max_attempts=1)  # one failure would be its end
    task = ask(scene)
    leaving = await scene.placed()
    prefill, work = await granted(scene, leaving)
    prefill.first_token(work, ANSWER[0])
    leaving.transfer_done(work, ANSWER[0])
    speak(leaving, work, 1, 7)
    drain(leaving)
    leaving.fail(work, "draining")
    prefill, again = await granted(scene, other(scene.decodes, leaving))
    assert (again.attempt, list(again.output_token_ids)) == (2, ANSWER[:7])
    prefill.first_token(again, ANSWER[7])
    speak(other(scene.decodes, leaving), again, 8, len(ANSWER))
    result = await end_of(task)
    assert list(result.token_ids) == ANSWER
    assert handed_over(scene) == 1
    assert scene.router.metrics.retries._value.get() == 0
    scene.check_nothing_left()


async def test_a_prompt_is_not_sent_to_a_prefill_worker_that_began_to_drain(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2, max_attempts=1)
    task = ask(scene)
    request = await scene.decode.receive("grant")
    leaving = next(worker for worker in scene.prefills if worker.info.kv_address == request.kv_address)
    drain(leaving)
    await scene.becomes(leaving.address, "draining")
    scene.decode.grant(request.request)
    prefill, work = await granted(scene)
    assert prefill is other(scene.prefills, leaving)
    prefill.first_token(work, ANSWER[0])
    speak(scene.decode, work, 1, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER
    assert leaving.inbox.empty()
    scene.check_nothing_left()


async def test_a_draining_worker_that_goes_takes_no_attempt_with_it(start_scene: StartScene) -> None:
    scene = await start_scene(decode=2, max_attempts=1)
    task = ask(scene)
    leaving = await scene.placed()
    prefill, work = await granted(scene, leaving)
    prefill.first_token(work, ANSWER[0])
    drain(leaving)
    await scene.becomes(leaving.address, "draining")
    await leaving.die()
    prefill, again = await granted(scene, other(scene.decodes, leaving))
    prefill.first_token(again, ANSWER[1])
    speak(other(scene.decodes, leaving), again, 2, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER
    scene.check_nothing_left()
