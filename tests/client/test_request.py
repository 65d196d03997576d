"""What the SDK refuses before sending, and what it sends."""

from __future__ import annotations

from typing import Any

import pytest
from splitserve.client import InvalidRequest, Message, Tool, ToolCall
from splitserve.client.request import build_request, build_tokenize_request


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        (b"bytes", {}, "decode it"),
        ("half \udcff", {}, "not valid Unicode"),
        ([1, -1], {}, "type or range"),
        ([1, 2**32], {}, "type or range"),
        ([1, "a"], {}, "type or range"),
        ([{"role": "user"}], {}, "message holds"),
        ([{"role": "", "content": "a"}], {}, "message holds"),
        ([{"role": "user", "content": "a", "nmae": "b"}], {}, "message holds"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "part is not text"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], {}, "tool call holds"),
        ("a", {"tools": [Tool(name="f")]}, "tools need a conversation"),
        ("a", {"logit_bias": {1: 101.0}}, "logit_bias is 101.0 for token 1"),
        ("a", {"logit_bias": {-1: 1.0}}, "token ids are not negative"),
        ("a", {"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias has 301 tokens"),
        ("a", {"regex": "a+", "json_object": True}, "at most one format"),
        ("a", {"regex": ""}, "has no text"),
        ("a", {"json_schema": 3}, "must be text"),
        ("a", {"min_tokens": -1}, "type or range"),
        ("a", {"logprobs": -1}, "type or range"),
        ([Message(role="user", content="a"), 3], {}, "message holds int"),
        ([Message(role="user", content="\ud800")], {}, "messages.content is not valid Unicode"),
        ([{"role": "user", "content": None}], {}, "must be text"),
        ("a", {"temperature": float("nan")}, "temperature is nan"),
        ("a", {"temperature": -1.0}, "temperature is -1"),
        ("a", {"top_p": 0.0}, "top_p is 0"),
        ("a", {"seed": -1}, "seed is -1"),
        ("a", {"max_tokens": 0}, "max_tokens is 0"),
        ("a", {"max_tokens": 2**40}, "type or range"),
        ("a", {"stop": ["ok", "\udc80"]}, "stop is not valid Unicode"),
        ("a", {"stop_token_ids": [-5]}, "type or range"),
        ("a", {"tenant": "\udc80"}, "tenant is not valid Unicode"),
        ("a", {"idempotency_key": "\udc80"}, "idempotency_key is not valid Unicode"),
    ],
)
def test_bad_input_is_refused_before_sending(prompt: Any, options: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build_request(prompt, options)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        build_request("a", {"temprature": 1.0})  # type: ignore[typeddict-unknown-key]


def test_only_what_was_given_is_sent() -> None:
    request = build_request("a", {"seed": 0, "top_k": None, "timeout_s": 3.0})
    assert request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_k")
    assert not request.sampling.HasField("temperature")
    assert not request.HasField("max_tokens")
    assert request.protocol_version == 1


def test_each_kind_of_prompt_fills_its_field() -> None:
    assert build_request("text ✓", {}).text == "text ✓"
    assert list(build_request(range(3), {}).token_ids.ids) == [0, 1, 2]
    turns = build_request([Message(role="system", content=""), {"role": "user", "content": "hi"}], {}).messages
    assert [(turn.role, turn.content) for turn in turns.messages] == [("system", ""), ("user", "hi")]


def test_tools_and_their_calls_travel_with_the_conversation() -> None:
    call = ToolCall(id="1", name="f", arguments='{"a": 2}')
    as_openai = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 2}'}}
    answer = {"role": "tool", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}
    messages = build_request(
        [
            Message(role="assistant", tool_calls=[call]),
            {"role": "assistant", "content": None, "tool_calls": [as_openai]},
            {**answer, "tool_call_id": "1", "name": "f"},
        ],
        {"tools": [Tool(name="f", description="doubles", parameters={"type": "object"})]},
    ).messages
    first, second, third = messages.messages
    assert first == second
    assert (first.content, first.tool_calls[0].arguments) == ("", '{"a": 2}')
    assert (third.content, third.tool_call_id, third.name) == ("42", "1", "f")
    assert [(tool.name, tool.parameters) for tool in messages.tools] == [("f", '{"type": "object"}')]


def test_each_output_format_fills_its_field() -> None:
    assert build_request("a", {"json_schema": {"type": "object"}}).output_format.json_schema == '{"type": "object"}'
    assert build_request("a", {"json_object": True}).output_format.json_object
    assert build_request("a", {"regex": "a+"}).output_format.regex == "a+"
    assert build_request("a", {"grammar": "start: /a/"}).output_format.grammar == "start: /a/"
    assert not build_request("a", {"json_object": False}).HasField("output_format")


def test_one_stop_string_needs_no_list() -> None:
    assert list(build_request("a", {"stop": "END"}).stop) == ["END"]
    assert list(build_request("a", {"stop": ["x", "y"]}).stop) == ["x", "y"]


def test_tokenize_takes_no_token_ids() -> None:
    assert build_tokenize_request("a", "m").model == "m"
    with pytest.raises(InvalidRequest, match="already is token ids"):
        build_tokenize_request([1, 2], "")  # type: ignore[list-item]
