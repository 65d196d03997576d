"""The latency model of a worker: a roofline, coefficients fitted on measurements, or a calibration; and its error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any, Literal

from .terms import Deployment, StepTerms, step_terms

Layer = Literal["roofline", "shipped", "calibrated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a latency model's numbers come from, and how wrong it was on measurements that it had not seen."""

    layer: Layer
    source: str
    tpot_error: float  # mean relative error of TPOT, or of a decode step
    ttft_error: float  # of TTFT, or of a prefill step

    def __str__(self) -> str:
        errors = f"decode ±{self.tpot_error:.0%}, prefill ±{self.ttft_error:.0%}"
        return f"{self.layer}: {self.source} ({errors} mean error, held out)"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCoefficients:
    """How many times its ideal seconds each term of a decode step takes."""

    launch: float
    weights: float
    matmul: float
    kv: float
    collective: float
    collective_bytes: float
    sequence: float  # units of 100 us a sequence: sampling, host work


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCoefficients:
    """How many times its ideal seconds each term of a prefill step takes."""

    launch: float
    weights: float
    matmul: float
    attention: float
    collective: float
    collective_bytes: float
    token: float  # units of 1 us a token: what scales with neither model nor device


SEQUENCE_S = 1e-4
TOKEN_S = 1e-6

