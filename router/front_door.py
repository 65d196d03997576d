"""What every edge of the router asks: answers, tokens, models. The one place that checks, tokenises and streams."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from ..core.errors import InvalidRequest, Unavailable
from ..core.logprobs import TokenLogprob
from ..core.request import MAX_SEED, FinishReason, Request, seed_of_key
from ..engine.output_format import check_format
from ..proto import inference_pb2
from ..proto.convert import (
    check_protocol,
    format_from_proto,
    ids_from_proto,
    logprob_to_proto,
    reason_to_proto,
    sampling_from_proto,
)
from ..scheduling.admission import ModelLimits, check_model, make_request
from .conversation import template_input
from .dispatch import Dispatcher
from .idempotency import digest_of
from .job import Job
from .keys import CALLER
from .membership import WorkerPool
from .text import AnswerText, ModelText
from .timeline import Timeline

MAX_KEY_CHARS = 256
MAX_CALLS = 4_000  # attempts are numbered within 32 bits


class FrontDoor:
    """The gRPC servicer and the HTTP endpoints are thin over it; both speak to it in the messages of the protocol.

    Args:
        model: the name served.
        default_timeout_s: deadline of a call that has none.
        no_worker_wait_s: how long a call waits for the first worker after the router's start.
    """

    def __init__(
        self,
        model: str,
        text: ModelText,
        pool: WorkerPool,
        dispatcher: Dispatcher,
        *,
        default_timeout_s: float,
        no_worker_wait_s: float,
    ) -> None:
        self.model = model
        self._text = text
        self._pool = pool
        self._dispatcher = dispatcher
        self._default_timeout_s = default_timeout_s
        self._no_worker_wait_s = no_worker_wait_s
        self.draining = False
        self._num_preparing = 0

    async def answer(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        """One answer as its messages; close it to cancel the request.

        Args: timeout_s: until the deadline; None takes the router's default.
        Raises: SplitserveError.
        """
        arrived_at = time.monotonic()
        if self.draining:
            raise Unavailable("the router is shutting down; use another one", retry_after_s=1.0)
        self._dispatcher.check_room(request.idempotency_key, self._num_preparing)  # before anything is spent on it
        self._num_preparing += 1
        try:
            work = await self._prepare(request, timeout_s)
            await asyncio.sleep(0)  # tokens of others that came meanwhile go on first
        finally:
            self._num_preparing -= 1
        answer = AnswerText(self._text, request.stop, work.min_tokens)
        answer.push(work.output_token_ids)  # the client has this text; what it holds back may still come
        if (reason := _already_complete(work, answer)) is not None:
            yield self._started(work)
            if tail := answer.flush():  # the client knows whether it has it
                yield _tokens(len(work.output_token_ids), (), tail)
            yield _finished(reason, work, len(work.output_token_ids))
            return
        deadline_at = arrived_at + work.timeout_s
        prompt_ids = _take_prompt(request, work)
        digest = digest_of(request, prompt_ids, CALLER.get().name)  # with the seed that _prepare stamped
        with self._dispatcher.open(
            work,
            arrived_at=arrived_at,
            deadline_at=deadline_at,
            call=request.call,
            digest=digest,
            prompt_ids=prompt_ids,
        ) as reading:
            job = reading.job
            await asyncio.sleep(0)  # what was queued for the workers just now leaves first
            yield self._started(work)
            index = len(work.output_token_ids)
            told_prompt = work.prompt_logprobs is None
            while token_ids := await reading.read():
                if not told_prompt:
                    told_prompt = True
                    yield self._prompt_logprobs(work, job.answer.prompt_logprobs)
                text, used = answer.push(token_ids)
                if answer.stopped:
                    self._dispatcher.finish(job)
                yield _tokens(index, token_ids[:used], text, self._logprobs(job, index, used))
                index += used
                if answer.stopped:
                    break  # tokens that came while the above was sent are no part of the answer
            if tail := answer.flush():
                yield _tokens(index, (), tail)
            yield _finished(job.answer.finish_reason, work, index, job.timeline, job.failures.num + 1)

    def cancel(self, request_id: str) -> bool:
        """End a live request; False if there is none of this id that the caller's key may end."""
        return self._dispatcher.cancel(request_id, CALLER.get())

    @property
    def out_of_service(self) -> str:
        """Why it takes no requests; "" while somebody can serve one, now or when it is less busy."""
        if self.draining:
            return "the router is shutting down"
        return "" if self._pool.usable else "no pair of workers is ready"

    def models(self) -> list[inference_pb2.Model]:
        """What can be asked for right now."""
        limits = self._pool.limits
        if limits is None or not self._pool.usable:
            return []
        return [inference_pb2.Model(name=self.model, max_model_len=limits.max_model_len, vocab_size=limits.vocab_size)]

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """Raises: SplitserveError."""
        check_model(request.model, [self.model])
        token_ids = await self.token_ids(request)
        return inference_pb2.TokenizeResponse(token_ids=token_ids, tokens=self._text.token_texts(token_ids))

    def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        """Raises: SplitserveError."""
        check_model(request.model, [self.model])
        highest, limits = max(request.token_ids, default=0), self._pool.limits
        if limits is not None and highest >= limits.vocab_size:  # its text would be left out silently
            raise InvalidRequest(
                f"token id {highest} is outside the vocabulary of {limits.vocab_size:,}", field="token_ids"
            )
        text = self._text.decode(request.token_ids, keep_special_tokens=request.keep_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Of a prompt that is, or will be, checked."""
        return self._text.decode(token_ids)

    async def _prepare(self, message: inference_pb2.GenerateRequest, timeout_s: float | None) -> Request:
        """Check everything that can be checked without a worker. Raises: SplitserveError."""
        check_protocol(message.protocol_version, "the client")
        check_model(message.model, [self.model])
        if len(message.idempotency_key) > MAX_KEY_CHARS:
            raise InvalidRequest(
                f"idempotency_key has {len(message.idempotency_key)} characters; at most {MAX_KEY_CHARS} are allowed",
                field="idempotency_key",
            )
        if message.call > MAX_CALLS:
            raise InvalidRequest(f"call is {message.call:,}; at most {MAX_CALLS:,} are counted", field="call")
        if not message.sampling.HasField("seed"):
            key = message.idempotency_key
            message.sampling.seed = seed_of_key(key) if key else secrets.randbelow(MAX_SEED + 1)
        sampling = sampling_from_proto(message.sampling)
        output_format = None
        if message.HasField("output_format"):
            output_format = format_from_proto(message.output_format)
            await asyncio.to_thread(check_format, output_format)  # a large schema takes a while
        token_ids = await self.token_ids(message)
        return make_request(
            request_id=message.idempotency_key or secrets.token_hex(12),
            prompt_token_ids=token_ids,
            limits=await self.limits(),
            sampling=sampling,
            timeout_s=self._default_timeout_s if timeout_s is None else timeout_s,
            max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
            stop_token_ids=message.stop_token_ids,
            ignore_eos=message.ignore_eos,
            output_token_ids=message.received_token_ids,
            min_tokens=message.min_tokens,
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
            output_format=output_format,
            key=CALLER.get(),
            priority=message.priority,
            tenant=message.tenant,
            session=hashlib.blake2b(message.session.encode(), digest_size=16).digest() if message.session else b"",
        )

    async def token_ids(self, message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> list[int]:
        """The prompt's tokens. Raises: SplitserveError."""
        match message.WhichOneof("input"):
            case "text":
                return await self._text.encode(message.text)
            case "messages":
                return await self._text.encode_chat(*template_input(message.messages))
            case "token_ids" if isinstance(message, inference_pb2.GenerateRequest):
                return ids_from_proto(message.token_ids.ids)
            case _:
                raise InvalidRequest("the request has no input; send text, messages or token_ids", field="input")

    async def limits(self) -> ModelLimits:
        """What the workers can do; waits for the first worker."""
        if not self._pool.known.is_set():
            try:
                async with asyncio.timeout(self._no_worker_wait_s):
                    await self._pool.known.wait()
            except TimeoutError:
                raise Unavailable(
                    f"no worker was ready within {self._no_worker_wait_s:g} s; try again, or see the router's status",
                    retry_after_s=1.0,
                ) from None
        assert self._pool.limits is not None
        return self._pool.limits

    def _logprobs(self, job: Job, index: int, count: int) -> list[inference_pb2.TokenLogprob]:
        """Of `count` tokens of the answer from `index` on, if they were asked for."""
        if job.request.logprobs is None:
            return []
        rows = [row for row in job.answer.logprobs[index : index + count] if row is not None]
        return [logprob_to_proto(self._text.token_text.name(row)) for row in rows]

    def _prompt_logprobs(self, work: Request, rows: Sequence[TokenLogprob]) -> inference_pb2.GenerateResponse:
        first = TokenLogprob(token_id=work.prompt_token_ids[0], logprob=0.0, rank=0)
        named = [logprob_to_proto(self._text.token_text.name(row)) for row in (first, *rows)]
        return inference_pb2.GenerateResponse(prompt_logprobs=inference_pb2.PromptLogprobs(tokens=named))

    def _started(self, work: Request) -> inference_pb2.GenerateResponse:
        return inference_pb2.GenerateResponse(
            started=inference_pb2.Started(
                request_id=work.request_id,
                model=self.model,
                num_prompt_tokens=work.num_prompt_tokens,
                seed=work.sampling.seed,
            )
        )


def _take_prompt(message: inference_pb2.GenerateRequest, work: Request) -> Sequence[int]:
    """The prompt's ids in a message of their own, from which others copy them at once. `message` loses them."""
    prompt = inference_pb2.TokenIds()
    if message.HasField("token_ids"):
        prompt.ids.extend(message.token_ids.ids)
        message.token_ids.ClearField("ids")
    else:
        prompt.ids.extend(work.prompt_token_ids)
    return prompt.ids


def _already_complete(work: Request, answer: AnswerText) -> FinishReason | None:
    """Why an answer that the client resumes was complete already: only its last message was lost."""
    received = work.output_token_ids
    if answer.stopped or (received and received[-1] in work.stop_token_ids):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(received) >= work.max_tokens else None


def _tokens(
    index: int, token_ids: Sequence[int], text: str, logprobs: Sequence[inference_pb2.TokenLogprob] = ()
) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse()
    tokens = response.tokens  # filled in place: made apart and copied in, the busiest message costs twice as much
    tokens.index, tokens.text = index, text
    tokens.token_ids.extend(token_ids)
    if logprobs:
        tokens.logprobs.extend(logprobs)
    return response


def _finished(
    reason: FinishReason | None,
    work: Request,
    num_output_tokens: int,
    timeline: Timeline | None = None,
    attempts: int = 0,
) -> inference_pb2.GenerateResponse:
    usage = inference_pb2.Usage(num_prompt_tokens=work.num_prompt_tokens, num_output_tokens=num_output_tokens)
    timing = None
    if timeline is not None:
        timing = _timing(timeline, attempts)
        measured = timeline.prefill or timeline.decode
        usage.num_cached_tokens = measured.num_cached_tokens if measured is not None else 0
    finished = inference_pb2.Finished(reason=reason_to_proto(reason), usage=usage, timing=timing)
    return inference_pb2.GenerateResponse(finished=finished)


def _timing(timeline: Timeline, attempts: int) -> inference_pb2.RequestTiming:
    prefill, transfer, decode = timeline.prefill, timeline.transfer, timeline.decode
    timing = inference_pb2.RequestTiming(
        queue_s=_between(timeline.arrived_at, timeline.dispatched_at),
        grant_s=_between(timeline.asked_at, timeline.granted_at),
        ttft_s=_between(timeline.arrived_at, timeline.first_token_at),
        decode_s=_between(timeline.first_token_at, timeline.last_token_at),
        e2e_s=_between(timeline.arrived_at, timeline.ended_at),
        transport="none",
        prefill_worker=timeline.prefill_worker or timeline.decode_worker,
        decode_worker=timeline.decode_worker,
        attempts=attempts,
        events=[
            inference_pb2.TimelineEvent(event=event.value, offset_s=at_s - timeline.arrived_at)
            for event, at_s in timeline.in_order()
        ],
    )
    if prefill is not None:
        timing.prefill_queue_s, timing.prefill_s = prefill.queue_s, prefill.prefill_s
    if transfer is not None:
        timing.transfer_s, timing.transfer_exposed_s = transfer.transfer_s, transfer.exposed_s
        timing.kv_bytes, timing.transport = transfer.num_bytes, transfer.transport
    if decode is not None:
        timing.preemptions = decode.preemptions
        if transfer is not None:
            timing.decode_queue_s = decode.queue_s
        else:
            timing.prefill_queue_s, timing.prefill_s = decode.queue_s, decode.prefill_s
    return timing


def _between(start: float | None, end: float | None) -> float:
    return end - start if start is not None and end is not None else 0.0
