"""The answers that one HTTP request asks for: each is a request of its own to the router, and they run side by side."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from ...core.errors import InvalidRequest
from ...core.request import MAX_SEED, derive_seed
from ...proto import inference_pb2 as pb
from .requests import MAX_ANSWERS, GenerationRequest, JsonSchemaFormat
from .responses import FinishText, Timing, Usage

Ask = Callable[[pb.GenerateRequest, float | None], AsyncGenerator[pb.GenerateResponse]]

_SAMPLING = ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(slots=True, kw_only=True)
class Answer:
    """One answer as its messages come."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    num_prompt_tokens: int = 0
    finished: pb.Finished = field(default_factory=pb.Finished)

    def accept(self, message: pb.GenerateResponse) -> None:
        match message.WhichOneof("event"):
            case "tokens":
                self.texts.append(message.tokens.text)
                self.logprobs += message.tokens.logprobs
            case "finished":
                self.finished = message.finished
            case "started":
                self.num_prompt_tokens = message.started.num_prompt_tokens
            case "prompt_logprobs":
                self.prompt_logprobs += message.prompt_logprobs.tokens

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        """How likely the model finds its answer, per token."""
        return sum(row.logprob for row in self.logprobs) / max(1, len(self.logprobs))


def answer_request(body: GenerationRequest, request_id: str) -> pb.GenerateRequest:
    """All that completions and chat completions share; the input and max_tokens are the caller's to set.

    Raises: InvalidRequest: a value has no place in the message.
    """
    sampling = pb.SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,  # OpenAI's default
        seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed & MAX_SEED,
        logit_bias={_token_id(name): bias for name, bias in (body.logit_bias or {}).items()},
        **{name: getattr(body, name) for name in _SAMPLING if getattr(body, name) is not None},
    )
    if body.top_k is not None:
        sampling.top_k = max(0, body.top_k)
    return pb.GenerateRequest(
        model=body.model,
        sampling=sampling,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        priority=body.priority or 0,
        tenant=body.tenant or "",
        session=body.prompt_cache_key or body.user or "",
        idempotency_key=request_id,
        output_format=output_format(body),
    )


def output_format(body: GenerationRequest) -> pb.OutputFormat | None:
    """Raises: InvalidRequest: a schema is named but not given."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if isinstance(wanted, JsonSchemaFormat):
        if wanted.json_schema.schema_ is None:
            raise InvalidRequest("the JSON schema is missing", field="response_format.json_schema.schema")
        return pb.OutputFormat(json_schema=json.dumps(wanted.json_schema.schema_))
    if wanted.type == "regex":
        return pb.OutputFormat(regex=wanted.regex)
    if wanted.type == "grammar":
        return pb.OutputFormat(grammar=wanted.grammar)
    return pb.OutputFormat(json_object=True)


def choices_of(request: pb.GenerateRequest, num_choices: int) -> list[pb.GenerateRequest]:
    """The request once for each choice, with an id and a seed of its own."""
    made = []
    for number in range(num_choices):
        choice = pb.GenerateRequest()
        choice.CopyFrom(request)
        choice.sampling.seed = derive_seed(request.sampling.seed, number)
        if num_choices > 1:
            choice.idempotency_key += f"-{number}"
        made.append(choice)
    return made


def check_num_answers(num_prompts: int, num_choices: int, field: str) -> None:
    """Raises: InvalidRequest."""
    if num_prompts * num_choices > MAX_ANSWERS:
        raise InvalidRequest(
            f"{num_prompts} prompts with {num_choices} answers each are {num_prompts * num_choices:,} answers; "
            f"at most {MAX_ANSWERS} are made for one request",
            field=field,
        )


async def collect(ask: Ask, requests: Sequence[pb.GenerateRequest], timeout_s: float | None) -> list[Answer]:
    """Every answer, whole. Raises: SplitserveError: one of them failed, and the others were cancelled."""
    answers = [Answer() for _ in requests]
    async with aclosing(merged(ask, requests, timeout_s)) as messages:
        async for index, message in messages:
            answers[index].accept(message)
    return answers


async def merged(
    ask: Ask, requests: Sequence[pb.GenerateRequest], timeout_s: float | None
) -> AsyncGenerator[tuple[int, pb.GenerateResponse]]:
    """The messages of all answers as they come. Raises: SplitserveError: of the first that failed."""
    if len(requests) == 1:
        async with aclosing(ask(requests[0], timeout_s)) as stream:
            async for message in stream:
                yield 0, message
        return
    arrived: asyncio.Queue[tuple[int, pb.GenerateResponse] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(index: int, request: pb.GenerateRequest) -> None:
        async with aclosing(ask(request, timeout_s)) as stream:
            async for message in stream:
                arrived.put_nowait((index, message))

    tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    try:
        num_left = len(tasks)
        while num_left:
            item = await arrived.get()
            if isinstance(item, asyncio.Task):
                item.result()
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def finish_text(finished: pb.Finished) -> FinishText:
    return "length" if finished.reason == pb.FINISH_REASON_LENGTH else "stop"


def usage_of(answers: Sequence[Answer], num_prompts: int) -> Usage:
    """A prompt counts once, however many answers it got."""
    per_prompt = len(answers) // num_prompts
    prompt_tokens = sum(answer.num_prompt_tokens for answer in answers[::per_prompt])
    completion_tokens = sum(answer.finished.usage.num_output_tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(answer.finished.usage.num_cached_tokens for answer in answers[::per_prompt])
        },
        "timing": [_timing(answer.finished) for answer in answers],
    }


def _timing(finished: pb.Finished) -> Timing:
    timing = finished.timing
    return {
        "queue_s": timing.queue_s,
        "grant_s": timing.grant_s,
        "prefill_queue_s": timing.prefill_queue_s,
        "prefill_s": timing.prefill_s,
        "ttft_s": timing.ttft_s,
        "transfer_s": timing.transfer_s,
        "transfer_exposed_s": timing.transfer_exposed_s,
        "decode_queue_s": timing.decode_queue_s,
        "decode_s": timing.decode_s,
        "e2e_s": timing.e2e_s,
        "kv_bytes": timing.kv_bytes,
        "transport": timing.transport,
        "prefill_worker": timing.prefill_worker,
        "decode_worker": timing.decode_worker,
        "attempts": timing.attempts,
        "preemptions": timing.preemptions,
        "cached_tokens": finished.usage.num_cached_tokens,
    }


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < 2**32):
        raise InvalidRequest(f"logit_bias names token {name[:20]!r}; token ids are numbers", field="logit_bias")
    return int(name)
