"""The jury: tries candidates on the user's traffic, and finds the best of each mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .candidates import Candidate, Pool, meets
from .closed_form import Estimate, estimate
from .load import Load
from .outcome import Outcome, closed_form_outcome
from .question import Question
from .types import ClusterSpec, SimRequest, Slo

Judge = Callable[[ClusterSpec, Sequence[SimRequest], Slo], Outcome]
Progress = Callable[[str, int, int], None]  # what is done, how many of how many

_MAX_JUDGED = 10  # clusters of each mode
_SCREENED_REQUESTS = 500  # at least, of the traffic, that candidates are compared on; the best are tried on all of it
_LOWER_RATES = (1.0, 0.95, 0.9, 0.82, 0.7)
_TRIED_RATES = (1.1, 1.0, 0.9, 0.8, 0.65, 0.5)
_MAX_ENLARGED = 6
_MAX_ESTIMATED, _MAX_HOPEFUL, _EQUALLY_CHEAP = 150, 2, 3


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


class Jury:
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
        return merit(self._question, answer) < merit(self._question, than)

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


def merit(question: Question, answer: Answer) -> tuple[float, ...]:
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
