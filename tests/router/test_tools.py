"""Tool calls found in a model's text, however it comes; and the schema that forces one."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.errors import InvalidRequest
from splitserve.router.openai.chat import Deltas
from splitserve.router.openai.requests import ChatRequest
from splitserve.router.openai.tools import ToolText, ToolUse, parse_calls, tool_use
from splitserve.router.text import ModelText

CALL = '{"name": "f", "arguments": {"x": "</b> ü"}}'
TEXTS = {  # text -> what is said, and the names called
    "no call at all": ("no call at all", []),
    f"<tool_call>\n{CALL}\n</tool_call>": ("", ["f"]),
    f"Let me see. <tool_call>{CALL}</tool_call>": ("Let me see. ", ["f"]),
    f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call> done": (" done", ["f", "f"]),
    f"<tool_call>{CALL}": ("", ["f"]),  # the model ended without the closing tag
    CALL: ("", ["f"]),
    '{"name": "f", "parameters": {}}': ("", ["f"]),
    f"[{CALL}, {CALL}]": ("", ["f", "f"]),
    '{"name": "unknown", "arguments": {}}': ('{"name": "unknown", "arguments": {}}', []),
    '{"name": "f", "arguments": {"x": NaN}}': ('{"name": "f", "arguments": {"x": NaN}}', []),
    '{"name": "f", "arguments": {"x": 1e999}}': ('{"name": "f", "arguments": {"x": 1e999}}', []),
    '{"name": ["f"], "arguments": {}}': ('{"name": ["f"], "arguments": {}}', []),
    "<tool_call>nonsense</tool_call> a": ("<tool_call>nonsense</tool_call> a", []),
    "a < b <tool": ("a < b <tool", []),
    "{not JSON": ("{not JSON", []),
    "": ("", []),
}


def read(parts: list[str], **options: Any) -> tuple[str, list[str]]:
    text = ToolText(names={"f"}, **options)
    said = "".join([text.push(part) for part in parts]) + text.flush()
    return said, [call["function"]["name"] for call in text.calls]


@pytest.mark.parametrize("text", TEXTS)
def test_calls_are_found_whole(text: str) -> None:
    assert read([text]) == TEXTS[text]


@given(text=st.sampled_from(list(TEXTS)), cuts=st.lists(st.integers(0, 120)))
def test_calls_are_found_however_the_text_is_cut(text: str, cuts: list[int]) -> None:
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert read([text[start:end] for start, end in pairwise(at)]) == TEXTS[text]


@given(st.lists(st.sampled_from(["<", "tool_call>", "</tool_call>", "{", CALL, " ", "x", "["])))
def test_nothing_is_said_twice_or_lost(parts: list[str]) -> None:
    text = ToolText(names=())  # no function was offered, so everything is said
    assert "".join([text.push(part) for part in parts]) + text.flush() == "".join(parts)
    assert text.calls == []


def test_arguments_stay_what_they_are() -> None:
    (call,) = parse_calls(CALL, {"f"})
    assert json.loads(call["function"]["arguments"]) == {"x": "</b> ü"}
    assert call["id"].startswith("call_")


def test_arguments_with_half_a_character_can_be_sent() -> None:
    (call,) = parse_calls(r'{"name": "f", "arguments": {"x": "\ud83d", "y": "ü"}}', {"f"})
    assert json.loads(call["function"]["arguments"].encode()) == {"x": "\ud83d", "y": "ü"}


def test_without_parallel_calls_the_first_counts() -> None:
    assert read([f"[{CALL}, {CALL}]"], parallel=False) == ("", ["f"])


def chat(**body: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}], **body})


def function(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def schema_of(use: ToolUse) -> Any:
    made = use.output_format()
    assert made is not None
    return json.loads(made.json_schema)


def test_required_accepts_each_call_and_its_shared_definitions() -> None:
    shared = {"$defs": {"city": {"enum": ["Rome"]}}, "type": "object", "properties": {"at": {"$ref": "#/$defs/city"}}}
    use = tool_use(chat(tools=[function("f", {**shared, "required": ["at"]}), function("g")], tool_choice="required"))
    schema = schema_of(use)
    jsonschema.validate({"name": "f", "arguments": {"at": "Rome"}}, schema)
    jsonschema.validate({"name": "g", "arguments": {}}, schema)
    for wrong in ({"name": "f", "arguments": {"at": "Oslo"}}, {"name": "h", "arguments": {}}, {"name": "g"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [function("f"), function("f")]}, "tools"),
        ({"tools": [function("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ],
)
def test_choices_that_make_no_sense_are_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tool_use(chat(**body))
    assert caught.value.field == field


def test_definitions_that_clash_are_refused() -> None:
    tools = [function(name, {"$defs": {"a": {"const": name}}, "type": "object"}) for name in ("f", "g")]
    with pytest.raises(InvalidRequest, match="rename one"):
        tool_use(chat(tools=tools, tool_choice="required")).output_format()


@pytest.mark.parametrize("defined", [{"$defs": []}, {"definitions": "x"}, {"$defs": True}])
def test_definitions_that_are_none_are_refused(defined: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="in the parameters of f is no JSON object") as caught:
        tool_use(chat(tools=[function("f", defined)], tool_choice="required")).output_format()
    assert caught.value.field == "tools"


def test_a_required_call_that_was_cut_off_is_shown_as_text() -> None:
    use = tool_use(chat(tools=[function("f")], tool_choice="required"))
    deltas = Deltas(use)
    assert deltas.push('{"name": "f", "argu') == []
    assert deltas.flush() == [{"role": "assistant", "content": '{"name": "f", "argu'}]
    assert deltas.reason("length") == "length"


def test_a_template_without_tools_gets_them_in_words(tiny: Any) -> None:
    text = ModelText(tiny)
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {}}}]
    call = {"type": "function", "id": "c", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    shown = text.render(
        [
            {"role": "user", "content": "warm?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "31 degrees", "tool_call_id": "c"},
        ],
        tools,
    )
    assert shown.startswith("system: You may call functions")
    assert '"name": "get_weather"' in shown.splitlines()[1]
    assert 'assistant: <tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>' in shown
    assert "user: <tool_response>\n31 degrees\n</tool_response>" in shown
    assert text.render([{"role": "user", "content": "warm?"}]) == "user: warm?\nassistant:"
