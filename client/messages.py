"""Conversations as the SDK's users write them, checked and turned into the message that travels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import InvalidRequest
from ..proto import inference_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """The model's wish to have a function called."""

    id: str  # that the tool's answer refers to
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may ask for."""

    name: str
    description: str = ""  # for the model
    parameters: Mapping[str, Any] | None = None  # JSON schema of its arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str = ""
    tool_calls: Sequence[ToolCall] = ()  # what the assistant asked for in this turn
    tool_call_id: str = ""  # the call that this turn of a tool answers
    name: str = ""  # who speaks, or the tool


Messages = Sequence[Message | Mapping[str, Any]]
_FIELDS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name"})


def to_proto(messages: Messages, tools: Sequence[Tool] = ()) -> pb.ChatMessages:
    """Raises: InvalidRequest: a turn or a tool is not one."""
    return pb.ChatMessages(messages=[_message(turn) for turn in messages], tools=[_tool(tool) for tool in tools])


def check_text(text: str, field: str) -> str:
    """Raises: InvalidRequest: lone surrogates (what Python makes of invalid UTF-8 in arguments and file names)."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} is {type(text).__name__}; it must be text", field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field} is not valid Unicode: {error.object[error.start]!a} at position {error.start} is half a "
            "character; it was probably read from bytes that are not UTF-8",
            field=field,
        ) from error
    return text


def _message(turn: Message | Mapping[str, Any]) -> pb.ChatMessage:
    if isinstance(turn, Message):
        turn = {name: value for name in _FIELDS if (value := getattr(turn, name)) or name in ("role", "content")}
    calls = turn.get("tool_calls") if isinstance(turn, Mapping) else None
    if (
        not isinstance(turn, Mapping)
        or not turn.keys() <= _FIELDS
        or not turn.get("role")
        or ("content" not in turn and not calls)
    ):
        raise InvalidRequest(
            f"a message holds {sorted(turn) if isinstance(turn, Mapping) else type(turn).__name__}; "
            "it needs a role that is not empty and a content or tool_calls, and may have tool_call_id and name",
            field="messages",
        )
    content = turn.get("content")
    if content is None and calls:
        content = ""  # of a turn that only calls tools
    return pb.ChatMessage(
        role=check_text(turn["role"], "messages.role"),
        content=check_text(_joined(content), "messages.content"),
        tool_calls=[_tool_call(call) for call in calls or ()],
        tool_call_id=check_text(turn.get("tool_call_id") or "", "messages.tool_call_id"),
        name=check_text(turn.get("name") or "", "messages.name"),
    )


def _joined(content: Any) -> Any:
    """The text of a content that came in parts. Raises: InvalidRequest: a part is not text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                "a content part is not text; models here read text only: send parts {'type': 'text', 'text': ...}",
                field="messages.content",
            )
    return "".join(part["text"] for part in content)


def _tool_call(call: ToolCall | Mapping[str, Any]) -> pb.ToolCall:
    if isinstance(call, Mapping):
        held = sorted(call)
        function = call.get("function", call)
        try:
            call = ToolCall(id=call.get("id", ""), name=function["name"], arguments=function.get("arguments", "{}"))
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                f"a tool call holds {held}; it needs id, name and arguments", field="messages.tool_calls"
            ) from error
    return pb.ToolCall(
        id=check_text(call.id, "messages.tool_calls.id"),
        name=check_text(call.name, "messages.tool_calls.name"),
        arguments=check_text(call.arguments, "messages.tool_calls.arguments"),
    )


def _tool(tool: Tool) -> pb.Tool:
    return pb.Tool(
        name=check_text(tool.name, "tools.name"),
        description=check_text(tool.description, "tools.description"),
        parameters="" if tool.parameters is None else json.dumps(tool.parameters),
    )
