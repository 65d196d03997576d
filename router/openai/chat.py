"""/v1/chat/completions: a conversation, answered n times, with tools and output formats."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from ... import __version__
from ...core.errors import InvalidRequest
from ...proto import inference_pb2 as pb
from ..front_door import FrontDoor
from .answers import Answer, answer_request, choices_of, collect, finish_text, merged, usage_of
from .body import read_body
from .connection import open_stream, while_connected
from .errors import json_response
from .logprobs import chat_logprobs
from .requests import AssistantMessage, ChatRequest, Content, Message, Tool, ToolMessage
from .responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    FinishText,
    ToolCall,
    ToolCallDelta,
)
from .tools import ToolText, ToolUse, new_call, parse_calls, tool_use


class Chat:
    """One request for chat completions, from its checked body to its answer."""

    def __init__(self, door: FrontDoor, body: ChatRequest) -> None:
        """Raises: InvalidRequest: parameters that do not go together."""
        self._door = door
        self._body = body
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.streamed = bool(body.stream)
        self._created = int(time.time())
        self._n = body.n or 1
        self._use = tool_use(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options is only for stream", field="stream_options")
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise InvalidRequest(
                f"max_tokens is {body.max_tokens}, max_completion_tokens {body.max_completion_tokens}; send one",
                field="max_tokens",
            )
        if self._use.mode in ("named", "required") and body.response_format is not None:
            raise InvalidRequest("a forced tool call has its own format; leave it out", field="response_format")

    async def whole(self) -> ChatCompletion:
        """Raises: SplitserveError."""
        answers = await collect(self._door.answer, await self._requests(), self._body.timeout_s)
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._door.model,
            "system_fingerprint": f"splitserve-{__version__}",
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": usage_of(answers, 1),
        }

    async def chunks(self) -> AsyncGenerator[ChatChunk]:
        """Raises: SplitserveError."""
        body = self._body
        requests = await self._requests()
        answers = [Answer() for _ in requests]
        deltas = [Deltas(self._use) for _ in requests]
        async with aclosing(merged(self._door.answer, requests, body.timeout_s)) as messages:
            async for index, message in messages:
                answers[index].accept(message)
                if message.HasField("tokens"):
                    rows: Sequence[pb.TokenLogprob] = message.tokens.logprobs
                    for delta in deltas[index].push(message.tokens.text, bool(rows)):
                        yield self._chunk(index, delta, rows)
                        rows = ()
                elif message.HasField("finished"):
                    for delta in deltas[index].flush():
                        yield self._chunk(index, delta)
                    yield self._chunk(index, {}, reason=deltas[index].reason(finish_text(message.finished)))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**self._head(), "usage": usage_of(answers, 1)}

    async def _requests(self) -> list[pb.GenerateRequest]:
        """One for each answer. A conversation with several is tokenised here, once."""
        body, use = self._body, self._use
        request = answer_request(body, self.id)
        request.messages.CopyFrom(chat_messages(body.messages, use.tools))
        max_tokens = body.max_completion_tokens or body.max_tokens
        if max_tokens is not None:
            request.max_tokens = max_tokens
        if body.logprobs:
            request.logprobs = body.top_logprobs or 0
        forced = use.output_format()
        if forced is not None:
            request.output_format.CopyFrom(forced)
        if self._n > 1:
            request.token_ids.ids[:] = await self._door.token_ids(request)
        return choices_of(request, self._n)

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        deltas = Deltas(self._use)
        content = "".join(
            delta.get("content") or "" for part in (deltas.push(answer.text), deltas.flush()) for delta in part
        )
        message: ChatMessage = {"role": "assistant", "content": content, "refusal": None}
        if deltas.calls:
            message["tool_calls"] = deltas.calls
            message["content"] = content or None
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(answer.logprobs) if self._body.logprobs else None,
            "finish_reason": deltas.reason(finish_text(answer.finished)),
        }

    def _chunk(
        self, index: int, delta: ChatDelta, rows: Sequence[pb.TokenLogprob] = (), reason: FinishText | None = None
    ) -> ChatChunk:
        chunk = self._head()
        logprobs = chat_logprobs(rows) if rows else None
        chunk["choices"].append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            chunk["usage"] = None
        return chunk

    def _head(self) -> ChatChunk:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._door.model,
            "system_fingerprint": f"splitserve-{__version__}",
            "choices": [],
        }


class Deltas:
    """One choice as pieces of a message: text, and tool calls as far as the request lets the model make them."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._text = ToolText(names=use.names, parallel=use.parallel)
        self._parts: list[str] = []  # of a forced call
        self._began = False
        self._num_told = 0

    @property
    def calls(self) -> list[ToolCall]:
        return self._text.calls

    def push(self, text: str, always: bool = False) -> list[ChatDelta]:
        """The first holds the role. `always`: one at least, for what else the chunk carries."""
        made: list[ChatDelta] = []
        match self._use.mode:
            case "text":
                made = [{"content": text}] if text else []
            case "auto":
                said = self._text.push(text)
                made = [{"content": said}] if said else []
                made += self._new_calls()
            case "named" if text:
                made = [self._arguments(text)]
            case "required":
                self._parts.append(text)
        if always and not made:
            made = [{"content": ""}]
        if made and not self._began:
            self._began = True
            made[0] = {"role": "assistant", **made[0]}
        return made

    def flush(self) -> list[ChatDelta]:
        """What is left at the end."""
        made: list[ChatDelta] = []
        if self._use.mode == "auto":
            said = self._text.flush()
            made = [{"content": said}] if said else []
        elif self._use.mode == "required":
            text = "".join(self._parts)
            self._text.calls = parse_calls(text, self._use.names)
            made = [] if self._text.calls else [{"content": text}]  # cut off by max_tokens: no call yet
        if self._use.mode != "named":
            made += self._new_calls()
        if not self._began:
            self._began = True
            made[:1] = [{"role": "assistant", **(made[0] if made else {"content": ""})}]
        return made

    def reason(self, reason: FinishText) -> FinishText:
        return "tool_calls" if self._text.calls and reason == "stop" else reason

    def _arguments(self, text: str) -> ChatDelta:
        """More arguments of the one call that must come."""
        if not self._text.calls:
            self._text.calls = [new_call(self._use.name, text)]
            return {"tool_calls": [_delta(0, self._text.calls[0])]}
        self._text.calls[0]["function"]["arguments"] += text
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    def _new_calls(self) -> list[ChatDelta]:
        calls = self._text.calls
        new = [_delta(index, calls[index]) for index in range(self._num_told, len(calls))]
        self._num_told = len(self._text.calls)
        return [{"tool_calls": new}] if new else []


