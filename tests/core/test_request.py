import math

import pytest
from splitserve.core.errors import InvalidRequest, PromptTooLong
from splitserve.core.request import FormatKind, OutputFormat, Request, SamplingParams, derive_seed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def request(num_prompt: int, max_tokens: int = 1) -> Request:
    return Request(request_id="r", prompt_token_ids=tuple(range(num_prompt)), max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "error", "field"),
    [
        (0, 1, InvalidRequest, "prompt"),
        (5, 0, InvalidRequest, "max_tokens"),
        (64, 1, PromptTooLong, "prompt"),
        (60, 5, PromptTooLong, "max_tokens"),
    ],
)
def test_a_request_that_cannot_fit_is_refused(
    num_prompt: int, max_tokens: int, error: type[InvalidRequest], field: str
) -> None:
    with pytest.raises(error) as caught:
        request(num_prompt, max_tokens).validate(max_model_len=64, vocab_size=100)
    assert type(caught.value) is error
    assert caught.value.field == field


def test_a_request_that_just_fits_is_taken() -> None:
    request(60, 4).validate(max_model_len=64, vocab_size=60)


@pytest.mark.parametrize("token_id", [-1, 100])
def test_a_token_outside_the_vocabulary_is_named(token_id: int) -> None:
    bad = Request(request_id="r", prompt_token_ids=(1, token_id), max_tokens=1)
    with pytest.raises(InvalidRequest, match=f"token id {token_id} "):
        bad.validate(max_model_len=64, vocab_size=100)


def make(**changes: object) -> Request:
    return Request(**{"request_id": "r", "prompt_token_ids": (1,), "max_tokens": 4, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 20, "prompt_token_ids": (1,) * 19_048}, "prompt_logprobs"),
        ({"sampling": SamplingParams(logit_bias=((10, 1.0),))}, "logit_bias"),
        ({"output_format": OutputFormat(kind=FormatKind.JSON_OBJECT), "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        make(**changes).validate(max_model_len=20_000, vocab_size=10)
    assert caught.value.field == field


def test_answers_of_one_request_have_seeds_of_their_own_and_the_first_keeps_it() -> None:
    seeds = [derive_seed(7, choice) for choice in range(100)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 100
    assert seeds == [derive_seed(7, choice) for choice in range(100)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(8, 1) not in seeds
