"""Conversations as chat templates see them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from splitserve.client import Message, Tool, ToolCall
from splitserve.client.messages import to_proto
from splitserve.core.errors import InvalidRequest
from splitserve.proto import inference_pb2
from splitserve.router.conversation import template_input
from splitserve.router.text import ModelText

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CONVERSATION = to_proto(
    [
        Message(role="user", content="Weather in Köln?"),
        Message(role="assistant", tool_calls=[ToolCall(id="c1", name="weather", arguments='{"city": "Köln"}')]),
        Message(role="tool", content="rain", tool_call_id="c1", name="weather"),
    ],
    [Tool(name="weather", description="tells it", parameters=SCHEMA), Tool(name="now")],
)


def test_messages_and_tools_have_the_shape_that_templates_expect() -> None:
    messages, tools = template_input(CONVERSATION)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    assert messages == [
        {"role": "user", "content": "Weather in Köln?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
    ]
    weather, now = (tool["function"] for tool in tools)
    assert weather == {"name": "weather", "description": "tells it", "parameters": SCHEMA}
    assert now["parameters"] == {"type": "object"}


def test_a_template_gets_tools_and_none_if_there_are_none(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    template = (
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }} {% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    text = ModelText(tmp_path)
    messages, tools = template_input(CONVERSATION)
    assert text.render(messages) == "user assistant tool "
    rendered = text.render(messages, tools)
    assert json.loads(rendered.removesuffix("user assistant tool ")) == tools


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "is not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}]}, "JSON list"),
        ({"tools": [{"name": "f", "parameters": "{"}]}, "tools.parameters is not JSON"),
        ({"tools": [{"name": ""}]}, "a tool has no name"),
    ],
)
def test_what_no_template_could_print_is_refused(conversation: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        template_input(inference_pb2.ChatMessages(**conversation))


@pytest.mark.parametrize("template", ["{{ messages[0].tool_calls[0] }}", "{{ tools }}{{ messages | tojson }}"])
def test_what_is_nested_too_deep_to_be_printed_is_refused(tiny: Path, tmp_path: Path, template: str) -> None:
    """It could just be read, by fewer frames than those that print it."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(template)
    nested: dict[str, Any] = {}
    for _ in range(2_000):
        nested = {"a": nested}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": nested}}
    with pytest.raises(InvalidRequest, match="refuses the conversation") as refused:
        ModelText(model).render([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert refused.value.field == "messages"
