"""Which workers go together: KV moves only between equals, so every request is placed within one group of them.

During a rolling upgrade two groups serve side by side, the old version and the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .step_times import known_or_best

if TYPE_CHECKING:
    from .routing import ClusterView, DecodeLoad, PrefillLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What two workers must have in common to be a pair."""

    weights: str  # digest of the model, its revision and its KV's shape; dtype and block size are converted
    protocol: int  # version of the protocol that they speak


def groups_of(prefills: Iterable[PrefillLoad], decodes: Iterable[DecodeLoad]) -> tuple[Group, ...]:
    """Those that the workers fall into, each once."""
    groups = [load.group for load in prefills] + [load.group for load in decodes]
    return tuple(dict.fromkeys(group for group in groups if group is not None))


def one_group(view: ClusterView, weights: str = "") -> ClusterView:
    """The part of the cluster that a request may be placed on: the group where its prefill would start first, on a
    colocated worker where no prefill worker lives, then the one with most KV to spare. All of it, if there is one group
    only.

    Args: weights: what computed the tokens that its client has; no others may go on with them. "": any may.
    """
    groups = [group for group in view.groups if not weights or group.weights == weights]
    if groups == list(view.groups) and len(groups) < 2:
        return view
    parts = [_part(view, group) for group in groups]
    return min(parts, key=_rank, default=replace(view, prefills=(), decodes=(), groups=()))


def _part(view: ClusterView, group: Group) -> ClusterView:
    return replace(
        view,
        prefills=[load for load in view.prefills if load.group == group],
        decodes=[load for load in view.decodes if load.group == group],
        any_prefill_alive=group in view.alive_groups,
        groups=(group,),
    )


def _rank(part: ClusterView) -> tuple[bool, float, int]:
    """Parts that can take a request come first."""
    waits = [load.wait_s for load in part.prefills if load.is_open(part.prefill_bound_s)]
    if not part.any_prefill_alive and (alone := [load for load in part.decodes if load.colocated]):
        waits = [_local_wait_s(alone)]
    can = bool(part.decodes) and bool(waits)
    return (not can, min(waits, default=0.0), -sum(load.available_blocks for load in part.decodes))


def _local_wait_s(loads: Sequence[DecodeLoad]) -> float:
    """Until one of them would start a prompt by itself."""
    tokens = [load.local_prefill_tokens for load in loads]
    if not all(tokens):
        return 0.0
    tokens_s = known_or_best([load.compute_s(number) / number for load, number in zip(loads, tokens, strict=True)])
    return min(number * token_s for number, token_s in zip(tokens, tokens_s, strict=True))
