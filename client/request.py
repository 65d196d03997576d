"""A prompt and its options, checked here and turned into the message that travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from ..core.errors import InvalidRequest
from ..core.request import SamplingParams
from ..proto import inference_pb2 as pb
from ..proto.convert import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str


Messages = Sequence[Message | Mapping[str, str]]
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
    timeout_s: float | None  # deadline from now, retries included; None: the client's default
    idempotency_key: str  # names the request across retries
    received_token_ids: Sequence[int]  # of this answer, from an earlier attempt; the stream goes on after them


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
    "idempotency_key",
    "received_token_ids",
)


def build_request(prompt: Prompt, options: RequestOptions) -> pb.GenerateRequest:
    """The message for `Generate`; `timeout_s` is the call's and not part of it.

    Raises: InvalidRequest: what can be seen to be wrong without the router.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    unknown = given.keys() - {*_SAMPLING, *_PLAIN, "stop", "timeout_s"}
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; RequestOptions lists the known ones")
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    SamplingParams(**sampling)  # refuses what is out of range; unset fields stay unset on the wire
    if given.get("max_tokens", 1) < 1:
        raise InvalidRequest(f"max_tokens is {given['max_tokens']}; it must be at least 1", field="max_tokens")
    stop = given.get("stop", ())
    for name in ("model", "tenant", "idempotency_key"):
        _check_text(given.get(name, ""), name)
    with _InvalidFields("request"):
        return pb.GenerateRequest(
            **_input(prompt),
            sampling=pb.SamplingParams(**sampling),
            stop=[_check_text(text, "stop") for text in ([stop] if isinstance(stop, str) else stop)],
            protocol_version=PROTOCOL_VERSION,
            **{name: given[name] for name in _PLAIN if name in given},
        )


def build_tokenize_request(prompt: str | Messages, model: str) -> pb.TokenizeRequest:
    """Raises: InvalidRequest: the prompt is empty, malformed or already token ids."""
    with _InvalidFields("prompt"):
        row = _input(prompt)
        if "token_ids" in row:
            raise InvalidRequest("the prompt already is token ids; send text or messages", field="prompt")
        return pb.TokenizeRequest(**row, model=_check_text(model, "model"))


def _input(prompt: Prompt) -> dict[str, Any]:
    """The one `input` field that the prompt fills."""
    if isinstance(prompt, bytes | bytearray):
        raise InvalidRequest("the prompt is bytes; decode it to text first", field="prompt")
    if len(prompt) == 0:
        raise InvalidRequest("the prompt is empty; send at least one token", field="prompt")
    if isinstance(prompt, str):
        return {"text": _check_text(prompt, "prompt")}
    if isinstance(prompt[0], Message | Mapping):
        return {"messages": pb.ChatMessages(messages=[_message(turn) for turn in cast(Messages, prompt)])}
    return {"token_ids": pb.TokenIds(ids=cast(Sequence[int], prompt))}


def _message(turn: Message | Mapping[str, str]) -> pb.ChatMessage:
    row = {"role": turn.role, "content": turn.content} if isinstance(turn, Message) else turn
    if not isinstance(row, Mapping) or row.keys() != {"role", "content"} or not row["role"]:
        raise InvalidRequest(
            f"a message holds {sorted(row) if isinstance(row, Mapping) else type(row).__name__}; "
            "it needs a role that is not empty, a content and nothing else",
            field="messages",
        )
    return pb.ChatMessage(
        role=_check_text(row["role"], "messages.role"), content=_check_text(row["content"], "messages.content")
    )


def _check_text(text: str, field: str) -> str:
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


class _InvalidFields:
    """Turns protobuf's complaints about a value's type or range into InvalidRequest."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TypeError | ValueError):
            raise InvalidRequest(f"a value of the {self._what} has the wrong type or range: {error}") from error
