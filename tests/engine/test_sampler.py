"""Sampling: the right distribution, and the same token for the same (logits, seed, index) in any company."""

import math

import pytest
import torch
from splitserve.core.request import SamplingParams
from splitserve.engine.sampler import SampleInput, sample, uniform

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
    logits = torch.randn(6, 3000, generator=generator) * 3
    rows = [
        row(0),
        row(4, seed=1, temperature=0.8, top_p=0.9),
        row(2, seed=2, temperature=1.2, top_k=40),
        row(9, token_ids=(1, 2, 2, 5), num_prompt=1, seed=3, temperature=1.0, repetition_penalty=1.3),
        row(7, seed=4, temperature=0.7, min_p=0.05),
        row(1, seed=2**63 - 1, temperature=1.0),
    ]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(6)]
    assert together == sample(logits.flip(0), rows[::-1])[::-1]


def test_seeds_and_indices_give_different_draws() -> None:
    assert len({uniform(seed, index) for seed in range(50) for index in range(50)}) == 2500
    assert all(0 <= uniform(7, i) < 1 for i in range(1000))
    assert math.isclose(sum(uniform(7, i) for i in range(4000)) / 4000, 0.5, abs_tol=0.02)


def test_penalties_change_the_greedy_choice() -> None:
    seen = {"token_ids": (0, 0, 1), "num_prompt": 1}
    assert sample(LOGITS[None], [row(**seen)]) == [0]
    assert sample(LOGITS[None], [row(**seen, repetition_penalty=5.0)]) == [2]
    assert sample(LOGITS[None], [row(**seen, presence_penalty=2.0)]) == [2]  # 0.0, -1.0 against 0.5
    assert sample(LOGITS[None], [row(**seen, frequency_penalty=0.8)]) == [0]
    assert sample(LOGITS[None], [row(token_ids=(0,), num_prompt=1, presence_penalty=2.0)]) == [0]  # prompt only
    assert LOGITS.tolist() == [2.0, 1.0, 0.5, 0.0, -1.0, -3.0], "the caller's logits were changed"


def test_a_vanishing_temperature_is_greedy() -> None:
    assert set(draws(200, temperature=1e-6)) == {0}
