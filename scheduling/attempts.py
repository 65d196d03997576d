"""Which token messages may reach the client: indices 0, 1, 2, ... once each, from the live attempt only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import KvCorrupted
from ..core.logprobs import TokenLogprob
from ..core.request import FinishReason

ATTEMPTS_PER_CALL = 1_000_000  # that the attempts of one call are numbered within


def first_attempt(call: int) -> int:
    """Number of the first attempt that a router makes for call `call` (from 0) of one request.

    So attempts are ordered over all routers that ever had the request, and a worker knows which of two is newer.
    """
    return call * ATTEMPTS_PER_CALL + 1


def call_of(attempt: int) -> int:
    """The call that an attempt is made for."""
    return attempt // ATTEMPTS_PER_CALL


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTokens:
    """One worker's word about one attempt: these tokens, from this position of the answer on."""

    request_id: str
    attempt: int
    index: int  # position of the first token
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  # the answer is complete with the last of them
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, if the request asked for them
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of all prompt tokens but the first, the same


class Answer:
    """One answer as it grows over the attempts that make it.

    Prefill and decode worker report over different streams, so messages come in any order and some twice: an early
    token waits for the ones before it, a repeated one is dropped, and whatever a revoked attempt still says is stale.

    Args:
        token_ids: tokens that the client already has.
        attempt: number of the first attempt.
    """

    def __init__(self, token_ids: Sequence[int] = (), attempt: int = 1) -> None:
        self.token_ids = list(token_ids)
        self.logprobs: list[TokenLogprob | None] = [None] * len(self.token_ids)  # None: not asked for, or not known
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self.attempt = attempt
        self.finish_reason: FinishReason | None = None
        self.ended = False
        self.num_stale = 0  # messages of another attempt, or after the end
        self.num_duplicates = 0  # tokens that were already there
        self._early: dict[int, int] = {}  # index to token, beyond the first gap
        self._early_logprobs: dict[int, TokenLogprob] = {}
        self._final: tuple[int, FinishReason] | None = None  # length of the complete answer, and why it ends there

    def next_attempt(self, call: int = 0) -> int:
        """Revoke the live attempt; the next one, of this call at least, goes on after the tokens that are there."""
        self.attempt = max(self.attempt + 1, first_attempt(call))
        self._early.clear()
        self._early_logprobs.clear()
        self._final = None
        return self.attempt

    def end(self) -> bool:
        """The terminal event: True once, then False."""
        first, self.ended = not self.ended, True
        return first

    def accept(self, message: NewTokens) -> int:
        """Take what is new in the message; returns how many tokens the answer grew by. Sets `finish_reason`.

        Raises: KvCorrupted: it contradicts a token of this answer. Sampling depends on logits and seed alone, so one
            of the two workers computed from other KV.
        """
        if self.ended or self.finish_reason is not None or message.attempt != self.attempt:
            self.num_stale += 1
            return 0
        before = len(self.token_ids)
        self.prompt_logprobs = self.prompt_logprobs or message.prompt_logprobs
        for index, token_id in enumerate(message.token_ids, message.index):
            known = self.token_ids[index] if index < before else self._early.get(index)
            if known is None:
                self._early[index] = token_id
                if message.logprobs:
                    self._early_logprobs[index] = message.logprobs[index - message.index]
            elif known == token_id:
                self.num_duplicates += 1
            else:
                raise KvCorrupted(
                    f"attempt {message.attempt} gave two tokens for position {index} of one answer ({known}, then "
                    f"{token_id}); its KV cache is not the prompt's"
                )
        if message.finish_reason is not None:
            self._final = (message.index + len(message.token_ids), message.finish_reason)
        limit = self._final[0] if self._final is not None else None
        while len(self.token_ids) != limit and (token := self._early.pop(len(self.token_ids), None)) is not None:
            self.logprobs.append(self._early_logprobs.pop(len(self.token_ids), None))
            self.token_ids.append(token)
        if self._final is not None and len(self.token_ids) == limit:
            self.finish_reason = self._final[1]
        return len(self.token_ids) - before