DECODE_TERMS = tuple(field.name for field in fields(DecodeCoefficients))
PREFILL_TERMS = tuple(field.name for field in fields(PrefillCoefficients))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLatency:
    """A worker's steps as linear costs: the form that every layer of the model ends in. Implements `LatencyModel`."""

    prefill_base_s: float
    prefill_token_s: float
    prefill_pair_s: float  # each (query, key) pair: new tokens x (context before + half of them)
    prefill_sequence_s: float
    decode_base_s: float
    decode_sequence_s: float
    decode_context_s: float  # each token of context
    prefill_knees: tuple[tuple[float, float], ...] = ()  # (tokens of a step, further seconds of each token beyond)
    prefill_expert_s: float = 0.0  # reading all experts
    decode_expert_s: float = 0.0
    expert_share: float = 0.0  # of the experts that one token chooses
    decode_window_s: float = 0.0  # each token of context within `window`, at sliding-window layers
    window: float = 0.0

    def prefill_step_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        tokens = sum(new for new, _ in chunks)
        seconds = self.prefill_base_s + self._chunks_s(chunks, tokens)
        return seconds + self.prefill_expert_s * self._touched(tokens) if self.expert_share else seconds

    def decode_step_s(self, batch: float, context_tokens: float) -> float:
        seconds = self.decode_base_s + self._sequences_s(batch, context_tokens)
        return seconds + self.decode_expert_s * self._touched(batch) if self.expert_share else seconds

    def mixed_step_s(self, chunks: Sequence[tuple[int, int]], batch: float, context_tokens: float) -> float:
        if not chunks:
            return self.decode_step_s(batch, context_tokens)
        if not batch:
            return self.prefill_step_s(chunks)
        # Weights are read once, whoever the tokens belong to.
        tokens = sum(new for new, _ in chunks)
        seconds = max(self.prefill_base_s, self.decode_base_s)
        seconds += self._chunks_s(chunks, tokens) + self._sequences_s(batch, context_tokens)
        return seconds + self.prefill_expert_s * self._touched(tokens + batch) if self.expert_share else seconds

    def prompt_s(self, isl: float, max_step_tokens: int, cached: float = 0.0) -> float:
        """A whole prompt alone on the worker, in chunks."""
        tokens = max(1.0, isl - cached)
        steps = max(1.0, -(-tokens // max_step_tokens))
        pairs = tokens * (cached + tokens / 2)
        seconds = steps * (self.prefill_base_s + self.prefill_sequence_s)
        seconds += tokens * self.prefill_token_s + pairs * self.prefill_pair_s
        return seconds + steps * (self._knees_s(tokens / steps) + self.prefill_expert_s * self._touched(tokens / steps))

    def _chunks_s(self, chunks: Sequence[tuple[int, int]], tokens: int) -> float:
        pairs = sum(new * (before + new / 2) for new, before in chunks)
        seconds = tokens * self.prefill_token_s + pairs * self.prefill_pair_s + len(chunks) * self.prefill_sequence_s
        return seconds + self._knees_s(tokens) if self.prefill_knees else seconds

    def _knees_s(self, tokens: float) -> float:
        return sum((tokens - knee) * seconds for knee, seconds in self.prefill_knees if tokens > knee)

    def _sequences_s(self, batch: float, context_tokens: float) -> float:
        seconds = batch * self.decode_sequence_s + context_tokens * self.decode_context_s
        if self.decode_window_s:
            seconds += min(context_tokens, batch * self.window) * self.decode_window_s
        return seconds

    def _touched(self, tokens: float) -> float:
        return 1 - (1 - self.expert_share) ** tokens if self.expert_share else 0.0


def decode_vector(terms: StepTerms, batch: float, context_tokens: float) -> list[float]:
    """Ideal seconds of a decode step, by `DECODE_TERMS`."""
    windowed = min(context_tokens, batch * terms.window)
    return [
        terms.launch_s,
        terms.weights_s + terms.experts_s * terms.expert_fraction(batch),
        batch * (terms.token_s + terms.head_s),
        context_tokens * terms.context_s + windowed * terms.window_s,
        terms.collective_s,
        batch * terms.collective_token_s,
        batch * SEQUENCE_S,
    ]


def prefill_vector(terms: StepTerms, tokens: float, pairs: float, sequences: float = 1.0) -> list[float]:
    """Ideal seconds of a prefill step, by `PREFILL_TERMS`."""
    return [
        terms.launch_s,
        terms.weights_s + terms.experts_s * terms.expert_fraction(tokens),
        tokens * terms.token_s + sequences * terms.head_s,
        pairs * terms.pair_s,
        terms.collective_s,
        tokens * terms.collective_token_s,
        tokens * TOKEN_S,
    ]


def step_latency(terms: StepTerms, prefill: PrefillCoefficients, decode: DecodeCoefficients) -> StepLatency:
    """Coefficients times terms, folded into the costs of one worker."""
    prefill_base = prefill.launch * terms.launch_s + prefill.weights * terms.weights_s
    decode_base = decode.launch * terms.launch_s + decode.weights * terms.weights_s
    token_s = prefill.matmul * terms.token_s + prefill.collective_bytes * terms.collective_token_s
    sequence_s = decode.matmul * (terms.token_s + terms.head_s) + decode.collective_bytes * terms.collective_token_s
    return StepLatency(
        prefill_base_s=prefill_base + prefill.collective * terms.collective_s,
        prefill_token_s=token_s + prefill.token * TOKEN_S,
        prefill_pair_s=prefill.attention * terms.pair_s,
        prefill_sequence_s=prefill.matmul * terms.head_s,
        decode_base_s=decode_base + decode.collective * terms.collective_s,
        decode_sequence_s=sequence_s + decode.sequence * SEQUENCE_S,
        decode_context_s=decode.kv * terms.context_s,
        prefill_expert_s=prefill.weights * terms.experts_s,
        decode_expert_s=decode.weights * terms.experts_s,
        expert_share=terms.expert_share,
        decode_window_s=decode.kv * terms.window_s,
        window=terms.window,
    )


# What large kernels were measured to reach on an H200: 4.26 of 4.8 TB/s, 788 of 989 TFLOP/s, attention 605. Nothing
# runs faster, so the fits take these as their floors; the launch cost is that of a captured graph.
DECODE_ROOFLINE = DecodeCoefficients(
    launch=0.2, weights=1.13, matmul=1.25, kv=1.13, collective=0.5, collective_bytes=1.3, sequence=0.0
)
PREFILL_ROOFLINE = PrefillCoefficients(
    launch=0.5, weights=1.13, matmul=1.25, attention=1.63, collective=0.5, collective_bytes=1.3, token=0.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedFit:
    """One engine's coefficients, as `benchmarks/latency_fit.py` wrote them."""

    prefill: PrefillCoefficients
    decode: DecodeCoefficients
    source: str
    tpot_error: float
    ttft_error: float
    gpus: tuple[str, ...]  # that the measurements are of; the models were all dense


def engine_names() -> list[str]:
    """Engines with shipped coefficients, and `roofline`."""
    return [*_shipped(), "roofline"]


@cache
def _shipped() -> Mapping[str, ShippedFit]:
    text = resources.files(__package__).joinpath("data/coefficients.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return {
        name: ShippedFit(
            prefill=PrefillCoefficients(**row["prefill"]),
            decode=DecodeCoefficients(**row["decode"]),
            source=row["source"],
            tpot_error=row["tpot_error"],
            ttft_error=row["ttft_error"],
            gpus=tuple(row["gpus"]),
        )
        for name, row in document["engines"].items()
    }


def shipped_errors() -> Mapping[str, Any]:
    """Held-out errors of a model and GPU that the fit had not seen, and of the roofline, on the public points."""
    text = resources.files(__package__).joinpath("data/coefficients.json").read_text(encoding="utf-8")
    errors: dict[str, Any] = json.loads(text)["errors"]
    return errors


def latency_for(deployment: Deployment, engine: str) -> tuple[StepLatency, Provenance]:
    """The model of an engine on a deployment; `roofline` for none.

    Outside the GPUs and kinds of model that were measured, the error is the one of models and GPUs left out of the fit.
    """
    terms, errors = step_terms(deployment), shipped_errors()
    if engine == "roofline" or deployment.gpu.name == "cpu":
        provenance = Provenance(
            layer="roofline",
            source="data sheet times the part of it that large kernels reach"
            + ("; a CPU's is a guess, calibrate it" if deployment.gpu.name == "cpu" else ""),
            tpot_error=errors["roofline"]["tpot"],
            ttft_error=errors["roofline"]["ttft"],
        )
        return step_latency(terms, PREFILL_ROOFLINE, DECODE_ROOFLINE), provenance
    fit = _shipped()[engine]
    source, tpot_error, ttft_error = fit.source, fit.tpot_error, fit.ttft_error
    outside = [] if deployment.gpu.name in fit.gpus else [deployment.gpu.name]
    if deployment.model.experts or deployment.model.latent:
        outside.append("a mixture of experts" if deployment.model.experts else "latent attention")
    if outside:
        source += f"; {' and '.join(outside)} not among them"
        tpot_error = max(tpot_error, errors["left_out"]["tpot"])
        ttft_error = max(ttft_error, errors["left_out"]["ttft"])
    provenance = Provenance(layer="shipped", source=source, tpot_error=tpot_error, ttft_error=ttft_error)
    return step_latency(terms, fit.prefill, fit.decode), provenance
