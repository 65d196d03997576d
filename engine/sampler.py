"""Choose the next token of each sequence: token i of a request is a function of (logits, seed, i) alone.

An exponential race, also known as the Gumbel-max trick: token t arrives after noise(seed, i, t) / probability(t), and
the first to arrive is chosen, with just that probability. The noise is a hash, so the choice depends neither on the
batch nor on the worker, and no generator state has to move with a request. Nor does it depend on a sum over the
vocabulary: where two workers' logits differ by rounding, only a race as close as that goes the other way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.request import SamplingParams

_HOPELESS = 1e-12  # noise spans a factor of 2e11: less than this part of the likeliest token's weight never wins
_MANY = 1024  # the nucleus is nearly always found among so many tokens, and a full sort costs ten times as much


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleInput:
    """What one row of logits is sampled with."""

    params: SamplingParams
    index: int  # of the token to sample among the request's output tokens
    token_ids: Sequence[int] = ()  # prompt and output so far; only penalties look at them
    num_prompt_tokens: int = 0
    banned: Collection[int] = ()  # must not be chosen, unless nothing else can be
    allowed: Tensor | None = None  # [vocab] bool on the CPU: nothing else may be chosen

    @property
    def changes_logits(self) -> bool:
        return bool(self.params.has_penalties or self.params.logit_bias or self.banned or self.allowed is not None)


def noise_keys(seed: int, index: int) -> tuple[int, int]:
    """Two numbers of 32 random bits: what `noise` of one draw is made from, the same on every machine."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def noise(keys: tuple[int, int], token_ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Exponentially distributed numbers with mean 1, between 1e-10 and 23, one for each of `token_ids`."""
    bits = token_ids * np.uint32(0x9E3779B1) + np.uint32(keys[0])
    bits = _mix(_mix(bits) ^ np.uint32(keys[1]))
    exponential: npt.NDArray[np.float64] = -np.log1p((bits + 0.5) * -(2.0**-32))
    return exponential


def _mix(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The finaliser of MurmurHash3: a bijection in which every bit changes every other."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))


@torch.inference_mode()
def sample(logits: Tensor, inputs: Sequence[SampleInput]) -> list[int | None]:
    """Next token of each row of `logits` [num_rows, vocab] fp32: `adjust`, temperature, top-k, top-p, min-p, choice.

    A filter keeps ties with the last token that it keeps. None where the logits say nothing: one is NaN, or the highest
    is infinite.
    """
    logits = adjust(logits, inputs)
    likeliest = logits.argmax(dim=-1, keepdim=True)  # a NaN, if there is one
    sound = logits.gather(1, likeliest).isfinite()[:, 0].tolist()
    chosen = [i if is_sound else None for i, is_sound in zip(likeliest[:, 0].tolist(), sound, strict=True)]
    rows = [i for i, row in enumerate(inputs) if sound[i] and not row.params.is_greedy]
    if rows:
        picked = _draw(logits[rows], [inputs[i] for i in rows])
        for i, token_id in zip(rows, picked, strict=True):
            chosen[i] = token_id
    return chosen


def adjust(logits: Tensor, inputs: Sequence[SampleInput]) -> Tensor:
    """The logits [num_rows, vocab] that tokens are chosen by, on whatever device; the model's own are left as they are.

    In this order: penalties, bias, what the output format allows, and what is banned for now.
    """
    if not any(row.changes_logits for row in inputs):
        return logits
    logits = logits.float().clone()
    for values, row in zip(logits, inputs, strict=True):
        if row.params.has_penalties:
            _penalise(values, row)
        if row.params.logit_bias:
            ids, biases = zip(*row.params.logit_bias, strict=True)
            values[torch.tensor(ids, device=values.device)] += torch.tensor(biases, device=values.device)
        if row.allowed is not None:
            values.masked_fill_(~row.allowed.to(values.device), -torch.inf)
        if row.banned:
            left = values.index_fill(0, torch.tensor(list(row.banned), device=values.device), -torch.inf)
            values.copy_(torch.where(left.max() > -torch.inf, left, values))  # no answer from the device is awaited
    return logits


def _penalise(logits: Tensor, row: SampleInput) -> None:
    """Apply a row's penalties in place to its `logits` [vocab]."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(row.token_ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output = row.token_ids[row.num_prompt_tokens :]
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.unique(torch.tensor(output, device=logits.device), return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(logits: Tensor, rows: Sequence[SampleInput]) -> list[int]:
    """The winner of each row's race over its filtered distribution."""
    # In float64, because a low temperature blows small differences up; the lowest ones make them infinite.
    behind = logits.double() - logits.amax(dim=-1, keepdim=True)
    temperatures = torch.tensor([[row.params.temperature] for row in rows], dtype=torch.float64)
    weights = (behind / temperatures).exp()  # the likeliest token has 1
    picked = []
    for values, row in zip(weights, rows, strict=True):
        _filter(values, row.params)
        kept = (values > _HOPELESS).nonzero()[:, 0].numpy()
        arrivals = noise(noise_keys(row.params.seed, row.index), kept.astype(np.uint32)) / values.numpy()[kept]
        picked.append(int(kept[arrivals.argmin()]))
    return picked


def _filter(weights: Tensor, params: SamplingParams) -> None:
    """Zero what top-k, then top-p of the rest, then min-p drop; `weights` [vocab], 1 for the likeliest token."""
    vocab = weights.shape[0]
    if 0 < params.top_k < vocab:
        least = weights.topk(params.top_k).values[-1]
        weights.masked_fill_(weights < least, 0.0)
    if params.top_p < 1.0:
        wanted = params.top_p * weights.sum()
        for count in (min(_MANY, vocab), vocab):
            largest = weights.topk(count).values
            mass = largest.cumsum(dim=0)
            if mass[-1] >= wanted or count == vocab:
                least = largest[min(int(torch.searchsorted(mass, wanted)), count - 1)]
                weights.masked_fill_(weights < least, 0.0)
                break
    if params.min_p > 0.0:
        weights.masked_fill_(weights < params.min_p, 0.0)
