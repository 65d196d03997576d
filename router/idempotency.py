"""What an idempotency key stands for: the request's digest, and for a while after its end the answer."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import IdempotencyConflict
from ..core.request import Request
from ..proto import inference_pb2
from .job import Job

MAX_ENDED = 1_024
MAX_KEPT_TOKENS = 1_000_000  # of prompts, answers and their logprobs that are kept
LATE_S = 10.0  # for which messages of an ended attempt may still come, whether or not its answer is kept
DEADLINE_SLACK_S = 1.0  # that the deadlines of two calls for one request may differ by


def digest_of(message: inference_pb2.GenerateRequest, prompt_ids: Sequence[int], caller: str) -> bytes:
    """The same for every call of one request, different for another one or another caller. The seed must be stamped.

    Args: prompt_ids: that came in `message.token_ids`, which may have lost them since. Of a text or a conversation they
        do not count: a template may print the time.
    """
    request = inference_pb2.GenerateRequest()
    request.CopyFrom(message)
    # Not what is asked for, but how, how often, or what is there already.
    request.ClearField("idempotency_key")
    request.ClearField("call")
    request.ClearField("received_token_ids")
    request.ClearField("prompt_logprobs")
    request.ClearField("priority")
    request.ClearField("session")
    request.ClearField("protocol_version")
    ids = b""
    if request.HasField("token_ids"):
        request.token_ids.ClearField("ids")
        ids = np.array(prompt_ids, dtype=np.uint32).tobytes()
    digest = hashlib.blake2b(digest_size=16)
    for part in (request.SerializeToString(deterministic=True), ids, caller.encode()):
        digest.update(len(part).to_bytes(8, "little"))  # nothing is taken for the end of what goes before
        digest.update(part)
    return digest.digest()


def check_same(job: Job, digest: bytes) -> None:
    """Raises: IdempotencyConflict: the key of the job came with another request."""
    if job.digest != digest:
        raise IdempotencyConflict(
            f"idempotency_key {job.request.request_id!r} names another request, which is live or just ended; "
            "send the same request again, or take a new key",
            field="idempotency_key",
        )


def can_read(job: Job, request: Request, deadline_at: float) -> bool:
    """Whether the job's answer, as far as it is or will be there, is what a later call of the same request needs."""
    received, given = request.output_token_ids, job.asked
    return (
        len(received) >= len(given.output_token_ids)
        and received == tuple(job.answer.token_ids[: len(received)])
        and request.prompt_logprobs in (None, given.prompt_logprobs)
        and (job.answer.ended or deadline_at <= job.deadline_at + DEADLINE_SLACK_S)
    )


@dataclass(frozen=True, slots=True)
class _Ended:
    at_s: float
    last_attempt: int
    job: Job | None  # of an answer that is kept
    size: int  # of that, in tokens


class EndedRequests:
    """Requests that ended of late, bounded in time, number and tokens.

    A client that lost the last message gets the same answer again, and whoever uses a key anew gets attempts above the
    old ones, whose late messages then match nothing.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._ended: OrderedDict[str, _Ended] = OrderedDict()
        self._num_tokens = 0

    def add(self, job: Job) -> None:
        kept = job if job.error is None else None
        ended = _Ended(time.monotonic(), job.answer.attempt, kept, _size_of(kept))
        self._forget(job.request.request_id)
        self._ended[job.request.request_id] = ended
        self._num_tokens += ended.size
        self._make_room()

    def last_attempt(self, request_id: str) -> int:
        """Number of the last attempt made here under this id; 0 if there was none of late."""
        self._make_room()
        ended = self._ended.get(request_id)
        return ended.last_attempt if ended is not None else 0

    def finished(self, request_id: str) -> Job | None:
        """The job whose answer is kept."""
        self._make_room()
        ended = self._ended.get(request_id)
        return ended.job if ended is not None and ended.at_s > time.monotonic() - self._keep_s else None

    def _make_room(self) -> None:
        oldest_s = time.monotonic() - max(self._keep_s, LATE_S)
        while self._ended:
            request_id, ended = next(iter(self._ended.items()))
            if ended.at_s >= oldest_s and len(self._ended) <= MAX_ENDED and self._num_tokens <= MAX_KEPT_TOKENS:
                return
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        if (ended := self._ended.pop(request_id, None)) is not None:
            self._num_tokens -= ended.size


def _size_of(job: Job | None) -> int:
    """In tokens; a token of which a logprob is told counts once more, and so does each that could have been chosen."""
    if job is None:
        return 0
    told = [row for row in (*job.answer.prompt_logprobs, *job.answer.logprobs) if row is not None]
    return job.request.num_prompt_tokens + len(job.answer.token_ids) + sum(1 + len(row.top) for row in told)
