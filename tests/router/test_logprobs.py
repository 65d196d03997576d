"""Logprobs on their way through the router: each with its token, from whoever knows it, whatever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from splitserve.client import InvalidRequest
from splitserve.proto import inference_pb2, worker_pb2

from .conftest import LENGTH, PROMPT, Scene, ScriptedWorker, StartScene, ask, end_of, granted

LETTERS = b"abcdefghijklmnopqrst"
TEXT = [letter - 33 for letter in LETTERS]  # the tokenizer's first token is "!"


def entries(token_ids: Sequence[int]) -> list[inference_pb2.TokenLogprob]:
    return [
        inference_pb2.TokenLogprob(
            token_id=i, logprob=-i / 8, rank=2, top=[inference_pb2.TopLogprob(token_id=i + 1, logprob=-0.5)]
        )
        for i in token_ids
    ]


def first_token(prefill: ScriptedWorker, work: worker_pb2.WorkRequest, token_id: int) -> None:
    prompt = entries(work.prompt_token_ids[1:]) if work.HasField("prompt_logprobs") else []
    (entry,) = entries([token_id])
    prefill.say(
        first_token=worker_pb2.FirstToken(
            request_id=work.request_id,
            attempt=work.attempt,
            index=len(work.output_token_ids),
            token_id=token_id,
            logprob=entry,
            prompt_logprobs=prompt,
        )
    )


def tokens(decode: ScriptedWorker, work: worker_pb2.WorkRequest, start: int, token_ids: Sequence[int]) -> None:
    last = start + len(token_ids) == work.max_tokens
    row = worker_pb2.SequenceTokens(
        request_id=work.request_id,
        attempt=work.attempt,
        index=start,
        token_ids=token_ids,
        finish_reason=LENGTH if last else 0,
        logprobs=entries(token_ids),
    )
    decode.say(tokens=worker_pb2.StepTokens(sequences=[row]))


async def streamed(scene: Scene, count: int) -> None:
    while scene.router.metrics.tokens._value.get() < count:
        await asyncio.sleep(0.002)


async def test_the_prefill_workers_word_is_awaited_where_only_it_knows(start_scene: StartScene) -> None:
    scene = await start_scene()
    task = ask(scene, logprobs=1, prompt_logprobs=1)
    prefill, work = await granted(scene)
    scene.decode.transfer_done(work, TEXT[0])
    tokens(scene.decode, work, 1, TEXT[1:])
    first_token(prefill, work, TEXT[0])
    result = await end_of(task)
    assert list(result.token_ids) == TEXT
    assert [entry.token_id for entry in result.logprobs] == TEXT
    assert b"".join(entry.text for entry in result.logprobs).decode() == result.text == LETTERS.decode()
    assert [entry.top[0].text for entry in result.logprobs] == [bytes([letter + 1]) for letter in LETTERS]
    assert [entry.token_id for entry in result.prompt_logprobs] == PROMPT
    assert [entry.rank for entry in result.prompt_logprobs] == [0, 2, 2]
    scene.check_nothing_left()


async def test_a_prefill_worker_that_dies_before_its_word_costs_the_attempt(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2)
    task = ask(scene, logprobs=0)
    prefill, work = await granted(scene)
    scene.decode.transfer_done(work, TEXT[0])
    tokens(scene.decode, work, 1, TEXT[1:])
    await prefill.die()
    other, again = await granted(scene)
    assert other is not prefill
    assert (again.attempt, list(again.output_token_ids)) == (2, [])
    first_token(other, again, TEXT[0])
    tokens(scene.decode, again, 1, TEXT[1:])
    result = await end_of(task)
    assert [entry.token_id for entry in result.logprobs] == TEXT
    scene.check_nothing_left()


async def test_a_later_attempt_goes_on_and_is_not_asked_for_the_prompt_again(start_scene: StartScene) -> None:
    scene = await start_scene(decode=2)
    task = ask(scene, logprobs=0, prompt_logprobs=0)
    first = await scene.placed()
    prefill, work = await granted(scene, first)
    assert work.HasField("prompt_logprobs")
    first_token(prefill, work, TEXT[0])
    first.transfer_done(work, TEXT[0])
    tokens(first, work, 1, TEXT[1:5])
    await streamed(scene, 5)
    await first.die()
    second = next(worker for worker in scene.decodes if worker is not first)
    prefill, again = await granted(scene, second)
    assert not again.HasField("prompt_logprobs")
    assert list(again.output_token_ids) == TEXT[:5]
    first_token(prefill, again, TEXT[5])
    second.transfer_done(again, TEXT[5])
    tokens(second, again, 6, TEXT[6:])
    result = await end_of(task)
    assert [entry.token_id for entry in result.logprobs] == TEXT
    assert len(result.prompt_logprobs) == len(PROMPT)
    scene.check_nothing_left()


async def test_each_chunks_logprobs_are_those_of_its_tokens_up_to_a_stop_string(start_scene: StartScene) -> None:
    scene = await start_scene()
    stream = scene.client.stream(PROMPT, max_tokens=len(TEXT), logprobs=0, stop=["fg"])

    async def read() -> list:
        async with stream as chunks:
            return [chunk async for chunk in chunks]

    task = asyncio.create_task(read())
    prefill, work = await granted(scene)
    first_token(prefill, work, TEXT[0])
    await streamed(scene, 1)
    scene.decode.transfer_done(work, TEXT[0])
    tokens(scene.decode, work, 1, TEXT[1:])
    chunks = await end_of(task)
    for chunk in chunks:
        assert [entry.token_id for entry in chunk.logprobs] == list(chunk.token_ids)
    assert "".join(chunk.text for chunk in chunks) == "abcde"
    assert [i for chunk in chunks for i in chunk.token_ids] == TEXT[:7]


async def test_tokens_that_come_while_the_prompts_logprobs_are_sent_do_not_outlive_a_stop_string(
    start_scene: StartScene,
) -> None:
    scene = await start_scene()
    task = ask(scene, logprobs=0, prompt_logprobs=20, stop=["a"])
    prefill, work = await granted(scene)
    first_token(prefill, work, TEXT[0])
    scene.decode.transfer_done(work, TEXT[0])
    tokens(scene.decode, work, 1, TEXT[1:])
    result = await end_of(task)
    assert list(result.token_ids) == TEXT[:1]
    assert result.text == ""


async def test_a_text_is_tokenised_once_whatever_becomes_of_the_request(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2)
    count = scene.router.metrics.tokenizations._value
    task = asyncio.create_task(scene.client.generate("hello", max_tokens=len(TEXT)))
    prefill, work = await granted(scene)
    prefill.fail(work, "engine_failed")
    prefill, work = await granted(scene)
    first_token(prefill, work, TEXT[0])
    tokens(scene.decode, work, 1, TEXT[1:])
    await end_of(task)
    assert work.attempt == 2
    assert count.get() == 1
    task = ask(scene)
    prefill, work = await granted(scene)
    first_token(prefill, work, TEXT[0])
    tokens(scene.decode, work, 1, TEXT[1:])
    await end_of(task)
    assert count.get() == 1, "token ids need no tokeniser"
    await scene.client.tokenize("hello")
    assert count.get() == 2


async def test_a_format_that_cannot_be_followed_never_reaches_a_worker(start_scene: StartScene) -> None:
    scene = await start_scene()
    for options in ({"regex": "(a"}, {"json_schema": {"type": "objct"}}, {"grammar": "start: foo"}):
        with pytest.raises(InvalidRequest, match="cannot be followed") as caught:
            await scene.client.generate("a", **options)
        assert caught.value.field == "output_format"
    assert scene.prefill.inbox.empty()
    assert scene.decode.inbox.empty()
