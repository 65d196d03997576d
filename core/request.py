"""What a user asked for: sampling parameters, limits and the request itself. Token ids only; text is the router's."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from .api_key import ANYBODY, ApiKey
from .errors import InvalidRequest, PromptTooLong
from .logprobs import MAX_TOP_LOGPROBS

MAX_SEED = 2**63 - 1
MAX_LOGIT_BIASES = 300
MAX_FORMAT_CHARS = 200_000
MAX_PROMPT_LOGPROBS = 400_000  # tokens and alternatives of a prompt: they travel in one message


class FinishReason(Enum):
    """Why a request ended without an error."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens was reached


class FormatKind(Enum):
    """How an output format is written down."""

    JSON_SCHEMA = "json_schema"  # a JSON document that the schema accepts
    JSON_OBJECT = "json_object"  # any JSON object
    REGEX = "regex"  # text that matches as a whole
    GRAMMAR = "grammar"  # Lark's notation of EBNF, with the rule "start"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """What the text of an answer must look like."""

    kind: FormatKind
    source: str = ""  # schema, expression or grammar; empty for JSON_OBJECT

    def __post_init__(self) -> None:
        """Raises: InvalidRequest: it is empty or too long; whether it can be followed only its compiler knows."""
        if (self.kind is FormatKind.JSON_OBJECT) != (not self.source):
            raise InvalidRequest(
                f"the output format {self.kind.value} has {'text' if self.source else 'no text'}; "
                "send a schema, a regular expression or a grammar, and no text for json_object",
                field="output_format",
            )
        if len(self.source) > MAX_FORMAT_CHARS:
            raise InvalidRequest(
                f"the output format has {len(self.source):,} characters; at most {MAX_FORMAT_CHARS:,} are allowed",
                field="output_format",
            )


def derive_seed(seed: int, choice: int) -> int:
    """Seed of answer number `choice` (from 0) of a request for several; the first one's is the request's own.

    A front end runs n answers as n requests, so the same seed gives the same n answers through whichever of them.
    """
    if choice == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + choice.to_bytes(8, "little"), digest_size=8, person=b"choice")
    return int.from_bytes(digest.digest(), "little") & MAX_SEED


