"""What a user asked for: sampling parameters, limits and the request itself. Token ids only; text is the router's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from .errors import InvalidRequest, PromptTooLong

MAX_SEED = 2**63 - 1


class FinishReason(Enum):
    """Why a request ended without an error."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens was reached


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
    tenant: str = ""  # prefix-cache name space

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
        low, high = min(self.prompt_token_ids), max(self.prompt_token_ids)
        if low < 0 or high >= vocab_size:
            raise InvalidRequest(
                f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size:,}",
                field="prompt",
            )
