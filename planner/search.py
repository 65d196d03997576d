"""The search: candidates by the closed form, the best judged on the user's traffic, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .candidates import Candidate, Pool, Sizing, meets
from .closed_form import Estimate, estimate
from .latency import Provenance
from .load import Load
from .outcome import Outcome, closed_form_outcome
from .question import Question
from .types import ClusterSpec, SimRequest, Slo

Verdict = Literal["disaggregate", "colocate", "infeasible"]
Judge = Callable[[ClusterSpec, Sequence[SimRequest], Slo], Outcome]
Progress = Callable[[str, int, int], None]  # what is done, how many of how many

_MAX_JUDGED = 10  # clusters of each mode
_MAX_ENLARGED = 6
_MAX_ESTIMATED, _MAX_HOPEFUL, _EQUALLY_CHEAP = 150, 2, 3
_SCREENED_REQUESTS = 500  # at least, of the traffic, that candidates are compared on; the best are tried on all of it
_ALTERNATIVES = 8
_LOWER_RATES = (1.0, 0.95, 0.9, 0.82, 0.7)
_TRIED_RATES = (1.1, 1.0, 0.9, 0.8, 0.65, 0.5)
_SCAN_STEP, _LONGEST_SCAN = 1.5, 40.0
_CHEAPER = 0.995  # times the prompts or the bandwidth, either way, in search of a flip


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One cluster and what it does."""

    candidate: Candidate
    outcome: Outcome
    rate: float  # requests/s that it was judged at

    @property
    def cost_per_hour(self) -> float:
        return self.candidate.cost_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The chosen cluster under other traffic."""

    change: str
    outcome: Outcome


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
    jury = _Jury(question, judge, on_progress)
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
    answers = sorted(jury.answers, key=lambda answer: (not answer.outcome.meets_slo, *_merit(question, answer)))
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


class _Jury:
    """Judges candidates on the traffic and keeps what it learnt."""

    def __init__(self, question: Question, judge: Judge | None, on_progress: Progress) -> None:
        self._question = question
        self._judge = judge
        self._on_progress = on_progress
        self.answers: list[Answer] = []

    def best(self, mode: str, candidates: Sequence[Candidate], load: Load) -> Answer | None:
        """The cheapest that meets the limits, the roomiest of equally cheap ones; else the one that came closest."""
        judged: list[Answer] = []
        best: Answer | None = None
        shortlist = self._shortlist(candidates, load)
        for number, candidate in enumerate(shortlist):
            self._on_progress(mode, number, len(shortlist))
            if best is not None and self._worse(candidate, best):
                break
            answer = self._answer(candidate, load)
            if answer.outcome.meets_slo and (best is None or self._better(answer, best)):
                answer = self._confirmed(answer)
                if answer.outcome.meets_slo and (best is None or self._better(answer, best)):
                    best = answer
            judged.append(answer)
        self._on_progress(mode, len(shortlist), len(shortlist))
        if best is None and judged:
            closest = min(judged, key=lambda answer: _strain(answer.outcome, self._question.slo))
            best = self._enlarged_until_good(closest, judged)
        self.answers += judged
        return best

    def _enlarged_until_good(self, answer: Answer, judged: list[Answer]) -> Answer:
        """The closed form was too hopeful: give what is short more workers until limits are met or GPUs run out."""
        for _ in range(_MAX_ENLARGED):
            candidate = _enlarged(answer)
            if candidate.num_gpus > self._question.max_gpus:
                break
            load = self._question.load.at(answer.rate)
            answer = Answer(candidate=candidate, outcome=self.outcome(candidate, load, screen=False), rate=answer.rate)
            judged.append(answer)
            if answer.outcome.meets_slo:
                break
        return answer

    def _confirmed(self, answer: Answer) -> Answer:
        """Tried on all of the traffic: a part of it may have been kind. The most goodput is then looked for below."""
        for factor in _LOWER_RATES if self._question.objective == "goodput" else (1.0,):
            rate = answer.rate * factor
            outcome = self.outcome(answer.candidate, self._question.load.at(rate), screen=False)
            whole = Answer(candidate=answer.candidate, outcome=outcome, rate=rate)
            if outcome.meets_slo:
                break
        return whole

    def _better(self, answer: Answer, than: Answer) -> bool:
        return _merit(self._question, answer) < _merit(self._question, than)

    def _answer(self, candidate: Candidate, load: Load) -> Answer:
        """At the load's rate; for the most goodput, at the highest of some rates around it that meets the limits."""
        rates = [load.rate]
        if self._question.objective == "goodput":
            rates = [load.rate * factor for factor in _TRIED_RATES]
        for rate in rates:
            outcome = self.outcome(candidate, load.at(rate))
            if outcome.meets_slo:
                break
        return Answer(candidate=candidate, outcome=outcome, rate=rate)

    def _shortlist(self, candidates: Sequence[Candidate], load: Load) -> list[Candidate]:
        """In order of price, the roomiest few of each price; some cheaper ones that the closed form finds too small."""
        passing: dict[float, list[tuple[float, Candidate]]] = {}
        failing: list[Candidate] = []
        for candidate in candidates[:_MAX_ESTIMATED]:
            found = estimate(candidate.cluster(self._question), load)
            if meets(found, self._question.slo):
                price = round(candidate.cost_per_hour, 4)
                passing.setdefault(price, []).append((_strain(found, self._question.slo), candidate))
            elif not passing:
                failing.append(candidate)
        few = failing[-_MAX_HOPEFUL:] if passing else failing[: _MAX_HOPEFUL * 2]
        for price in sorted(passing):
            few += [candidate for _, candidate in sorted(passing[price], key=lambda item: item[0])[:_EQUALLY_CHEAP]]
        return few[:_MAX_JUDGED]

    def _worse(self, candidate: Candidate, good: Answer) -> bool:
        if self._question.objective == "goodput":
            return False
        return candidate.cost_per_hour > good.cost_per_hour * 1.001

    def outcome(
        self, candidate: Candidate, load: Load, *, prompts: float = 1.0, link: float = 1.0, screen: bool = True
    ) -> Outcome:
        """The candidate under the load, or under one with longer prompts or another bandwidth."""
        cluster = candidate.cluster(self._question, link_factor=link)
        if self._judge is None:
            return closed_form_outcome(cluster, load.with_prompts(prompts), self._question.slo)
        requests = self._question.requests
        if screen:
            requests = requests[: max(_SCREENED_REQUESTS, len(requests) // 10)]
        pace = Load.of(self._question.requests, prefix_cache=False).rate / load.rate
        return self._judge(cluster, [_changed(r, pace, prompts) for r in requests], self._question.slo)

    def sensitivity(self, answer: Answer) -> tuple[Sensitivity, ...]:
        """The answer's cluster under traffic that is a little different."""
        candidate, load = answer.candidate, self._question.load.at(answer.rate)
        cases: list[tuple[str, float, float, float]] = [
            ("rate +20 %", 1.2, 1.0, 1.0),
            ("rate -20 %", 0.8, 1.0, 1.0),
            ("prompts +20 %", 1.0, 1.2, 1.0),
            ("prompts -20 %", 1.0, 0.8, 1.0),
        ]
        if candidate.prefill is not None:
            cases.append(("bandwidth halved", 1.0, 1.0, 0.5))
        found = []
        for number, (change, rate, prompts, link) in enumerate(cases):
            self._on_progress("sensitivity", number, len(cases))
            changed = load.at(load.rate * rate)
            outcome = self.outcome(candidate, changed, prompts=prompts, link=link, screen=False)
            found.append(Sensitivity(change=change, outcome=outcome))
        self._on_progress("sensitivity", len(cases), len(cases))
        return tuple(found)


def _enlarged(answer: Answer) -> Candidate:
    """A quarter more workers, at least one, in the pool that missed its limit."""
    candidate = answer.candidate

    def more(pool: Pool) -> Pool:
        return replace(pool, num_workers=pool.num_workers + max(1, pool.num_workers // 4))

    if candidate.prefill is not None and "TTFT" in answer.outcome.missed:
        candidate = replace(candidate, prefill=more(candidate.prefill))
        if "TPOT" not in answer.outcome.missed and "ITL" not in answer.outcome.missed:
            return candidate
    return replace(candidate, decode=more(candidate.decode))


def _changed(request: SimRequest, pace: float, prompts: float) -> SimRequest:
    """Arriving `pace` times as late, with a prompt `prompts` times as long; shared blocks stretch with it."""
    if pace == 1.0 and prompts == 1.0:
        return request
    return replace(
        request,
        arrival_s=request.arrival_s * pace,
        isl=max(1, round(request.isl * prompts)),
        hash_block_tokens=max(1, round(request.hash_block_tokens * prompts)),
    )


def _merit(question: Question, answer: Answer) -> tuple[float, ...]:
    """Smaller is better: the objective, then the other one, then the worst share of a limit that is used up."""
    used = _strain(answer.outcome, question.slo)
    if question.objective == "goodput":
        return -round(answer.outcome.goodput_rps, 2), answer.cost_per_hour, used
    return answer.cost_per_hour, answer.candidate.num_gpus, used


def _strain(outcome: Outcome | Estimate, slo: Slo) -> float:
    shares = [max(outcome.utilisation.values(), default=0.0)]
    for limit, values in ((slo.ttft_s, outcome.ttft_s), (slo.tpot_s, outcome.tpot_s), (slo.itl_s, outcome.itl_s)):
        if limit is not None and values:
            shares.append(values[90.0] / limit)
    return max(shares)


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
        return answer.outcome.missed
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
    if (factor := _nearest_flip(with_prompts, today)) is not None:
        found.append(f"{other} with prompts of about {load.mean_isl * factor:,.0f} tokens ({factor:.2g} times)")
    if (factor := _nearest_flip(with_link, today)) is not None:
        found.append(f"{other} with a link of about {sizing.link_bytes_per_s * factor / 1e9:,.2g} GB/s")
    return tuple(found)


def _nearest_flip(prefers_split: Callable[[float], bool], today: bool) -> float | None:
    factor = _SCAN_STEP
    while factor <= _LONGEST_SCAN:
        for tried in (factor, 1 / factor):
            if prefers_split(tried) != today:
                return tried
        factor *= _SCAN_STEP
    return None
