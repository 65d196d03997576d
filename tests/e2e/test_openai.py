"""The public `openai` client against a running split cluster: what it documents is what it gets."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import jsonschema
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from splitserve.benchmarks.processes import ProcessCluster
from splitserve.client import Client

WAIT_S = 30.0
NO_SPACES = {"197": -100, "198": -100, "220": -100}  # tab, newline and space: a random model may write only those
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "celsius": {"type": "boolean"}},
            "required": ["city", "celsius"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tiny: object) -> str:
    return str(tiny)


@pytest.fixture(scope="module")
def client(served: ProcessCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{served.router.http_address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def complete(client: openai.OpenAI, model: str) -> Any:
    """complete("prompt", **parameters), greedy unless they say otherwise."""

    def run(prompt: Any, **parameters: Any) -> Completion:
        return client.completions.create(model=model, prompt=prompt, **{"temperature": 0, **parameters})

    return run


@pytest.fixture
def chat(client: openai.OpenAI, model: str) -> Any:
    def run(messages: Any = HELLO, **parameters: Any) -> ChatCompletion:
        parameters = {"temperature": 0, "max_completion_tokens": 8, **parameters}
        return client.chat.completions.create(model=model, messages=messages, **parameters)

    return run


@pytest.fixture
def idle(served: ProcessCluster) -> Iterator[Any]:
    """idle(): wait until no request is live and every KV block is free or only cached."""
    with Client(served.router.address) as sdk:

        def wait() -> None:
            deadline = time.monotonic() + WAIT_S
            while (status := sdk.status()).num_live or any(
                worker.num_running or worker.num_available_blocks < worker.num_blocks for worker in status.workers
            ):
                assert time.monotonic() < deadline, status

        yield wait


# -- Models --


def test_models_lists_the_one_served(client: openai.OpenAI, model: str) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == (model, "model", "splitserve")
    assert card.created > 1_700_000_000


def test_models_retrieve_knows_it_and_no_other(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


# -- Completions --


def test_a_completion_has_every_documented_field(complete: Any, model: str) -> None:
    answer = complete("abc", max_tokens=5)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", model)
    assert answer.created > 1_700_000_000
    assert answer.system_fingerprint.startswith("splitserve-")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 5, 8)
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_max_tokens_is_sixteen_where_none_is_named(complete: Any) -> None:
    assert complete("abc", extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_usage_tells_where_the_time_went(complete: Any) -> None:
    (timing,) = complete("abcdefgh" * 5, max_tokens=4, extra_body={"ignore_eos": True}).usage.timing
    assert timing["prefill_worker"] == "prefill-0"
    assert timing["decode_worker"] == "decode-0"
    assert timing["kv_bytes"] > 0
    assert timing["transport"] == "shared_memory"
    assert 0 < timing["prefill_s"] <= timing["ttft_s"] <= timing["e2e_s"]
    assert timing["attempts"] == 1


def test_token_ids_and_text_are_the_same_prompt(complete: Any) -> None:
    assert complete([64, 65, 66]).choices[0].text == complete("abc").choices[0].text


def test_a_batch_of_prompts_is_answered_in_order(complete: Any) -> None:
    prompts = ["abc", "hello there", "xyz"]
    batch = complete(prompts, max_tokens=6)
    assert [choice.index for choice in batch.choices] == [0, 1, 2]
    assert [c.text for c in batch.choices] == [complete(p, max_tokens=6).choices[0].text for p in prompts]
    assert batch.usage.prompt_tokens == sum(map(len, prompts))


def test_a_batch_of_token_ids_is_answered_in_order(complete: Any) -> None:
    batch = complete([[64, 65, 66], [71]], max_tokens=4)
    assert [c.text for c in batch.choices] == [complete(p, max_tokens=4).choices[0].text for p in ("abc", "h")]


def test_echo_begins_with_the_prompt(complete: Any) -> None:
    plain = complete("abc", max_tokens=4).choices[0].text
    assert complete("abc", max_tokens=4, echo=True).choices[0].text == "abc" + plain
    assert complete([64, 65, 66], max_tokens=4, echo=True).choices[0].text == "abc" + plain


def test_suffix_is_refused_by_name(complete: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete("abc", suffix="z")
    assert caught.value.param == "suffix"


def test_n_choices_differ_and_come_again_with_their_seed(complete: Any) -> None:
    first = complete("abc", n=4, seed=7, temperature=1, max_tokens=8)
    again = complete("abc", n=4, seed=7, temperature=1, max_tokens=8)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.choices]
    assert first.usage.prompt_tokens == 3


def test_another_seed_is_another_answer(complete: Any) -> None:
    one, two = (complete("abc", seed=seed, temperature=1, max_tokens=16).choices[0].text for seed in (1, 2))
    assert one != two


def test_the_first_of_n_is_the_answer_of_the_same_seed_alone(complete: Any) -> None:
    several = complete("abc", n=3, seed=-5, temperature=1, max_tokens=8)
    alone = complete("abc", seed=-5, temperature=1, max_tokens=8)
    assert several.choices[0].text == alone.choices[0].text


def test_best_of_returns_the_likeliest(complete: Any) -> None:
    options = {"temperature": 1, "seed": 3, "max_tokens": 6, "logprobs": 0, "extra_body": {"ignore_eos": True}}

    def score(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    every = complete("abc", n=6, **options)
    best = complete("abc", n=2, best_of=6, **options)
    scores = sorted((score(choice) for choice in every.choices), reverse=True)
    assert [score(choice) for choice in best.choices] == pytest.approx(scores[:2])
    assert best.usage.completion_tokens == 36


def test_best_of_below_n_is_refused(complete: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="less than n") as caught:
        complete("abc", n=3, best_of=2)
    assert caught.value.param == "best_of"


def test_a_prompt_is_tokenised_once_however_many_answers_it_gets(
    client: openai.OpenAI, complete: Any, chat: Any
) -> None:
    url = str(client.base_url).removesuffix("/v1/")

    def count() -> float:
        return float(re.search(r"^splitserve_tokenizations_total (\S+)", httpx2.get(f"{url}/metrics").text, re.M)[1])

    before = count()
    complete(["abc", "def"], n=3, max_tokens=2)
    chat(n=3)
    chat()
    complete([64, 65], n=2, max_tokens=2)
    assert count() - before == 2 + 1 + 1 + 0


# -- Where an answer ends --


def longest_word(text: str) -> str:
    """Letters of an answer that a stop string can be made of."""
    return max(re.findall(r"[ -~]+", text), key=len)


def test_a_stop_string_across_tokens_ends_the_text_before_it(complete: Any) -> None:
    whole = complete("abc", max_tokens=60, extra_body={"ignore_eos": True}).choices[0].text
    word = longest_word(whole)
    assert len(word) > 1, "the tiny model's tokens are bytes"
    stopped = complete("abc", max_tokens=60, stop=[word, "never there"], extra_body={"ignore_eos": True})
    assert stopped.choices[0].text == whole[: whole.index(word)]
    assert stopped.choices[0].finish_reason == "stop"


def test_one_stop_string_needs_no_list(complete: Any) -> None:
    whole = complete("abc", max_tokens=40, extra_body={"ignore_eos": True}).choices[0].text
    word = longest_word(whole)
    assert word not in complete("abc", max_tokens=40, stop=word, extra_body={"ignore_eos": True}).choices[0].text


def test_a_stop_token_ends_the_answer(client: openai.OpenAI, complete: Any) -> None:
    options = {"max_tokens": 40, "logprobs": 0}
    tokens = complete("abc", **options, extra_body={"ignore_eos": True}).choices[0].logprobs.tokens
    at, letter = next((at, token) for at, token in enumerate(tokens) if re.fullmatch("[!-~]", token))
    url = str(client.base_url).removesuffix("/v1/")
    ids = httpx2.post(f"{url}/tokenize", json={"prompt": letter}).json()["tokens"]
    stopped = complete("abc", **options, extra_body={"stop_token_ids": ids, "ignore_eos": True})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].logprobs.tokens == tokens[: at + 1]


def test_min_tokens_holds_the_end_back(complete: Any) -> None:
    eager = {"257": 100}  # the end of sequence, at once
    assert complete("abc", logit_bias=eager, max_tokens=9).usage.completion_tokens == 1
    late = complete("abc", logit_bias=eager, max_tokens=9, extra_body={"min_tokens": 5})
    assert 5 <= late.usage.completion_tokens <= 6
    assert late.choices[0].finish_reason == "stop"


# -- How tokens are chosen --


def test_logit_bias_forbids_and_forces(complete: Any) -> None:
    forced = complete("abc", logit_bias={"64": 100}, max_tokens=4)
    assert forced.choices[0].text == "aaaa"
    forbidden = complete("abc", logit_bias={"64": 100, "65": -100, "66": 100}, max_tokens=8, temperature=2, seed=1)
    assert set(forbidden.choices[0].text) <= {"a", "c"}


def test_greedy_is_greedy_whatever_the_seed(complete: Any) -> None:
    texts = {complete("abc", seed=seed, max_tokens=12).choices[0].text for seed in (1, 2, 3)}
    assert len(texts) == 1


def test_top_k_of_one_is_greedy(complete: Any) -> None:
    hot = complete("abc", temperature=2, seed=1, max_tokens=12, extra_body={"top_k": 1})
    assert hot.choices[0].text == complete("abc", max_tokens=12).choices[0].text


def test_top_p_and_min_p_at_their_ends_are_greedy(complete: Any) -> None:
    greedy = complete("abc", max_tokens=12).choices[0].text
    assert complete("abc", temperature=1, seed=1, top_p=1e-6, max_tokens=12).choices[0].text == greedy
    assert complete("abc", temperature=1, seed=1, max_tokens=12, extra_body={"min_p": 1.0}).choices[0].text == greedy


def test_penalties_change_a_text_that_repeats(complete: Any) -> None:
    repeats = {"temperature": 1, "seed": 1, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    plain = complete("abc", **repeats).choices[0].text
    assert complete("abc", **repeats, presence_penalty=2).choices[0].text != plain
    assert complete("abc", **repeats, frequency_penalty=2).choices[0].text != plain
    repeats["extra_body"] = {"ignore_eos": True, "repetition_penalty": 1.9}
    assert complete("abc", **repeats).choices[0].text != plain


# -- Logprobs --


def test_completion_logprobs_have_their_documented_shape(complete: Any) -> None:
    choice = complete("abc", max_tokens=6, logprobs=3, extra_body={"ignore_eos": True}).choices[0]
    shown = choice.logprobs
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset) == 6
    assert all(value <= 0 for value in shown.token_logprobs)
    for token, value, top in zip(shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top.values()) == pytest.approx(value)  # greedy
        assert top[token] == pytest.approx(value)
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6


def test_echo_with_logprobs_scores_the_prompt(complete: Any) -> None:
    shown = complete("hello", max_tokens=0, echo=True, logprobs=2)
    (choice,) = shown.choices
    assert choice.text == "hello"
    assert choice.logprobs.tokens == list("hello")
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert shown.usage.completion_tokens == 0


def test_a_streamed_score_is_the_whole_one(client: openai.OpenAI, complete: Any, model: str) -> None:
    options: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 1}
    whole = complete("hello", **options)
    *chunks, last = client.completions.create(
        model=model, prompt="hello", stream=True, stream_options={"include_usage": True}, **options
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello"
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [row.tokens for row in told] == [whole.choices[0].logprobs.tokens]
    assert last.usage.completion_tokens == 0


def test_chat_logprobs_have_their_documented_shape(chat: Any) -> None:
    choice = chat(logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}).choices[0]
    assert len(choice.logprobs.content) == 8
    for row in choice.logprobs.content:
        assert row.logprob <= 0
        assert len(row.top_logprobs) == 2
        assert row.top_logprobs[0].logprob == pytest.approx(row.logprob)
        assert bytes(row.bytes).decode("utf-8", "replace") == row.token


def test_top_logprobs_need_logprobs(chat: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(top_logprobs=2)
    assert caught.value.param == "top_logprobs"


# -- Chat --


def test_a_chat_completion_has_every_documented_field(chat: Any, model: str) -> None:
    answer = chat(extra_body={"ignore_eos": True})
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", model)
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.refusal, choice.message.tool_calls) == ("assistant", None, None)
    assert choice.message.content
    assert answer.usage.completion_tokens == 8


def test_chat_is_the_template_s_text_completed(chat: Any, complete: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert (
        chat(messages).choices[0].message.content
        == complete("system: s\nuser: u\nassistant:", max_tokens=8).choices[0].text
    )


def test_content_parts_and_developer_messages_read_as_text_and_system(chat: Any) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    plain = chat([{"role": "system", "content": "be kind"}, *HELLO])
    other = chat([{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}])
    assert other.choices[0].message.content == plain.choices[0].message.content
    assert other.usage.prompt_tokens == plain.usage.prompt_tokens


def test_an_image_is_refused_by_name(chat: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat([{"role": "user", "content": [image]}])
    assert caught.value.param.startswith("messages[0].content")


def test_n_chat_choices(chat: Any) -> None:
    answer = chat(n=3, temperature=1, seed=11)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_max_tokens_is_the_old_name(chat: Any) -> None:
    assert chat(max_tokens=3, max_completion_tokens=None, extra_body={"ignore_eos": True}).usage.completion_tokens == 3


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


# -- Output formats --


def test_json_schema_is_followed(chat: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        choice = chat(response_format=wanted, temperature=1, seed=seed, max_completion_tokens=100).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_json_object_is_an_object_or_its_beginning(chat: Any) -> None:
    choice = chat(response_format={"type": "json_object"}, temperature=1, seed=1, max_completion_tokens=60).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.lstrip().startswith("{")


def test_regex_and_grammar_are_followed(complete: Any) -> None:
    regex = {"response_format": {"type": "regex", "regex": "[0-9]{3}-(red|blue)"}}
    assert re.fullmatch("[0-9]{3}-(red|blue)", complete("abc", max_tokens=20, extra_body=regex).choices[0].text)
    grammar = {"response_format": {"type": "grammar", "grammar": 'start: "yes" | "no"'}}
    assert complete("abc", max_tokens=20, extra_body=grammar).choices[0].text in ("yes", "no")


def test_a_streamed_format_is_followed_too(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=HELLO,
        stream=True,
        max_completion_tokens=100,
        seed=2,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    jsonschema.validate(json.loads(text), PERSON)


def test_a_schema_that_cannot_be_followed_is_refused(chat: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(response_format=wanted)
    assert caught.value.param == "response_format"


# -- Tools --


def test_a_named_tool_is_called(chat: Any) -> None:
    choice = chat(
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        logit_bias=NO_SPACES,
        max_completion_tokens=100,
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


def test_required_calls_one_of_the_tools(chat: Any) -> None:
    other = {"type": "function", "function": {"name": "stop_clock"}}
    choice = chat(
        tools=[WEATHER, other], tool_choice="required", logit_bias=NO_SPACES, max_completion_tokens=120
    ).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name in ("get_weather", "stop_clock")
    assert isinstance(json.loads(call.function.arguments), dict)


def test_a_streamed_tool_call_adds_up(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=HELLO,
        stream=True,
        max_completion_tokens=100,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        logit_bias=NO_SPACES,
    )
    ids, names, arguments, reasons = [], [], "", []
    for chunk in stream:
        choice = chunk.choices[0]
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or ():
            ids += [call.id] if call.id else []
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments
    assert (len(ids), names, reasons[-1]) == (1, ["get_weather"], "tool_calls")
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


def test_auto_may_answer_in_words(chat: Any) -> None:
    message = chat(tools=[WEATHER]).choices[0].message
    assert message.content
    assert message.tool_calls is None


def test_tool_results_are_read(chat: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    conversation = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    with_result = chat(conversation, tools=[WEATHER])
    assert with_result.usage.prompt_tokens > chat(tools=[WEATHER]).usage.prompt_tokens + len("sunny")


def test_a_choice_of_no_tool_is_refused(chat: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "nonsense"}})
    assert caught.value.param == "tool_choice"


# -- Errors --


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"extra_body": {"min_p": 7}}, "min_p"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"user": 5}}, "user"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": [99_999], "echo": True}, "prompt"),
        ({"extra_body": {"response_format": {"type": "xml"}}}, "response_format.type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_400_with_the_field_s_name(
    client: openai.OpenAI, model: str, wrong: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": model, "prompt": "abc", **wrong})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_list_of_a_wrong_length_says_which_would_do(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="stop has 17 entries; send at most 16"):
        client.completions.create(model=model, prompt="abc", stop=["a"] * 17)
    with pytest.raises(openai.BadRequestError, match="messages has 0 entries; send at least 1"):
        client.chat.completions.create(model=model, messages=[])


def test_a_token_that_there_is_not_has_no_text(client: openai.OpenAI) -> None:
    url = str(client.base_url).removesuffix("/v1/")
    answer = httpx2.post(f"{url}/detokenize", json={"tokens": [1, 99_999]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tokens"


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_prompt_too_long_says_so(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a" * 5_000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_embeddings_are_refused(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings are not served"):
        client.embeddings.create(model=model, input="abc")


def test_a_deadline_is_504(complete: Any) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        complete("abc", max_tokens=1_000, extra_body={"ignore_eos": True, "timeout_s": 0.05})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


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
