"""What the SDK returns: frozen dataclasses, made from protobuf messages at this edge."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

from ..core.logprobs import TokenLogprob
from ..core.request import FinishReason
from ..proto import inference_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The tokens of one step of an answer."""

    index: int  # position in the answer of the first token, counted from 0 and including received_token_ids
    token_ids: tuple[int, ...]
    text: str  # what became certain with them; may be empty, never ends inside a character or a stop string
    at_s: float  # arrival here, since the request was sent
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, if asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request."""

    num_prompt_tokens: int
    num_output_tokens: int  # received_token_ids included
    num_cached_tokens: int  # prompt tokens that the prefill worker's cache already held


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEvent:
    """One life-cycle event of a request."""

    event: str
    offset_s: float  # since arrival at the router


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """The router's timeline of one request; seconds, 0 where a part did not happen."""

    queue_s: float  # arrival to dispatch
    grant_s: float  # asking the decode worker for room; where that is ample, beside what follows
    prefill_queue_s: float  # waiting in the prefill worker
    prefill_s: float  # first prefill step to first token
    ttft_s: float  # arrival to first token leaving the router
    transfer_s: float  # first KV layer ready to commit
    transfer_exposed_s: float  # part of transfer_s after the end of prefill
    decode_queue_s: float  # commit to first decode step
    decode_s: float  # first token to last token
    e2e_s: float  # arrival to end
    kv_bytes: int  # moved between the workers
    transport: str  # "cuda_ipc", "shared_memory", "nccl", "gloo", "grpc" or "none"
    prefill_worker: str
    decode_worker: str
    attempts: int  # 1 is the normal case
    preemptions: int
    events: tuple[TimelineEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """One finished answer. Text and tokens are those that this call brought, without received_token_ids."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int  # in use: send it again for the same answer
    usage: Usage
    timing: RequestTiming  # as the router saw it
    token_times_s: tuple[float, ...]  # arrival here of each token, since the request was sent
    e2e_s: float  # sent to last token, measured here
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, if asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # one per prompt token, if asked for; the first one's rank is 0

    @property
    def ttft_s(self) -> float | None:
        """Sent to first token, measured here; None for an answer without tokens."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """(e2e - TTFT) / (tokens - 1), measured here; None below two tokens."""
        if len(self.token_times_s) < 2:
            return None
        return (self.e2e_s - self.token_times_s[0]) / (len(self.token_times_s) - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Each single gap between two tokens, measured here."""
        return tuple(later - earlier for earlier, later in pairwise(self.token_times_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model being served."""

    name: str
    max_model_len: int  # most tokens of prompt and answer together
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """A prompt's tokens."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]  # each one's text


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as the router sees it."""

    address: str
    role: str  # "prefill", "decode" or "colocated"
    state: str  # "connecting", "ready", "draining", "refused" or "gone"
    reason: str  # why it is refused or unreachable; empty when ready
    worker_id: str
    num_running: int
    num_waiting: int
    num_available_blocks: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus:
    """A snapshot of one router."""

    workers: tuple[WorkerView, ...]
    num_queued: int
    num_live: int
    num_finished: int
    num_failed: int
    num_cancelled: int
    router_id: str  # its name in the cluster; "" if it was given none


def usage_from_proto(message: pb.Usage) -> Usage:
    return Usage(**{f.name: getattr(message, f.name) for f in fields(Usage)})


def timing_from_proto(message: pb.RequestTiming) -> RequestTiming:
    events = tuple(TimelineEvent(event=row.event, offset_s=row.offset_s) for row in message.events)
    rest = {f.name: getattr(message, f.name) for f in fields(RequestTiming) if f.name != "events"}
    return RequestTiming(events=events, **rest)


def models_from_proto(message: pb.ListModelsResponse) -> tuple[Model, ...]:
    return tuple(Model(**{f.name: getattr(row, f.name) for f in fields(Model)}) for row in message.models)


def tokenization_from_proto(message: pb.TokenizeResponse) -> Tokenization:
    return Tokenization(token_ids=tuple(message.token_ids), tokens=tuple(message.tokens))


def status_from_proto(message: pb.GetRouterStatusResponse) -> RouterStatus:
    workers = tuple(WorkerView(**{f.name: getattr(row, f.name) for f in fields(WorkerView)}) for row in message.workers)
    counts = {f.name: getattr(message, f.name) for f in fields(RouterStatus) if f.name != "workers"}
    return RouterStatus(workers=workers, **counts)
