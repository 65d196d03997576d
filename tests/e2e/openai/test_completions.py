"""What the public `openai` client documents of models and completions is what it gets."""

from __future__ import annotations

import math
import re
from typing import Any

import httpx2
import openai
import pytest

# -- Models --


def test_models_lists_the_one_served(client: openai.OpenAI, model: str) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == (model, "model", "splitserve")
    assert card.created > 1_700_000_000


def test_models_retrieve_knows_it_and_no_other(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


# -- Completions --


def test_a_completion_has_every_documented_field(complete: Any, model: str) -> None:
    answer = complete("abc", max_tokens=5)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", model)
    assert answer.created > 1_700_000_000
    assert answer.system_fingerprint.startswith("splitserve-")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 5, 8)
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_max_tokens_is_sixteen_where_none_is_named(complete: Any) -> None:
    assert complete("abc", extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_usage_tells_where_the_time_went(complete: Any) -> None:
    (timing,) = complete("abcdefgh" * 5, max_tokens=4, extra_body={"ignore_eos": True}).usage.timing
    assert timing["prefill_worker"] == "prefill-0"
    assert timing["decode_worker"] == "decode-0"
    assert timing["kv_bytes"] > 0
    assert timing["transport"] == "shared_memory"
    assert 0 < timing["prefill_s"] <= timing["ttft_s"] <= timing["e2e_s"]
    assert timing["attempts"] == 1


def test_token_ids_and_text_are_the_same_prompt(complete: Any) -> None:
    assert complete([64, 65, 66]).choices[0].text == complete("abc").choices[0].text


def test_a_batch_of_prompts_is_answered_in_order(complete: Any) -> None:
    prompts = ["abc", "hello there", "xyz"]
    batch = complete(prompts, max_tokens=6)
    assert [choice.index for choice in batch.choices] == [0, 1, 2]
    assert [c.text for c in batch.choices] == [complete(p, max_tokens=6).choices[0].text for p in prompts]
    assert batch.usage.prompt_tokens == sum(map(len, prompts))


def test_a_batch_of_token_ids_is_answered_in_order(complete: Any) -> None:
    batch = complete([[64, 65, 66], [71]], max_tokens=4)
    assert [c.text for c in batch.choices] == [complete(p, max_tokens=4).choices[0].text for p in ("abc", "h")]


def test_echo_begins_with_the_prompt(complete: Any) -> None:
    plain = complete("abc", max_tokens=4).choices[0].text
    assert complete("abc", max_tokens=4, echo=True).choices[0].text == "abc" + plain
    assert complete([64, 65, 66], max_tokens=4, echo=True).choices[0].text == "abc" + plain


def test_suffix_is_refused_by_name(complete: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete("abc", suffix="z")
    assert caught.value.param == "suffix"


def test_n_choices_differ_and_come_again_with_their_seed(complete: Any) -> None:
    first = complete("abc", n=4, seed=7, temperature=1, max_tokens=8)
    again = complete("abc", n=4, seed=7, temperature=1, max_tokens=8)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.choices]
    assert first.usage.prompt_tokens == 3


def test_another_seed_is_another_answer(complete: Any) -> None:
    one, two = (complete("abc", seed=seed, temperature=1, max_tokens=16).choices[0].text for seed in (1, 2))
    assert one != two


def test_the_first_of_n_is_the_answer_of_the_same_seed_alone(complete: Any) -> None:
    several = complete("abc", n=3, seed=-5, temperature=1, max_tokens=8)
    alone = complete("abc", seed=-5, temperature=1, max_tokens=8)
    assert several.choices[0].text == alone.choices[0].text


def test_best_of_returns_the_likeliest(complete: Any) -> None:
    options = {"temperature": 1, "seed": 3, "max_tokens": 6, "logprobs": 0, "extra_body": {"ignore_eos": True}}

    def score(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    every = complete("abc", n=6, **options)
    best = complete("abc", n=2, best_of=6, **options)
    scores = sorted((score(choice) for choice in every.choices), reverse=True)
    assert [score(choice) for choice in best.choices] == pytest.approx(scores[:2])
    assert best.usage.completion_tokens == 36


def test_best_of_below_n_is_refused(complete: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="less than n") as caught:
        complete("abc", n=3, best_of=2)
    assert caught.value.param == "best_of"


def test_a_prompt_is_tokenised_once_however_many_answers_it_gets(
    client: openai.OpenAI, complete: Any, chat: Any
) -> None:
    url = str(client.base_url).removesuffix("/v1/")

    def count() -> float:
        return float(re.search(r"^splitserve_tokenizations_total (\S+)", httpx2.get(f"{url}/metrics").text, re.M)[1])

    before = count()
    complete(["abc", "def"], n=3, max_tokens=2)
    chat(n=3)
    chat()
    complete([64, 65], n=2, max_tokens=2)
    assert count() - before == 2 + 1 + 1 + 0


# -- Where an answer ends --


def longest_word(text: str) -> str:
    """Letters of an answer that a stop string can be made of."""
    return max(re.findall(r"[ -~]+", text), key=len)


def test_a_stop_string_across_tokens_ends_the_text_before_it(complete: Any) -> None:
    whole = complete("abc", max_tokens=60, extra_body={"ignore_eos": True}).choices[0].text
    word = longest_word(whole)
    assert len(word) > 1, "the tiny model's tokens are bytes"
    stopped = complete("abc", max_tokens=60, stop=[word, "never there"], extra_body={"ignore_eos": True})
    assert stopped.choices[0].text == whole[: whole.index(word)]
    assert stopped.choices[0].finish_reason == "stop"


def test_one_stop_string_needs_no_list(complete: Any) -> None:
    whole = complete("abc", max_tokens=40, extra_body={"ignore_eos": True}).choices[0].text
    word = longest_word(whole)
    assert word not in complete("abc", max_tokens=40, stop=word, extra_body={"ignore_eos": True}).choices[0].text


def test_a_stop_token_ends_the_answer(client: openai.OpenAI, complete: Any) -> None:
    options = {"max_tokens": 40, "logprobs": 0}
    tokens = complete("abc", **options, extra_body={"ignore_eos": True}).choices[0].logprobs.tokens
    at, letter = next((at, token) for at, token in enumerate(tokens) if re.fullmatch("[!-~]", token))
    url = str(client.base_url).removesuffix("/v1/")
    ids = httpx2.post(f"{url}/tokenize", json={"prompt": letter}).json()["tokens"]
    stopped = complete("abc", **options, extra_body={"stop_token_ids": ids, "ignore_eos": True})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].logprobs.tokens == tokens[: at + 1]


def test_min_tokens_holds_the_end_back(complete: Any) -> None:
    eager = {"257": 100}  # the end of sequence, at once
    assert complete("abc", logit_bias=eager, max_tokens=9).usage.completion_tokens == 1
    late = complete("abc", logit_bias=eager, max_tokens=9, extra_body={"min_tokens": 5})
    assert 5 <= late.usage.completion_tokens <= 6
    assert late.choices[0].finish_reason == "stop"


# -- How tokens are chosen --


def test_logit_bias_forbids_and_forces(complete: Any) -> None:
    forced = complete("abc", logit_bias={"64": 100}, max_tokens=4)
    assert forced.choices[0].text == "aaaa"
    forbidden = complete("abc", logit_bias={"64": 100, "65": -100, "66": 100}, max_tokens=8, temperature=2, seed=1)
    assert set(forbidden.choices[0].text) <= {"a", "c"}


def test_greedy_is_greedy_whatever_the_seed(complete: Any) -> None:
    texts = {complete("abc", seed=seed, max_tokens=12).choices[0].text for seed in (1, 2, 3)}
    assert len(texts) == 1


def test_top_k_of_one_is_greedy(complete: Any) -> None:
    hot = complete("abc", temperature=2, seed=1, max_tokens=12, extra_body={"top_k": 1})
    assert hot.choices[0].text == complete("abc", max_tokens=12).choices[0].text


def test_top_p_and_min_p_at_their_ends_are_greedy(complete: Any) -> None:
    greedy = complete("abc", max_tokens=12).choices[0].text
    assert complete("abc", temperature=1, seed=1, top_p=1e-6, max_tokens=12).choices[0].text == greedy
    assert complete("abc", temperature=1, seed=1, max_tokens=12, extra_body={"min_p": 1.0}).choices[0].text == greedy


def test_penalties_change_a_text_that_repeats(complete: Any) -> None:
    repeats = {"temperature": 1, "seed": 1, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    plain = complete("abc", **repeats).choices[0].text
    assert complete("abc", **repeats, presence_penalty=2).choices[0].text != plain
    assert complete("abc", **repeats, frequency_penalty=2).choices[0].text != plain
    repeats["extra_body"] = {"ignore_eos": True, "repetition_penalty": 1.9}
    assert complete("abc", **repeats).choices[0].text != plain


# -- Logprobs --


def test_completion_logprobs_have_their_documented_shape(complete: Any) -> None:
    choice = complete("abc", max_tokens=6, logprobs=3, extra_body={"ignore_eos": True}).choices[0]
    shown = choice.logprobs
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset) == 6
    assert all(value <= 0 for value in shown.token_logprobs)
    for token, value, top in zip(shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top.values()) == pytest.approx(value)  # greedy
        assert top[token] == pytest.approx(value)
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6


def test_echo_with_logprobs_scores_the_prompt(complete: Any) -> None:
    shown = complete("hello", max_tokens=0, echo=True, logprobs=2)
    (choice,) = shown.choices
    assert choice.text == "hello"
    assert choice.logprobs.tokens == list("hello")
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert shown.usage.completion_tokens == 0


def test_a_score_ends_for_length_whatever_token_would_have_come(complete: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 0, "echo": True, "extra_body": {"stop_token_ids": list(range(256))}}
    assert complete("hello", **options).choices[0].finish_reason == "length"
    assert [chunk.choices[0].finish_reason for chunk in complete("hello", **options, stream=True)] == [None, "length"]


def test_a_streamed_score_is_the_whole_one(client: openai.OpenAI, complete: Any, model: str) -> None:
    options: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 1}
    whole = complete("hello", **options)
    *chunks, last = client.completions.create(
        model=model, prompt="hello", stream=True, stream_options={"include_usage": True}, **options
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello"
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [row.tokens for row in told] == [whole.choices[0].logprobs.tokens]
    assert last.usage.completion_tokens == 0


def test_chat_logprobs_have_their_documented_shape(chat: Any) -> None:
    choice = chat(logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}).choices[0]
    assert len(choice.logprobs.content) == 8
    for row in choice.logprobs.content:
        assert row.logprob <= 0
        assert len(row.top_logprobs) == 2
        assert row.top_logprobs[0].logprob == pytest.approx(row.logprob)
        assert bytes(row.bytes).decode("utf-8", "replace") == row.token


def test_top_logprobs_need_logprobs(chat: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(top_logprobs=2)
    assert caught.value.param == "top_logprobs"
