"""The search: candidates by the closed form, the best judged on the user's traffic, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .candidates import Candidate, Pool, Sizing, meets
from .jury import Answer, Judge, Jury, Progress, Sensitivity, merit
from .latency import Provenance
from .load import Load
from .question import Question

Verdict = Literal["disaggregate", "colocate", "infeasible"]

_ALTERNATIVES = 8
_SCAN_STEP, _LONGEST_SCAN = 1.5, 40.0  # times the prompts or the bandwidth, either way, in search of a flip
_CHEAPER = 0.995  # of the other mode's price: less is a tie


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer to a question. A mode is None where nothing within the limits would do."""

    question: Question
    verdict: Verdict
    reason: str
    disaggregated: Answer | None
    colocated: Answer | None
    binding: tuple[str, ...]  # of an infeasible mode, what stands in the way
    flips: tuple[str, ...]  # what would turn the verdict
    sensitivity: tuple[Sensitivity, ...]
    alternatives: tuple[Answer, ...]  # judged, best first
    candidates: tuple[Candidate, ...]  # everything that was considered
    num_evaluated: int
    provenance: tuple[Provenance, ...]

    @property
    def chosen(self) -> Answer | None:
        return {"disaggregate": self.disaggregated, "colocate": self.colocated, "infeasible": None}[self.verdict]


def plan_question(question: Question, *, judge: Judge | None, on_progress: Progress = lambda what, n, of: None) -> Plan:
    """Answer a question.

    Args: judge: tries a cluster on the traffic; None judges by the closed form alone, in milliseconds.
    Raises: ConfigError: the model fits nowhere, or a limit is below what one request alone takes.
    """
    sizing = Sizing(question)
    sizing.refuse_impossible_limits()
    jury = Jury(question, judge, on_progress)
    loads = dict.fromkeys(("disaggregated", "colocated"), question.load)
    if question.objective == "goodput":
        loads = {mode: load.at(_best_rate(sizing, load, mode)) for mode, load in loads.items()}
    modes = {
        "disaggregated": sizing.linked(sizing.disaggregated(loads["disaggregated"]), loads["disaggregated"]),
        "colocated": sizing.colocated(loads["colocated"]),
    }
    best = {mode: jury.best(mode, candidates, loads[mode]) for mode, candidates in modes.items()}
    split, together = best["disaggregated"], best["colocated"]
    verdict, reason = _verdict(question, split, together)
    binding = []
    if split is None or not split.outcome.meets_slo:
        binding.append("split: " + _binding(sizing, question.load, ("prefill", "decode"), split))
    if together is None or not together.outcome.meets_slo:
        binding.append("colocated: " + _binding(sizing, question.load, ("colocated",), together))
    chosen = {"disaggregate": split, "colocate": together, "infeasible": None}[verdict]
    flips = () if chosen is None else _flips(sizing, question.load.at(chosen.rate), verdict)
    sensitivity = () if chosen is None else jury.sensitivity(chosen)
    answers = sorted(jury.answers, key=lambda answer: (not answer.outcome.meets_slo, *merit(question, answer)))
    used = [c for answer in (split, together) if answer for c in _choices(answer.candidate)]
    return Plan(
        question=question,
        verdict=verdict,
        reason=reason,
        disaggregated=split if split and split.outcome.meets_slo else None,
        colocated=together if together and together.outcome.meets_slo else None,
        binding=tuple(binding),
        flips=flips,
        sensitivity=sensitivity,
        alternatives=tuple(a for a in answers if a not in (split, together))[:_ALTERNATIVES],
        candidates=tuple(candidate for candidates in modes.values() for candidate in candidates),
        num_evaluated=sizing.num_evaluated,
        provenance=tuple(dict.fromkeys(used)) or _provenance_of(sizing),
    )