def _delta(index: int, call: ToolCall) -> ToolCallDelta:
    """The whole call at once."""
    function = call["function"]
    return {
        "index": index,
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": function["arguments"]},
    }


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    door: FrontDoor = request.app.state.door
    work = Chat(door, await read_body(request, ChatRequest))
    headers = {"x-request-id": work.id}
    if work.streamed:
        return await open_stream(request, work.chunks(), headers, chat=True)
    return json_response(await while_connected(request.receive, work.whole()), headers=headers)


def chat_messages(messages: Sequence[Message], tools: Sequence[Tool]) -> pb.ChatMessages:
    return pb.ChatMessages(
        messages=[_message(message) for message in messages],
        tools=[
            pb.Tool(
                name=tool.function.name,
                description=tool.function.description or "",
                parameters=json.dumps(tool.function.parameters) if tool.function.parameters is not None else "",
            )
            for tool in tools
        ],
    )


def _message(message: Message) -> pb.ChatMessage:
    made = pb.ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content=_text(message.content),
        name=message.name or "",
    )
    if isinstance(message, AssistantMessage):
        for call in message.tool_calls or ():
            made.tool_calls.add(id=call.id, name=call.function.name, arguments=call.function.arguments)
    elif isinstance(message, ToolMessage):
        made.tool_call_id = message.tool_call_id
    return made


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
