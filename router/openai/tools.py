"""Tool calls in a model's text: found as the text comes, or forced by an output format."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.errors import InvalidRequest
from ...proto import inference_pb2 as pb
from .requests import ChatRequest, NamedTool, Tool
from .responses import ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

# How a model's text is read: as it is; looking for calls; as one call; as the arguments of the named function.
Mode = Literal["text", "auto", "required", "named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request says about tools."""

    tools: tuple[Tool, ...] = ()  # those that the model is told of
    mode: Mode = "text"
    name: str = ""  # of the function, if mode is "named"
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)

    def output_format(self) -> pb.OutputFormat | None:
        """What makes the model call. Raises: InvalidRequest: the functions' schemas cannot be put together."""
        if self.mode == "named":
            schema = next(_parameters(tool) for tool in self.tools if tool.function.name == self.name)
            return pb.OutputFormat(json_schema=json.dumps(schema))
        if self.mode == "required":
            return pb.OutputFormat(json_schema=json.dumps(_any_call(self.tools)))
        return None


def tool_use(body: ChatRequest) -> ToolUse:
    """Raises: InvalidRequest: the choice names no tool, or there is none to choose."""
    tools = tuple(body.tools or ())
    choice = body.tool_choice or ("auto" if tools else "none")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have the same name; each needs its own", field="tools")
    if choice == "none":
        return ToolUse()
    if not tools:
        raise InvalidRequest("tool_choice needs tools; send some, or leave it out", field="tool_choice")
    parallel = body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise InvalidRequest(
                f"tool_choice names {choice.function.name!r}, which is not among the tools: {', '.join(names)}",
                field="tool_choice",
            )
        return ToolUse(tools=tools, mode="named", name=choice.function.name)
    if choice == "required":
        return ToolUse(tools=tools, mode="required")
    return ToolUse(tools=tools, mode="auto", parallel=parallel)


@dataclass(slots=True, kw_only=True)
class ToolText:
    """A model's text as it comes, split into what it says and what it calls.

    Calls are written as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen, SmolLM), or the whole
    text is one such object or a list of them (Llama, Mistral). What cannot be read as a call stays text.
    """

    names: Collection[str]
    calls: list[ToolCall] = field(default_factory=list)
    parallel: bool = True
    _held: str = field(default="", init=False)
    _began: bool = field(default=False, init=False)  # some text went out, so the whole is no call

    def push(self, text: str) -> str:
        """Text that is certain to be no call; calls are added to `calls` once they are whole."""
        self._held += text
        out = ""
        while self._held:
            if not self._began and self._held.lstrip()[:1] in ("", "{", "["):
                return out  # perhaps all of it is a call: flush tells
            at = self._held.find(_OPEN)
            if at < 0:
                safe = len(self._held) - _overlap(self._held, _OPEN)
                out, self._held = out + self._held[:safe], self._held[safe:]
                self._began = self._began or bool(out)
                return out
            end = self._held.find(_CLOSE, at)
            out, self._held = out + self._held[:at], self._held[at:]
            self._began = True
            if end < 0:
                return out
            end += len(_CLOSE) - at
            block, self._held = self._held[:end], self._held[end:]
            if not self._take(block.removeprefix(_OPEN).removesuffix(_CLOSE)):
                out += block
        return out

    def flush(self) -> str:
        """What is left at the end, if it is no call."""
        text, self._held = self._held, ""
        return "" if self._take(text.removeprefix(_OPEN)) else text

    def _take(self, text: str) -> bool:
        """Add the calls that the text is, if it is calls."""
        calls = parse_calls(text, self.names)
        self.calls += calls
        if not self.parallel:
            del self.calls[1:]
        return bool(calls)


def parse_calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """The calls that the text is; none if it is anything else, or calls a function that was not offered."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    rows = value if isinstance(value, list) else [value]
    calls = []
    for row in rows:
        arguments = row.get("arguments", row.get("parameters", {})) if isinstance(row, dict) else None
        if not isinstance(arguments, dict) or not isinstance(row.get("name"), str) or row["name"] not in names:
            return []
        try:
            calls.append(new_call(row["name"], _as_json(arguments)))
        except (ValueError, RecursionError):  # NaN or Infinity, which Python reads and no JSON has
            return []
    return calls


def _as_json(arguments: Mapping[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which only an escape can spell
        return json.dumps(arguments)
    return text


def new_call(name: str, arguments: str) -> ToolCall:
    call_id = f"call_{secrets.token_hex(12)}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _any_call(tools: Sequence[Tool]) -> dict[str, Any]:
    """A schema for one call of any of the tools. Their shared definitions move to the root, where references look."""
    definitions: dict[str, dict[str, Any]] = {"$defs": {}, "definitions": {}}
    calls = []
    for tool in tools:
        parameters = dict(_parameters(tool))
        for place, known in definitions.items():
            defined = parameters.pop(place, {})
            if not isinstance(defined, dict):
                raise InvalidRequest(
                    f"{place} in the parameters of {tool.function.name} is no JSON object; name each schema in it",
                    field="tools",
                )
            for name, schema in defined.items():
                if known.setdefault(name, schema) != schema:
                    raise InvalidRequest(
                        f"two tools define {place}/{name} differently; rename one, or let tool_choice name a function",
                        field="tools",
                    )
        call = {"name": {"const": tool.function.name}, "arguments": parameters}
        calls.append(
            {"type": "object", "properties": call, "required": ["name", "arguments"], "additionalProperties": False}
        )
    return {"anyOf": calls, **{place: known for place, known in definitions.items() if known}}


def _parameters(tool: Tool) -> Mapping[str, Any]:
    return tool.function.parameters or _NO_ARGUMENTS


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
