"""What the public `openai` client documents of chat, output formats and tools is what it gets."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
import pytest

from .conftest import HELLO

NO_SPACES = {"197": -100, "198": -100, "220": -100}  # tab, newline and space: a random model may write only those
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
