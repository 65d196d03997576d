"""Protobuf messages to core dataclasses and back: messages never travel further in than this."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..core.errors import InvalidRequest, ProtocolMismatch, SplitserveError, Superseded, from_code
from ..core.logprobs import TokenLogprob, TopLogprob
from ..core.request import FinishReason, FormatKind, OutputFormat, Request, SamplingParams
from . import inference_pb2, kv_transfer_pb2, worker_pb2

PROTOCOL_VERSION = 1

_REASON_TO_PROTO = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_REASON_FROM_PROTO = {value: reason for reason, value in _REASON_TO_PROTO.items()}

_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


def check_protocol(version: int, peer: str) -> None:
    """Raises: ProtocolMismatch: the peer speaks a newer protocol than this build (0, unset, reads as 1)."""
    if version > PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"{peer} speaks protocol version {version}, this build speaks {PROTOCOL_VERSION}; upgrade this side first"
        )


def reason_to_proto(reason: FinishReason | None) -> inference_pb2.FinishReason.ValueType:
    return _REASON_TO_PROTO[reason]


def reason_from_proto(reason: inference_pb2.FinishReason.ValueType) -> FinishReason | None:
    """Raises: ProtocolMismatch: a reason that this build does not know."""
    if reason not in _REASON_FROM_PROTO:
        raise ProtocolMismatch(f"finish reason {reason} is not known here; upgrade this side to the peer's version")
    return _REASON_FROM_PROTO[reason]


def sampling_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Unset fields take the dataclass's defaults. Raises: InvalidRequest: a value is out of range."""
    present = {name: getattr(message, name) for name in _SAMPLING_FIELDS if message.HasField(name)}
    return SamplingParams(**present, logit_bias=tuple(sorted(message.logit_bias.items())))


def sampling_to_proto(params: SamplingParams) -> inference_pb2.SamplingParams:
    plain = {name: getattr(params, name) for name in _SAMPLING_FIELDS}
    return inference_pb2.SamplingParams(**plain, logit_bias=dict(params.logit_bias))


def format_from_proto(message: inference_pb2.OutputFormat) -> OutputFormat:
    """Raises: InvalidRequest: it says nothing, or nothing that makes sense."""
    kind = message.WhichOneof("format")
    if kind is None or (kind == "json_object" and not message.json_object):
        raise InvalidRequest("the output format is empty; leave it out or set one of its fields", field="output_format")
    return OutputFormat(kind=FormatKind(kind), source="" if kind == "json_object" else getattr(message, kind))


def format_to_proto(output_format: OutputFormat | None) -> inference_pb2.OutputFormat | None:
    if output_format is None:
        return None
    if output_format.kind is FormatKind.JSON_OBJECT:
        return inference_pb2.OutputFormat(json_object=True)
    return inference_pb2.OutputFormat(**{output_format.kind.value: output_format.source})


def logprob_to_proto(row: TokenLogprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=row.token_id,
        logprob=row.logprob,
        rank=row.rank,
        text=row.text,
        top=[inference_pb2.TopLogprob(token_id=t.token_id, logprob=t.logprob, text=t.text) for t in row.top],
    )


def logprob_from_proto(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=message.token_id,
        logprob=message.logprob,
        rank=message.rank,
        text=message.text,
        top=tuple(TopLogprob(token_id=t.token_id, logprob=t.logprob, text=t.text) for t in message.top),
    )


def transport_name(transport: int) -> str:
    """What users are told of a transport, such as "cuda_ipc"; "unknown" if it is of a newer version."""
    if transport not in kv_transfer_pb2.Transport.values():
        return "unknown"
    name: str = kv_transfer_pb2.Transport.DESCRIPTOR.values_by_number[transport].name
    return name.removeprefix("TRANSPORT_").lower()


def ids_from_proto(ids: Sequence[int]) -> list[int]:
    """A repeated uint32 as a list: numpy reads its memory, twice as fast as asking for one after the other."""
    import numpy as np  # not in clients

    numbers: list[int] = np.array(ids, dtype=np.uint32).tolist()
    return numbers


def request_to_proto(
    request: Request,
    timeout_s: float,
    waited_s: float = 0.0,
    into: worker_pb2.WorkRequest | None = None,
    prompt_ids: Sequence[int] = (),
) -> worker_pb2.WorkRequest:
    """Args:
    timeout_s, waited_s: seconds left until the deadline, and since its arrival, as of now.
    into: a field of another message; made apart and copied in, a long prompt costs twice as much.
    prompt_ids: the prompt's, if a message holds them: from there they are copied at once.
    """
    message = worker_pb2.WorkRequest() if into is None else into
    message.request_id, message.attempt = request.request_id, request.attempt
    message.prompt_token_ids.extend(prompt_ids or request.prompt_token_ids)
    message.output_token_ids.extend(request.output_token_ids)
    message.max_tokens, message.min_tokens = request.max_tokens, request.min_tokens
    message.sampling.CopyFrom(sampling_to_proto(request.sampling))
    message.stop_token_ids.extend(sorted(request.stop_token_ids))
    message.priority, message.tenant = request.priority, request.tenant
    message.timeout_s, message.waited_s = timeout_s, waited_s
    if request.logprobs is not None:
        message.logprobs = request.logprobs
    if request.prompt_logprobs is not None:
        message.prompt_logprobs = request.prompt_logprobs
    if request.output_format is not None:
        message.output_format.CopyFrom(format_to_proto(request.output_format))
    return message


def request_from_proto(message: worker_pb2.WorkRequest, request_id: str = "") -> Request:
    """`request_id`: under another name. Raises: InvalidRequest: it names no request or a value is out of range."""
    if not message.request_id or message.attempt < 1:
        raise InvalidRequest("a work request needs a request_id and an attempt from 1")
    for field in ("timeout_s", "waited_s"):
        if math.isnan(getattr(message, field)):
            raise InvalidRequest(f"{field} is NaN; it must be a number of seconds", field=field)
    return Request(
        request_id=request_id or message.request_id,
        attempt=message.attempt,
        prompt_token_ids=tuple(ids_from_proto(message.prompt_token_ids)),
        output_token_ids=tuple(message.output_token_ids),
        max_tokens=message.max_tokens,
        sampling=sampling_from_proto(message.sampling),
        stop_token_ids=frozenset(message.stop_token_ids),
        priority=message.priority,
        timeout_s=message.timeout_s,
        waited_s=max(0.0, message.waited_s),
        tenant=message.tenant,
        min_tokens=message.min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        output_format=format_from_proto(message.output_format) if message.HasField("output_format") else None,
    )


def failure_to_proto(error: SplitserveError) -> worker_pb2.Failure:
    failure = worker_pb2.Failure(
        code=error.code, message=error.message, retry_after_s=error.retry_after_s or 0.0, field=error.field or ""
    )
    if isinstance(error, Superseded):
        failure.newest_call, failure.newest_age_s = error.newest_call, error.age_s
    return failure


def failure_from_proto(failure: worker_pb2.Failure) -> SplitserveError:
    error = from_code(
        failure.code, failure.message, retry_after_s=failure.retry_after_s or None, field=failure.field or None
    )
    if isinstance(error, Superseded):
        error.newest_call, error.age_s = failure.newest_call, failure.newest_age_s
    return error
