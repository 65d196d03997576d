"""Whatever order and repetition workers' messages come in, the answer grows by each index once and ends once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.errors import KvCorrupted
from splitserve.core.logprobs import TokenLogprob
from splitserve.core.request import FinishReason
from splitserve.scheduling.attempts import Answer, NewTokens

ANSWER = tuple(range(100, 112))  # what every honest attempt gives: sampling depends on logits, seed and index alone


def message(attempt: int, start: int, end: int, *, finish: bool = True) -> NewTokens:
    """Tokens [start, end) of ANSWER; with the finish reason if they are its last."""
    last = finish and end == len(ANSWER)
    return NewTokens(
        request_id="r",
        attempt=attempt,
        index=start,
        token_ids=ANSWER[start:end],
        finish_reason=FinishReason.LENGTH if last else None,
        logprobs=tuple(TokenLogprob(token_id=token_id, logprob=-1.0, rank=1) for token_id in ANSWER[start:end]),
    )


@st.composite
def pieces(draw: st.DrawFn, attempt: int, start: int) -> list[NewTokens]:
    """One attempt's messages from `start` on: cut anywhere, some repeated, in any order."""
    inside = range(start + 1, len(ANSWER))
    cuts = sorted(draw(st.sets(st.sampled_from(inside), max_size=6))) if inside else []
    edges = [start, *cuts, len(ANSWER)]
    whole = [message(attempt, a, b) for a, b in pairwise(edges)]
    return draw(st.permutations(whole + draw(st.lists(st.sampled_from(whole), max_size=4))))


@given(st.data(), st.integers(0, 5), st.integers(1, 4))
def test_each_index_comes_once_over_any_attempts_and_the_answer_ends_once(
    data: st.DataObject, num_received: int, num_attempts: int
) -> None:
    answer = Answer(ANSWER[:num_received])
    late: list[NewTokens] = []  # of revoked attempts, still on their way
    seen = list(ANSWER[:num_received])
    for number in range(1, num_attempts + 1):
        told = data.draw(pieces(number, len(answer.token_ids)))
        if number < num_attempts:  # it dies before it has said everything
            told = told[: data.draw(st.integers(0, len(told)))]
        for new in told:
            if late and data.draw(st.booleans()):
                stale = data.draw(st.sampled_from(late))
                before = answer.num_stale
                assert answer.accept(stale) == 0
                assert answer.num_stale == before + 1
            grown = answer.accept(new)
            assert grown == len(answer.token_ids) - len(seen)
            seen += answer.token_ids[len(seen) :]
            assert tuple(seen) == ANSWER[: len(seen)]
        if answer.finish_reason is not None:
            break
        late += told
        assert answer.next_attempt() == number + 1
    assert answer.finish_reason is FinishReason.LENGTH
    assert tuple(answer.token_ids) == ANSWER
    told = [entry.token_id if entry is not None else None for entry in answer.logprobs]
    assert told == [None] * num_received + list(ANSWER[num_received:])
    assert answer.end()
    assert not answer.end()


def test_a_token_before_the_ones_it_follows_waits_for_them() -> None:
    answer = Answer()
    assert answer.accept(message(1, 1, 3)) == 0
    assert answer.token_ids == []
    assert answer.accept(message(1, 0, 1)) == 3
    assert tuple(answer.token_ids) == ANSWER[:3]


def test_early_tokens_of_a_revoked_attempt_are_forgotten() -> None:
    answer = Answer()
    answer.accept(NewTokens(request_id="r", attempt=1, index=1, token_ids=(999,)))
    answer.next_attempt()
    assert answer.accept(message(2, 0, 2)) == 2
    assert tuple(answer.token_ids) == ANSWER[:2]


def test_the_end_does_not_overtake_missing_tokens() -> None:
    answer = Answer()
    answer.accept(message(1, 5, len(ANSWER)))
    assert answer.finish_reason is None
    answer.accept(message(1, 0, 5))
    assert answer.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("first_index", [0, 1], ids=["given out", "waiting"])
def test_two_tokens_for_one_position_are_corruption(first_index: int) -> None:
    answer = Answer()
    answer.accept(message(1, first_index, first_index + 1))
    with pytest.raises(KvCorrupted, match=f"position {first_index} "):
        answer.accept(NewTokens(request_id="r", attempt=1, index=first_index, token_ids=(7,)))


def test_nothing_is_accepted_after_the_end() -> None:
    answer = Answer()
    answer.end()
    assert answer.accept(message(1, 0, 3)) == 0
    assert (answer.token_ids, answer.num_stale) == ([], 1)


def test_repeated_tokens_are_counted() -> None:
    answer = Answer()
    answer.accept(message(1, 0, 3))
    answer.accept(message(1, 1, 4))
    assert answer.num_duplicates == 2
