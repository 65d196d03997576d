"""A conversation and its tools in the shape that chat templates expect, which is OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import InvalidRequest
from ..proto import inference_pb2

_INSTRUCTIONS = """You may call functions to help with the request. Their signatures:
{tools}
To call one, answer with its name and arguments as JSON between tags, and nothing else:
<tool_call>{{"name": "...", "arguments": {{...}}}}</tool_call>"""


def template_input(conversation: inference_pb2.ChatMessages) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools. Raises: InvalidRequest: JSON inside them is not, or a part lacks its name."""
    return [_message(row) for row in conversation.messages], [_tool(tool) for tool in conversation.tools]


def _message(row: inference_pb2.ChatMessage) -> dict[str, Any]:
    message: dict[str, Any] = {"role": row.role, "content": row.content}
    if row.tool_calls:
        message["tool_calls"] = [_tool_call(call) for call in row.tool_calls]
    if row.tool_call_id:
        message["tool_call_id"] = row.tool_call_id
    if row.name:
        message["name"] = row.name
    return message


def _tool_call(call: inference_pb2.ToolCall) -> dict[str, Any]:
    # Templates print the arguments as JSON themselves, so they get an object and not its text.
    arguments = _json_object(call.arguments, "messages.tool_calls.arguments")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: inference_pb2.Tool) -> dict[str, Any]:
    if not tool.name:
        raise InvalidRequest("a tool has no name; name it as the model shall call it", field="tools")
    parameters = _json_object(tool.parameters, "tools.parameters") if tool.parameters else {"type": "object"}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is not JSON: {error}", field=field) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{field} is a JSON {type(value).__name__}; it must be an object", field=field)
    return value


def explain_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For a chat template that knows no tools: the same conversation in words that it does know."""
    rows = [_in_words(message) for message in messages]
    if tools:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = _INSTRUCTIONS.format(tools=listed)
        if rows and rows[0]["role"] == "system":
            rows[0] = {**rows[0], "content": f"{rows[0]['content']}\n\n{text}"}
        else:
            rows.insert(0, {"role": "system", "content": text})
    return rows


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return dict(message)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    parts = [message["content"], *(f"<tool_call>{call}</tool_call>" for call in calls)]
    return {"role": message["role"], "content": "\n".join(part for part in parts if part)}