def seed_of_key(idempotency_key: str) -> int:
    """Seed of a request that names none: every router draws the same for the same key."""
    digest = hashlib.blake2b(idempotency_key.encode(), digest_size=8, person=b"key")
    return int.from_bytes(digest.digest(), "little") & MAX_SEED


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Token i of a request is a function of (logits, seed, i) alone."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps the whole vocabulary
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output tokens
    presence_penalty: float = 0.0  # over output tokens
    frequency_penalty: float = 0.0  # over output tokens
    seed: int = 0  # the router stamps a random one when the user sent none
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), each id once

    def __post_init__(self) -> None:
        """Raises: InvalidRequest: a value is outside its range or not a finite number."""
        ranges: tuple[tuple[str, float, float, float], ...] = (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 1e-6, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("top_k", self.top_k, 0, 2**31 - 1),
            ("seed", self.seed, 0, MAX_SEED),
        )
        for name, value, low, high in ranges:
            if not math.isfinite(value) or not low <= value <= high:
                limits = f"{low:,} to {high:,}" if isinstance(high, int) else f"{low:g} to {high:g}"
                raise InvalidRequest(f"{name} is {value}; it must be from {limits}", field=name)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias):,} tokens; at most {MAX_LOGIT_BIASES} are allowed",
                field="logit_bias",
            )
        for token_id, bias in self.logit_bias:
            if token_id < 0 or not -100.0 <= bias <= 100.0:  # NaN is outside too
                raise InvalidRequest(
                    f"logit_bias is {bias} for token {token_id}; token ids are not negative, biases from -100 to 100",
                    field="logit_bias",
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt on its way through the cluster, as router and workers see it.

    `output_token_ids` holds tokens already given to the client: a resumed request goes on after them, and they count
    toward `max_tokens` and the sampling position.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()  # includes the model's own end-of-sequence ids
    ignore_eos: bool = False  # then stop_token_ids is empty but for ids that the user named
    output_token_ids: tuple[int, ...] = ()
    attempt: int = 1
    priority: int = 0  # higher goes first
    timeout_s: float = 600.0  # from the receiver's now to the deadline
    waited_s: float = 0.0  # from its arrival to the receiver's now
    tenant: str = ""  # prefix-cache name space
    session: bytes = b""  # hash of a conversation or user, for routing that goes by it; workers are not told
    min_tokens: int = 0  # output tokens that must be there before stop_token_ids may come
    logprobs: int | None = None  # likeliest tokens to tell for each output token; None: no logprobs
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    output_format: OutputFormat | None = None
    key: ApiKey = ANYBODY  # who asked, for the router's admission; workers are not told

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV must exist before the next one can be sampled."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def validate(self, *, max_model_len: int, vocab_size: int) -> None:
        """Raises: InvalidRequest, PromptTooLong: this model cannot serve the request."""
        if not self.prompt_token_ids:
            raise InvalidRequest("the prompt is empty; send at least one token", field="prompt")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {self.max_tokens}; it must be at least 1", field="max_tokens")
        if len(self.prompt_token_ids) >= max_model_len:
            raise PromptTooLong(
                f"prompt of {len(self.prompt_token_ids):,} tokens leaves no room for output in max_model_len "
                f"{max_model_len:,}; shorten it or raise max_model_len",
                field="prompt",
            )
        if len(self.prompt_token_ids) + self.max_tokens > max_model_len:
            raise PromptTooLong(
                f"prompt of {len(self.prompt_token_ids):,} tokens plus max_tokens {self.max_tokens:,} exceeds "
                f"max_model_len {max_model_len:,}; lower max_tokens to "
                f"{max_model_len - len(self.prompt_token_ids):,} or raise max_model_len",
                field="max_tokens",
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens:,}; it must be from 0 to max_tokens {self.max_tokens:,}",
                field="min_tokens",
            )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= MAX_TOP_LOGPROBS:
                raise InvalidRequest(f"{name} is {count}; it must be from 0 to {MAX_TOP_LOGPROBS}", field=name)
        num_told = len(self.prompt_token_ids) * (1 + (self.prompt_logprobs or 0))
        if self.prompt_logprobs is not None and num_told > MAX_PROMPT_LOGPROBS:
            raise InvalidRequest(
                f"prompt_logprobs {self.prompt_logprobs} for {len(self.prompt_token_ids):,} tokens makes {num_told:,} "
                f"logprobs, at most {MAX_PROMPT_LOGPROBS:,} are told; ask for fewer or shorten the prompt",
                field="prompt_logprobs",
            )
        if self.output_format is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos cannot be had with an output format, which says itself where the answer ends; drop one",
                field="ignore_eos",
            )
        for token_id, _ in self.sampling.logit_bias:
            if token_id >= vocab_size:
                raise InvalidRequest(
                    f"logit_bias names token {token_id}, outside the vocabulary of {vocab_size:,}", field="logit_bias"
                )
        for field_name, token_ids in (
            ("prompt", self.prompt_token_ids),
            ("received_token_ids", self.output_token_ids),
            ("stop_token_ids", self.stop_token_ids),
        ):
            low, high = _range_of(token_ids)
            if low < 0 or high >= vocab_size:
                raise InvalidRequest(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size:,}",
                    field=field_name,
                )
        if len(self.output_token_ids) > self.max_tokens:
            raise InvalidRequest(
                f"received_token_ids holds {len(self.output_token_ids)} tokens, more than max_tokens {self.max_tokens}",
                field="received_token_ids",
            )


def _range_of(token_ids: Collection[int]) -> tuple[int, int]:
    """The smallest and the largest; 0 of none. A long prompt's in a quarter of the time that min() and max() take."""
    import numpy as np  # not by whoever only asks for --help

    if not token_ids:
        return 0, 0
    try:
        numbers = np.frombuffer(array("I", token_ids), dtype=np.uint32)
    except OverflowError:
        return min(token_ids), max(token_ids)
    return int(numbers.min()), int(numbers.max())
