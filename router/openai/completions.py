"""/v1/completions: prompts of text or token ids, each answered n times."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from ... import __version__
from ...core.errors import InvalidRequest
from ...proto import inference_pb2 as pb
from ..front_door import FrontDoor
from .answers import Answer, answer_request, check_num_answers, choices_of, collect, finish_text, merged, usage_of
from .body import read_body
from .connection import open_stream, while_connected
from .errors import json_response
from .logprobs import CompletionTokens
from .requests import CompletionRequest
from .responses import Completion, CompletionChoice, CompletionLogprobs, FinishText, Usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completions:
    """One request for completions, from its checked body to its answer."""

    def __init__(self, door: FrontDoor, body: CompletionRequest) -> None:
        """Raises: InvalidRequest: parameters that do not go together."""
        self._door = door
        self._body = body
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self.streamed = bool(body.stream)
        self._prompts = _prompts(body)
        self._n = body.n or 1
        self._made = max(body.best_of or 0, self._n)  # answers to each prompt, of which n are returned
        if body.suffix:
            raise InvalidRequest("suffix is not supported: the models served do not fill in the middle", field="suffix")
        if body.best_of is not None and body.best_of < self._n:
            raise InvalidRequest(f"best_of is {body.best_of}, less than n {self._n}", field="best_of")
        if body.stream and self._made > self._n:
            raise InvalidRequest("best_of cannot be streamed: the best is known at the end", field="best_of")
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options is only for stream", field="stream_options")
        check_num_answers(len(self._prompts), self._made, "best_of" if body.best_of else "n")
        self._scores_only = body.max_tokens == 0
        if self._scores_only and not body.echo:
            raise InvalidRequest(
                "max_tokens is 0: nothing to answer; it must be 1 or more without echo", field="max_tokens"
            )

    async def whole(self) -> Completion:
        """Raises: SplitserveError."""
        answers = await collect(self._door.answer, await self._requests(), self._body.timeout_s)
        choices: list[CompletionChoice] = []
        for number, prompt in enumerate(self._echoed()):
            made = answers[number * self._made : (number + 1) * self._made]
            if self._made > self._n:
                made = sorted(made, key=lambda answer: answer.mean_logprob, reverse=True)
            choices += [
                self._choice(len(choices) + rank, prompt, answer) for rank, answer in enumerate(made[: self._n])
            ]
        return {**self._head(choices), "usage": self._usage(answers)}

    async def chunks(self) -> AsyncGenerator[Completion]:
        """Raises: SplitserveError."""
        body = self._body
        requests = await self._requests()
        prompts = [prompt for prompt in self._echoed() for _ in range(self._n)]
        answers = [Answer() for _ in requests]
        tokens = [CompletionTokens(body.logprobs or 0) for _ in requests]
        async with aclosing(merged(self._door.answer, requests, body.timeout_s)) as messages:
            async for index, message in messages:
                answer = answers[index]
                num_texts, num_logprobs = len(answer.texts), len(answer.logprobs)
                answer.accept(message)
                kind = message.WhichOneof("event")
                text, rows = "".join(answer.texts[num_texts:]), list(answer.logprobs[num_logprobs:])
                if kind == "started":
                    continue
                if self._scores_only:
                    text, rows = "", []
                if prompts[index]:
                    text, prompts[index] = prompts[index] + text, ""
                if kind == "prompt_logprobs":
                    rows = answer.prompt_logprobs
                if text or rows:
                    shown = tokens[index].take(rows) if body.logprobs is not None else None
                    yield self._chunk(_choice(index, text, shown, None))
                if kind == "finished":
                    yield self._chunk(_choice(index, "", None, self._reason(answer)))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**self._head([]), "usage": self._usage(answers)}

    async def _requests(self) -> list[pb.GenerateRequest]:
        """One for each answer. A prompt with several is tokenised here, once."""
        body = self._body
        made = []
        for number, prompt in enumerate(self._prompts):
            request = answer_request(body, self.id if len(self._prompts) == 1 else f"{self.id}-{number}")
            request.max_tokens = 1 if self._scores_only else body.max_tokens or DEFAULT_MAX_TOKENS
            if body.logprobs is not None or self._made > self._n:
                request.logprobs = body.logprobs or 0
            if body.logprobs is not None and body.echo:
                request.prompt_logprobs = body.logprobs
            if isinstance(prompt, list):
                request.token_ids.ids[:] = prompt
            else:
                request.text = prompt
                if self._made > 1:
                    request.token_ids.ids[:] = await self._door.token_ids(request)
            made += choices_of(request, self._made)
        return made

    def _echoed(self) -> Sequence[str]:
        """For each prompt the text that its choices begin with."""
        if not self._body.echo:
            return [""] * len(self._prompts)
        return [prompt if isinstance(prompt, str) else self._door.text_of(prompt) for prompt in self._prompts]

    def _usage(self, answers: Sequence[Answer]) -> Usage:
        if self._scores_only:  # the one token that the router makes at least is nobody's
            for answer in answers:
                answer.finished.usage.num_output_tokens = 0
        return usage_of(answers, len(self._prompts))

    def _choice(self, index: int, prompt: str, answer: Answer) -> CompletionChoice:
        shown = None
        rows = [] if self._scores_only else answer.logprobs
        if self._body.logprobs is not None:
            shown = CompletionTokens(self._body.logprobs).take([*answer.prompt_logprobs, *rows])
        text = prompt if self._scores_only else prompt + answer.text
        return _choice(index, text, shown, self._reason(answer))

    def _reason(self, answer: Answer) -> FinishText:
        # Where no token was wanted, what became of the one that was made is nobody's.
        return "length" if self._scores_only else finish_text(answer.finished)

    def _chunk(self, choice: CompletionChoice) -> Completion:
        chunk = self._head([choice])
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            chunk["usage"] = None
        return chunk

    def _head(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._door.model,
            "system_fingerprint": f"splitserve-{__version__}",
            "choices": choices,
        }


async def completions(request: Request) -> Response:
    """Complete each prompt."""
    door: FrontDoor = request.app.state.door
    work = Completions(door, await read_body(request, CompletionRequest))
    headers = {"x-request-id": work.id}
    if work.streamed:
        return await open_stream(request, work.chunks(), headers)
    return json_response(await while_connected(request.receive, work.whole()), headers=headers)


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    """Raises: InvalidRequest: there is none."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    if not body.prompt:
        raise InvalidRequest("prompt is an empty list; send at least one", field="prompt")
    first = body.prompt[0]
    # Pydantic saw that the members are alike.
    return cast("Sequence[str | list[int]]", [body.prompt] if isinstance(first, int) else body.prompt)


def _choice(index: int, text: str, logprobs: CompletionLogprobs | None, reason: FinishText | None) -> CompletionChoice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
