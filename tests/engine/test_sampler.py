"""Sampling: the right distribution, and the same token for the same (logits, seed, index) in any company."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from splitserve.core.request import SamplingParams
from splitserve.engine.sampler import SampleInput, noise, noise_keys, sample

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def row(index: int = 0, token_ids: tuple[int, ...] = (), num_prompt: int = 0, **params: float) -> SampleInput:
    return SampleInput(
        params=SamplingParams(**params),  # type: ignore[arg-type]
        index=index,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt,
    )


def draws(count: int, **params: float) -> list[int]:
    rows = [row(index, seed=11, **{"temperature": 1.0, **params}) for index in range(count)]
    return sample(LOGITS.expand(count, -1), rows)


def allowed(**params: float) -> set[int]:
    return set(draws(4000, **params))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    count = 8000
    found = torch.bincount(torch.tensor(draws(count, temperature=temperature)), minlength=6).double()
    expected = (LOGITS.double() / temperature).softmax(0) * count
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001; the draws are deterministic


NOT_PARAMS = ("banned", "allowed")
HISTORY = (5, 1, 0, 0, 3)  # one token of prompt, four of output


def expected_distribution(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: tuple[tuple[int, float], ...] = (),
    banned: tuple[int, ...] = (),
    allowed: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
) -> list[float]:
    """The same thing once more, entry by entry and from the definitions."""
    logits = LOGITS.tolist()
    for token_id in set(HISTORY):
        factor = 1 / repetition_penalty if logits[token_id] > 0 else repetition_penalty
        logits[token_id] *= factor
    for token_id in HISTORY[1:]:
        logits[token_id] -= frequency_penalty
    for token_id in set(HISTORY[1:]):
        logits[token_id] -= presence_penalty
    for token_id, bias in logit_bias:
        logits[token_id] += bias
    left = [i for i in range(len(logits)) if i in allowed and i not in banned]
    weights = {i: math.exp(logits[i] / temperature) for i in left}
    order = sorted(weights, key=lambda i: -weights[i])[: top_k or None]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if mass < top_p * total:
            kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.9},
        {"top_k": 3},
        {"top_p": 0.85},
        {"min_p": 0.1},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.1},
        {"frequency_penalty": 0.6},
        {"frequency_penalty": -0.4},
        {"logit_bias": ((0, -1.5), (4, 2.0))},
        {"banned": (0, 2)},
        {"allowed": (1, 3, 4)},
        {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "min_p": 0.05, "frequency_penalty": 0.3, "banned": (1,)},
    ],
    ids=lambda options: "+".join(options),
)
def test_each_parameter_gives_its_distribution(options: dict[str, Any]) -> None:
    count = 8000
    params = {"temperature": 1.0, **{name: value for name, value in options.items() if name not in NOT_PARAMS}}
    mask = torch.zeros(6, dtype=torch.bool)
    mask[list(options.get("allowed", range(6)))] = True
    rows = [
        SampleInput(
            params=SamplingParams(seed=5, **params),
            index=index,
            token_ids=HISTORY,
            num_prompt_tokens=1,
            banned=options.get("banned", ()),
            allowed=mask if "allowed" in options else None,
        )
        for index in range(count)
    ]
    found = torch.bincount(torch.tensor(sample(LOGITS.expand(count, -1), rows)), minlength=6).double()
    expected = torch.tensor(expected_distribution(**options), dtype=torch.float64) * count
    assert found[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = float(((found - expected)[possible] ** 2 / expected[possible]).sum())
    limit = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5}[int(possible.sum()) - 1]  # p = 0.001
    assert chi_square < limit, (chi_square, found, expected)


def test_a_ban_gives_way_where_nothing_else_is_left() -> None:
    only = torch.tensor([False, False, True, False, False, False])
    greedy = SampleInput(params=SamplingParams(), index=0, allowed=only, banned=(2,))
    assert sample(LOGITS[None], [greedy]) == [2]
    assert sample(LOGITS[None], [SampleInput(params=SamplingParams(), index=0, banned=(0, 1))]) == [2]


def test_filters_keep_what_they_should() -> None:
    assert allowed() == {0, 1, 2, 3, 4, 5}
    assert allowed(top_k=2) == {0, 1}
    assert allowed(top_p=0.5) == {0}  # the first has 0.55
    assert allowed(top_p=0.6) == {0, 1}
    assert allowed(min_p=0.2) == {0, 1, 2}  # exp(-1), exp(-1.5) pass, exp(-2) does not
    assert allowed(top_k=3, top_p=0.99, min_p=0.3) == {0, 1}


def test_the_nucleus_of_a_flat_distribution_is_found_past_the_short_cut() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, :2500] = 1.0
    rows = [row(i, seed=3, temperature=1.0, top_p=0.5) for i in range(200)]
    chosen = sample(logits.expand(200, -1), rows)
    assert max(chosen) < 2500
    assert len(set(chosen)) > 100


def test_a_token_depends_neither_on_its_batch_nor_on_its_place_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3000, generator=generator) * 3
    rows = [
        row(0),
        row(4, seed=1, temperature=0.8, top_p=0.9),
        row(2, seed=2, temperature=1.2, top_k=40),
        row(9, token_ids=(1, 2, 2, 5), num_prompt=1, seed=3, temperature=1.0, repetition_penalty=1.3),
        row(7, seed=4, temperature=0.7, min_p=0.05),
        row(1, seed=2**63 - 1, temperature=1.0),
        SampleInput(params=SamplingParams(seed=5, temperature=1.0, logit_bias=((7, 9.0),)), index=3, banned=(1, 2)),
        SampleInput(params=SamplingParams(seed=6, temperature=2.0), index=3, allowed=torch.arange(3000) % 7 == 0),
    ]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(8)]
    assert together == sample(logits.flip(0), rows[::-1])[::-1]


def test_seeds_indices_and_tokens_give_independent_exponential_noise() -> None:
    token_ids = np.arange(200, dtype=np.uint32)
    keys = [noise_keys(seed, index) for seed in range(50) for index in range(50)]
    assert len(set(keys)) == 2500
    values = np.stack([noise(key, token_ids) for key in keys])
    assert len(np.unique(values)) > 0.999 * values.size
    assert math.isclose(values.mean(), 1.0, abs_tol=0.01)
    assert math.isclose(values.std(), 1.0, abs_tol=0.01)
    between_tokens = np.corrcoef(values.T) - np.eye(200)
    between_draws = np.corrcoef(values[::10]) - np.eye(250)
    assert abs(between_tokens).max() < 6 / 2500**0.5
    assert abs(between_draws).max() < 6 / 200**0.5


def test_rounding_of_the_logits_changes_no_draw_but_the_closest() -> None:
    """Two workers compute the same logits to within rounding; in a large vocabulary they still choose alike."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 50_000, generator=generator)
    rows = [row(index, seed=9, temperature=1.0) for index in range(400)]
    chosen = sample(logits, rows)
    assert len(set(chosen)) > 350
    assert chosen == sample(logits + 2e-6 * torch.randn(400, 50_000, generator=generator), rows)


