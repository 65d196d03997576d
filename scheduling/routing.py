"""What a routing policy sees of the cluster and what it answers: loads of workers, one request, and a pair for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.kv_geometry import blocks_for
from .links import Place
from .pairing import Group
from .step_times import UNKNOWN_PREFILL_TOKENS_PER_S, StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLoad:
    """A prefill worker that takes work."""

    worker: str  # its address
    outstanding_tokens: int  # accepted or on their way, not computed yet
    outstanding_prompts: int  # with tokens among them
    own_prompts: int | None = None  # of them, those that this router sent; None: all
    tokens_per_s: float = 0.0  # 0 when unknown
    assumed_tokens_per_s: float = 0.0  # what others do; a guess of our own would keep a fresh worker without any work
    place: Place | None = None
    group: Group | None = None  # whom it can be paired with; None: everybody

    @property
    def wait_s(self) -> float:
        """Time until a new prompt would start."""
        return self.compute_s(self.outstanding_tokens)

    @property
    def speed(self) -> float:
        """Prompt tokens a second, a guess while it is unknown."""
        return self.tokens_per_s or self.assumed_tokens_per_s or UNKNOWN_PREFILL_TOKENS_PER_S

    def compute_s(self, num_tokens: int) -> float:
        """Time to compute so many prompt tokens."""
        return num_tokens / self.speed

    def is_open(self, bound_s: float) -> bool:
        """Whether it may be sent another prompt.

        One always waits behind the one being computed, however long that is, or the worker would stand still for a
        round trip after each. Every router has those two there, whatever the others have: the worker takes whichever
        came first, and can only do so if every router's oldest is there when one ends. With a bound of 0 all wait in
        the router.
        """
        own = self.outstanding_prompts if self.own_prompts is None else self.own_prompts
        return (bound_s > 0 and own < 2) or self.wait_s <= bound_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLoad:
    """A decode or colocated worker that takes work."""

    worker: str  # its address
    available_blocks: int  # free or only cached, less what was sent since it last said so
    num_sequences: int
    num_blocks: int = 0  # in all; 0 when unknown
    block_size: int = 16
    local_prefill_tokens: int = 0  # prompts that it still has to compute by itself
    times: StepTimes | None = None  # how long its steps take; None when unknown
    colocated: bool = False  # computes every prompt by itself if need be
    prefills_locally: bool = False  # computes short prompts by itself if told so
    place: Place | None = None
    group: Group | None = None  # whom it can be paired with; None: everybody

    @property
    def context_tokens(self) -> int:
        """Of its sequences together, to the block."""
        return max(0, self.num_blocks - self.available_blocks) * self.block_size

    def compute_s(self, num_tokens: int) -> float:
        """Time to compute so many prompt tokens by itself; infinite when unknown."""
        return self.times.prefill_step_s([(num_tokens, 0)]) if self.times is not None else math.inf

    def has_ample_room(self, num_tokens: int) -> bool:
        """Whether it will, in all likelihood, grant room for so many: what is known of it may be a second old."""
        return self.available_blocks >= 2 * blocks_for(num_tokens, self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRequest:
    """What placing one attempt at a request may depend on."""

    num_tokens: int  # whose KV must exist before the next token
    turn: int = 0  # number of the request in order of arrival
    draw: int = 0  # 64 random bits, drawn once: a request that is looked at again has the same luck
    session: bytes = b""  # equal for the requests of one conversation; empty when unknown
    ttft_slack_s: float | None = None  # until the first token is late; None: it has no time limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """The cluster at one moment. `prefills` and `decodes` hold workers that take work now."""

    prefills: Sequence[PrefillLoad]
    decodes: Sequence[DecodeLoad]
    any_prefill_alive: bool  # also one that takes no work at the moment
    prefill_bound_s: float  # work that a prefill worker may have outstanding
    kv_bytes_per_token: float = 0.0
    groups: Sequence[Group] = ()  # that the workers fall into
    alive_groups: Collection[Group] = ()  # with a prefill worker alive
    local_prefill_itl_s: float | None = None  # longest gap that a prompt prefilled on its decode worker may cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One request and the cluster at one moment; everything a policy decides on.

    Workers in `avoid` failed this request before: they are taken only if there is no other.
    """

    request: RoutedRequest
    view: ClusterView
    cached_tokens: Mapping[str, int] = field(default_factory=dict)  # worker -> leading tokens whose KV it holds
    held_tokens: Mapping[str, int] = field(default_factory=dict)  # worker -> of requests before this that wait for it
    avoid: Collection[str] = ()

    def wait_s(self, prefill: PrefillLoad) -> float:
        """Time until this request would start there, behind those that wait for the worker in the router."""
        return prefill.compute_s(prefill.outstanding_tokens + self.held_tokens.get(prefill.worker, 0))

    def uncached_tokens(self, worker: str) -> int:
        """Tokens that the worker would have to compute or be sent: the last one at least, for its logits."""
        return max(1, self.request.num_tokens - self.cached_tokens.get(worker, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one attempt runs; without a prefill worker the decode worker does everything.

    A prefill worker that is not open: the request waits in the router for this worker, and others may pass it.
    """

    prefill: str | None
    decode: str


class RoutingPolicy(Protocol):
    """Chooses the pair for a request, or None: it stays queued, holding nothing, and nobody passes it.

    Pure: equal snapshots get equal answers.
    """

    def __call__(self, snapshot: Snapshot) -> Placement | None: ...
