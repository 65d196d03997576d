"""Streams to the public `openai` client: their pieces are the answer, and clients may go away."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from splitserve.benchmarks.processes import ProcessCluster

from .conftest import HELLO

# -- Streams --


def test_a_stream_s_pieces_are_the_answer(client: openai.OpenAI, complete: Any, model: str) -> None:
    whole = complete("abc", max_tokens=20).choices[0]
    chunks = list(client.completions.create(model=model, prompt="abc", max_tokens=20, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_chat_stream_begins_with_the_role(client: openai.OpenAI, chat: Any, model: str) -> None:
    whole = chat(max_completion_tokens=20).choices[0]
    stream = client.chat.completions.create(
        model=model, messages=HELLO, max_completion_tokens=20, temperature=0, stream=True
    )
    chunks: list[ChatCompletionChunk] = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_include_usage_adds_one_last_chunk(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=HELLO,
        max_completion_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage.completion_tokens == 4
    assert len(last.usage.timing) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_streamed_choices_carry_their_index(client: openai.OpenAI, complete: Any, model: str) -> None:
    options: dict[str, Any] = {"n": 3, "seed": 5, "temperature": 1, "max_tokens": 10}
    whole = complete("abc", **options)
    texts = ["", "", ""]
    for chunk in client.completions.create(model=model, prompt="abc", stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_streamed_logprobs_are_the_whole_answer_s(client: openai.OpenAI, chat: Any, model: str) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "extra_body": {"ignore_eos": True}}
    whole = chat(**options).choices[0].logprobs.content
    streamed = []
    for chunk in client.chat.completions.create(
        model=model, messages=HELLO, temperature=0, max_completion_tokens=8, stream=True, **options
    ):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert [row.token for row in streamed] == [row.token for row in whole]
    assert [row.logprob for row in streamed] == pytest.approx([row.logprob for row in whole], abs=1e-4)


def test_stream_options_without_stream_are_refused(complete: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete("abc", stream_options={"include_usage": True})
    assert caught.value.param == "stream_options"


def test_an_error_before_the_first_token_is_no_200(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="abc", max_tokens=99_999, stream=True)
    assert caught.value.code == "context_length_exceeded"


# -- Clients that go away, and many of them --


def test_a_client_that_leaves_a_stream_frees_everything(client: openai.OpenAI, model: str, idle: Any) -> None:
    stream = client.completions.create(
        model=model, prompt="abc", max_tokens=1_900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    idle()


def test_a_client_that_does_not_wait_for_its_answer_frees_everything(
    client: openai.OpenAI, model: str, idle: Any
) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(
            model=model, prompt="abc", max_tokens=1_900, n=2, extra_body={"ignore_eos": True}
        )
    idle()


async def test_32_clients_at_once_get_what_each_gets_alone(served: ProcessCluster, complete: Any, model: str) -> None:
    prompts = [f"prompt number {number}" for number in range(32)]
    async with openai.AsyncOpenAI(
        base_url=f"http://{served.router.http_address}/v1", api_key="none", max_retries=0
    ) as client:

        async def ask(prompt: str) -> str:
            stream = await client.completions.create(
                model=model, prompt=prompt, max_tokens=8, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*map(ask, prompts))
    assert together == [choice.text for choice in complete(prompts, max_tokens=8).choices]
    for number in (0, 31):
        assert together[number] == complete(prompts[number], max_tokens=8).choices[0].text