def test_penalties_change_the_greedy_choice() -> None:
    seen = {"token_ids": (0, 0, 1), "num_prompt": 1}
    assert sample(LOGITS[None], [row(**seen)]) == [0]
    assert sample(LOGITS[None], [row(**seen, repetition_penalty=5.0)]) == [2]
    assert sample(LOGITS[None], [row(**seen, presence_penalty=2.0)]) == [2]  # 0.0, -1.0 against 0.5
    assert sample(LOGITS[None], [row(**seen, frequency_penalty=0.8)]) == [0]
    assert sample(LOGITS[None], [row(token_ids=(0,), num_prompt=1, presence_penalty=2.0)]) == [0]  # prompt only
    assert LOGITS.tolist() == [2.0, 1.0, 0.5, 0.0, -1.0, -3.0], "the caller's logits were changed"


@pytest.mark.parametrize("temperature", [1e-6, 1e-308, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    assert set(draws(200, temperature=temperature)) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_says_nothing_gives_no_token_and_the_others_theirs(temperature: float, value: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = value
    rows = [row(index, seed=11, temperature=temperature) for index in range(3)]
    first, second, third = sample(logits, rows)
    assert second is None
    assert [first, third] == sample(LOGITS.expand(2, -1), [rows[0], rows[2]])
    assert sample(torch.full((1, 6), -math.inf), rows[:1]) == [None]
