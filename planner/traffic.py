"""Synthetic traffic: lengths of prompts and answers, a rate, and how bursty arrivals are."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from .types import SimRequest

_LENGTHS_HELP = (
    "give tokens (4000), mean and coefficient of variation (4000:0.5), or percentiles (p50=2000,p90=8000,p99=20000)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompts or answers by percentile, linear between the knots; at least 1 token."""

    percents: tuple[float, ...]  # 0 to 100, ascending, from 0 to 100
    tokens: tuple[float, ...]

    def sample(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        drawn = np.interp(rng.uniform(0, 100, count), self.percents, self.tokens)
        return np.maximum(1, np.rint(drawn)).astype(np.int64)

    @property
    def mean(self) -> float:
        widths, middles = np.diff(self.percents) / 100, (np.array(self.tokens[1:]) + np.array(self.tokens[:-1])) / 2
        return float((widths * middles).sum())

    def scaled(self, factor: float) -> Lengths:
        return replace(self, tokens=tuple(tokens * factor for tokens in self.tokens))


def fixed_lengths(tokens: float) -> Lengths:
    """Raises: ConfigError: below 1."""
    return lengths_by_percentile({50.0: tokens})


def spread_lengths(mean: float, cv: float) -> Lengths:
    """Lognormal with this mean and coefficient of variation. Raises: ConfigError: one is out of range."""
    if not math.isfinite(cv) or cv < 0:
        raise ConfigError(f"the coefficient of variation of a length is {cv:g}; it must be 0 or more")
    if cv == 0:
        return fixed_lengths(mean)
    _check_tokens(mean)
    sigma = math.sqrt(math.log1p(cv * cv))
    mu = math.log(mean) - sigma * sigma / 2
    percents = np.concatenate(([0.01, 0.1], np.arange(0.5, 100, 0.5), [99.9, 99.99]))
    tokens = np.exp(mu + sigma * np.array([NormalDist().inv_cdf(percent / 100) for percent in percents]))
    tokens *= mean / Lengths(percents=(0.0, *percents, 100.0), tokens=(tokens[0], *tokens, tokens[-1])).mean
    return Lengths(
        percents=(0.0, *percents.tolist(), 100.0), tokens=(float(tokens[0]), *tokens.tolist(), float(tokens[-1]))
    )


def lengths_by_percentile(knots: dict[float, float]) -> Lengths:
    """Linear between the given percentiles; below the first and above the last, their lengths.

    Raises: ConfigError: a knot is out of range, or lengths fall.
    """
    percents = sorted(knots)
    tokens = [knots[percent] for percent in percents]
    for percent, length in zip(percents, tokens, strict=True):
        if not 0 <= percent <= 100:
            raise ConfigError(f"p{percent:g} is no percentile; they go from p0 to p100")
        _check_tokens(length)
    if tokens != sorted(tokens):
        raise ConfigError(
            f"lengths by percentile fall ({', '.join(f'{length:g}' for length in tokens)}); let them rise"
        )
    return Lengths(percents=(0.0, *percents, 100.0), tokens=(tokens[0], *tokens, tokens[-1]))


def parse_lengths(text: str) -> Lengths:
    """Lengths as people write them: "4000", "4000:0.5" or "p50=2000,p90=8000". Raises: ConfigError."""
    try:
        if "=" in text:
            knots = {}
            for part in text.split(","):
                name, _, value = part.partition("=")
                if not re.fullmatch(r"\s*p\d+(\.\d+)?\s*", name):
                    raise ValueError(name)
                knots[float(name.strip()[1:])] = float(value)
            return lengths_by_percentile(knots)
        mean, _, cv = text.partition(":")
        return spread_lengths(float(mean), float(cv or 0))
    except ValueError as error:
        raise ConfigError(f"lengths are {text!r}; {_LENGTHS_HELP}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticTraffic:
    """Requests without shared prefixes. Raises: ConfigError: a value is out of range."""

    rate: float  # requests per second
    isl: Lengths
    osl: Lengths
    arrival_cv: float = 1.0  # of the times between arrivals: 0 is a clock, 1 is Poisson, more is bursty

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"the rate is {self.rate:g} requests/s; it must be above 0")
        if not 0 <= self.arrival_cv < math.inf:
            raise ConfigError(f"the arrival CV is {self.arrival_cv:g}; it must be 0 or more (1 is Poisson)")

    def generate(self, num_requests: int, seed: int = 0) -> list[SimRequest]:
        """The first requests from a time 0 that is no arrival itself; the same for the same seed."""
        if num_requests < 1:
            raise ConfigError(f"the number of requests is {num_requests}; it must be at least 1")
        arrivals, prompts, answers = (np.random.default_rng([seed, stream]) for stream in range(3))
        if self.arrival_cv == 0:
            gaps = np.full(num_requests, 1 / self.rate)
        else:
            shape = 1 / self.arrival_cv**2
            gaps = arrivals.gamma(shape, 1 / (shape * self.rate), num_requests)
        columns = (np.cumsum(gaps), self.isl.sample(prompts, num_requests), self.osl.sample(answers, num_requests))
        return [
            SimRequest(arrival_s=float(at_s), isl=int(isl), osl=int(osl))
            for at_s, isl, osl in zip(*columns, strict=True)
        ]


def mean_rate(requests: Sequence[SimRequest]) -> float:
    """Requests per second between the first and the last arrival."""
    times = [request.arrival_s for request in requests]
    span_s = max(times, default=0.0) - min(times, default=0.0)
    return (len(requests) - 1) / span_s if span_s > 0 else math.inf


def scale_rate(requests: Sequence[SimRequest], factor: float) -> list[SimRequest]:
    """The same requests `factor` times as fast, from the first arrival on. Raises: ConfigError."""
    if not 0 < factor < math.inf:
        raise ConfigError(f"the rate is scaled by {factor:g}; the factor must be above 0")
    start_s = min((request.arrival_s for request in requests), default=0.0)
    return [replace(request, arrival_s=start_s + (request.arrival_s - start_s) / factor) for request in requests]


def _check_tokens(tokens: float) -> None:
    if not 1 <= tokens < math.inf:
        raise ConfigError(f"a length is {tokens:g} tokens; it must be at least 1")
