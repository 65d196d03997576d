"""A prompt and its options, checked here and turned into the message that travels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from ..core.errors import InvalidRequest
from ..core.request import FormatKind, OutputFormat, SamplingParams
from ..proto import inference_pb2 as pb
from ..proto.convert import PROTOCOL_VERSION, format_to_proto
from .messages import Message, Messages, Tool, check_text, to_proto

Prompt = str | Sequence[int] | Messages


class RequestOptions(TypedDict, total=False):
    """Options of `generate`, `chat` and `stream`; what is left out takes the router's default."""

    model: str  # empty for the only one served
    max_tokens: int | None  # None: up to the model's limit
    temperature: float | None  # 0, the default, is greedy
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None  # None: the router picks one and the result tells it
    stop: str | Sequence[str]  # the answer ends before any of these
    stop_token_ids: Sequence[int]  # the answer ends after any of these
    ignore_eos: bool
    priority: int  # higher goes first
    tenant: str  # requests of different tenants never share KV
    session: str  # conversation or user, whose requests go to one pair of workers under the routing policy "session"
    timeout_s: float | None  # deadline from now, retries included; None: the client's default
    idempotency_key: str  # names the request across retries
    received_token_ids: Sequence[int]  # of this answer, from an earlier attempt; the stream goes on after them
    min_tokens: int  # the answer does not end by itself before it has so many
    logit_bias: Mapping[int, float]  # token id to what is added to its logit, -100 to 100; at most 300 tokens
    logprobs: int | None  # tell each token's log probability, and so many of the likeliest in its place (0 to 20)
    prompt_logprobs: int | None  # the same for the prompt's tokens
    json_schema: str | Mapping[str, Any]  # the answer is a JSON document that this schema accepts
    json_object: bool  # the answer is a JSON object
    regex: str  # the answer matches this regular expression as a whole
    grammar: str  # the answer follows this grammar: EBNF in Lark's notation, with the rule "start"
    tools: Sequence[Tool]  # functions that the model may ask for; with messages only


_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_PLAIN = (
    "model",
    "max_tokens",
    "stop_token_ids",
    "ignore_eos",
    "priority",
    "tenant",
    "session",
    "idempotency_key",
    "received_token_ids",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
)
_FORMATS = tuple(kind.value for kind in FormatKind)


def build_request(prompt: Prompt, options: RequestOptions) -> pb.GenerateRequest:
    """The message for `Generate`; `timeout_s` is the call's and not part of it.

    Raises: InvalidRequest: what can be seen to be wrong without the router.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    unknown = given.keys() - {*_SAMPLING, *_PLAIN, *_FORMATS, "logit_bias", "tools", "stop", "timeout_s"}
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; RequestOptions lists the known ones")
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    bias: Mapping[int, float] = given.get("logit_bias", {})
    SamplingParams(**sampling, logit_bias=tuple(bias.items()))  # refuses what is out of range; unset stays unset
    if given.get("max_tokens", 1) < 1:
        raise InvalidRequest(f"max_tokens is {given['max_tokens']}; it must be at least 1", field="max_tokens")
    stop = given.get("stop", ())
    for name in ("model", "tenant", "session", "idempotency_key"):
        check_text(given.get(name, ""), name)
    with _InvalidFields("request"):
        row = _input(prompt, given.get("tools", ()))
        token_ids = row.pop("token_ids", None)
        request = pb.GenerateRequest(
            **row,
            sampling=pb.SamplingParams(**sampling, logit_bias=bias),
            output_format=format_to_proto(_output_format(given)),
            stop=[check_text(text, "stop") for text in ([stop] if isinstance(stop, str) else stop)],
            protocol_version=PROTOCOL_VERSION,
            **{name: given[name] for name in _PLAIN if name in given},
        )
        if token_ids is not None:
            request.token_ids.ids.extend(token_ids)  # made apart and copied in, a long prompt costs twice as much
        return request


def build_tokenize_request(prompt: str | Messages, model: str, tools: Sequence[Tool] = ()) -> pb.TokenizeRequest:
    """Raises: InvalidRequest: the prompt is empty, malformed or already token ids."""
    with _InvalidFields("prompt"):
        row = _input(prompt, tools)
        if "token_ids" in row:
            raise InvalidRequest("the prompt already is token ids; send text or messages", field="prompt")
        return pb.TokenizeRequest(**row, model=check_text(model, "model"))


def build_detokenize_request(token_ids: Sequence[int], *, keep_special_tokens: bool) -> pb.DetokenizeRequest:
    """Raises: InvalidRequest: what cannot be a token id."""
    with _InvalidFields("request"):
        return pb.DetokenizeRequest(token_ids=token_ids, keep_special_tokens=keep_special_tokens)


def _output_format(given: Mapping[str, Any]) -> OutputFormat | None:
    """Raises: InvalidRequest: there are two, or one is not what it should be."""
    named = [name for name in _FORMATS if given.get(name) not in (None, False)]
    if len(named) > 1:
        raise InvalidRequest(f"{' and '.join(named)} were given; an answer has at most one format", field=named[1])
    if not named:
        return None
    kind, source = FormatKind(named[0]), given[named[0]]
    if kind is FormatKind.JSON_OBJECT:
        return OutputFormat(kind=kind)
    if kind is FormatKind.JSON_SCHEMA and isinstance(source, Mapping):
        source = json.dumps(source)
    return OutputFormat(kind=kind, source=check_text(source, named[0]))


def _input(prompt: Prompt, tools: Sequence[Tool] = ()) -> dict[str, Any]:
    """The one `input` field that the prompt fills; ids as they are."""
    if isinstance(prompt, bytes | bytearray):
        raise InvalidRequest("the prompt is bytes; decode it to text first", field="prompt")
    if len(prompt) == 0:
        raise InvalidRequest("the prompt is empty; send at least one token", field="prompt")
    if not isinstance(prompt, str) and isinstance(prompt[0], Message | Mapping):
        return {"messages": to_proto(cast(Messages, prompt), tools)}
    if tools:
        raise InvalidRequest("tools need a conversation; send messages instead of text or token ids", field="tools")
    if isinstance(prompt, str):
        return {"text": check_text(prompt, "prompt")}
    return {"token_ids": prompt}


class _InvalidFields:
    """Turns protobuf's complaints about a value's type or range into InvalidRequest."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TypeError | ValueError):
            raise InvalidRequest(f"a value of the {self._what} has the wrong type or range: {error}") from error
