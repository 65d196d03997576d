"""Which prefill and which decode worker serve a request: pure choice over what the router knows of their load."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

UNKNOWN_PREFILL_TOKENS_PER_S = 1_000.0  # until a worker has measured itself; low, so that little is sent on a guess


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLoad:
    """A prefill worker that takes work."""

    worker: str  # its address
    outstanding_tokens: int  # accepted or on their way, not computed yet
    outstanding_prompts: int  # with tokens among them
    tokens_per_s: float = 0.0  # 0 when unknown

    @property
    def wait_s(self) -> float:
        """Time until a new prompt would start."""
        return self.outstanding_tokens / (self.tokens_per_s or UNKNOWN_PREFILL_TOKENS_PER_S)

    def is_open(self, bound_s: float) -> bool:
        """Whether it may be sent another prompt.

        One always waits behind the one being computed, however long that is, or the worker would stand still for a
        round trip after each; with a bound of 0 all wait in the router.
        """
        return (bound_s > 0 and self.outstanding_prompts < 2) or self.wait_s <= bound_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLoad:
    """A decode or colocated worker that takes work."""

    worker: str  # its address
    available_blocks: int  # free or only cached, less what was sent since it last said so
    num_sequences: int
    colocated: bool = False  # can prefill by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one attempt runs; without a prefill worker the decode worker does everything."""

    prefill: str | None
    decode: str


def place(
    prefills: Sequence[PrefillLoad],
    decodes: Sequence[DecodeLoad],
    *,
    any_prefill_alive: bool,
    prefill_bound_s: float,
    avoid: Collection[str] = (),
) -> Placement | None:
    """The pair for the next request, or None: it stays queued, holding nothing.

    Prefill: the shortest wait of those within `prefill_bound_s` or about to run dry; more would only queue in the
    worker, out of reach of a better choice. Decode: most available KV, then fewest sequences. While no prefill worker
    is alive, a colocated worker runs the request by itself. Workers in `avoid` are taken only if there is no other.
    """
    local = not any_prefill_alive
    candidates = [load for load in decodes if load.colocated] if local else decodes
    decode = min(
        candidates,
        key=lambda load: (load.worker in avoid, -load.available_blocks, load.num_sequences),
        default=None,
    )
    if decode is None:
        return None
    if local:
        return Placement(prefill=None, decode=decode.worker)
    open_prefills = [load for load in prefills if load.is_open(prefill_bound_s)]
    prefill = min(open_prefills, key=lambda load: (load.worker in avoid, load.wait_s), default=None)
    return Placement(prefill=prefill.worker, decode=decode.worker) if prefill is not None else None