def _verdict(question: Question, split: Answer | None, together: Answer | None) -> tuple[Verdict, str]:
    split_good = split is not None and split.outcome.meets_slo
    together_good = together is not None and together.outcome.meets_slo
    if not split_good and not together_good:
        return "infeasible", "nothing within the limits serves this traffic at these service levels"
    if split is None or not split_good:
        return "colocate", "no split cluster within the limits meets the service levels"
    if together is None or not together_good:
        return "disaggregate", "no colocated cluster within the limits meets the service levels"
    if question.objective == "goodput":
        ratio = split.outcome.goodput_rps / max(together.outcome.goodput_rps, 1e-9)
        better = f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else 'less'} goodput than colocated"
        return ("disaggregate" if ratio > 1.005 else "colocate"), f"split gives {better}"
    ratio = split.cost_per_hour / max(together.cost_per_hour, 1e-9)
    if ratio < 0.995:
        return "disaggregate", f"split costs {1 - ratio:.0%} less than colocated"
    if ratio > 1.005:
        return "colocate", f"do not disaggregate: split costs {ratio - 1:.0%} more than colocated"
    return "colocate", "do not disaggregate: split costs the same, and one pool is simpler to run"


def _binding(sizing: Sizing, load: Load, roles: Sequence[str], answer: Answer | None) -> str:
    if answer is not None:
        return f"{answer.candidate.num_gpus} GPUs still miss {answer.outcome.missed}"
    return "; ".join(sizing.binding(load, role) for role in roles) + f"; --max-gpus is {sizing.max_gpus}"


def _choices(candidate: Candidate) -> list[Provenance]:
    pools: list[Pool] = [pool for pool in (candidate.prefill, candidate.decode) if pool is not None]
    return [pool.choice.provenance for pool in pools]


def _provenance_of(sizing: Sizing) -> tuple[Provenance, ...]:
    return tuple(dict.fromkeys(choice.provenance for choice in sizing.choices["decode"]))


def _best_rate(sizing: Sizing, load: Load, mode: str) -> float:
    """The highest rate that a cluster of that mode within the limits serves, by the closed form, to 3 %."""
    low, high = 0.0, load.rate
    while sizing.fits(load.at(high), mode) and high < load.rate * 4096:
        low, high = high, high * 2
    for _ in range(12):
        if low > 0 and high / low < 1.03:
            break
        middle = (low + high) / 2
        low, high = (middle, high) if sizing.fits(load.at(middle), mode) else (low, middle)
    return low or load.rate


def _flips(sizing: Sizing, load: Load, verdict: Verdict) -> tuple[str, ...]:
    """The prompt length and the bandwidth nearest to today's at which the closed form would answer otherwise."""
    together = sizing.cheapest(load)[1]
    candidates = sizing.disaggregated(load)

    def with_link(factor: float) -> bool:
        carried = sizing.linked(candidates, load, link_factor=factor)
        fine = (c.cost_per_hour for c in carried if meets(sizing.estimate(c, load, factor), sizing.slo))
        return min(fine, default=math.inf) < together * _CHEAPER

    def with_prompts(factor: float) -> bool:
        split, colocated = sizing.cheapest(load.with_prompts(factor))
        return split < colocated * _CHEAPER

    today = with_link(1.0)
    other = "colocated" if today else "split"
    found = []
    if today != (verdict == "disaggregate"):
        found.append("the closed form alone would answer the other way: the two modes are close")
    longest = max(1.0, (sizing.max_model_len - load.mean_osl) / float(load.isl.max()))
    if (factor := _nearest_flip(with_prompts, today, longest)) is not None:
        found.append(f"{other} with prompts of about {load.mean_isl * factor:,.0f} tokens ({factor:.2g} times)")
    else:
        found.append(f"no prompt length that the model takes speaks for {other}")
    if (factor := _nearest_flip(with_link, today, _LONGEST_SCAN)) is not None:
        found.append(f"{other} with a link of about {sizing.link_bytes_per_s * factor / 1e9:,.2g} GB/s")
    else:
        found.append(f"no bandwidth speaks for {other}")
    return tuple(found)


def _nearest_flip(prefers_split: Callable[[float], bool], today: bool, largest: float) -> float | None:
    factor = _SCAN_STEP
    while factor <= _LONGEST_SCAN:
        for tried in (factor, 1 / factor):
            if tried <= largest and prefers_split(tried) != today:
                return tried
        factor *= _SCAN_STEP
    return None
