"""How likely the model found a token, as it travels from the engine to the client."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprob:
    """A token that could have been chosen."""

    token_id: int
    logprob: float
    text: bytes = b""  # need not be whole characters; empty inside the cluster: text is the router's


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities: the softmax of its logits before anything changes them."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest token; 0: the first token of a prompt, of which nothing is known
    text: bytes = b""
    top: tuple[TopLogprob, ...] = ()  # the likeliest first, as many as were asked for
