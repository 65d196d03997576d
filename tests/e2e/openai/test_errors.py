"""Errors reach the public `openai` client with the status, the field and the words that it documents."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

from .conftest import HELLO


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"extra_body": {"min_p": 7}}, "min_p"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"user": 5}}, "user"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": [99_999], "echo": True}, "prompt"),
        ({"extra_body": {"response_format": {"type": "xml"}}}, "response_format.type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_400_with_the_field_s_name(
    client: openai.OpenAI, model: str, wrong: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": model, "prompt": "abc", **wrong})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_list_of_a_wrong_length_says_which_would_do(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="stop has 17 entries; send at most 16"):
        client.completions.create(model=model, prompt="abc", stop=["a"] * 17)
    with pytest.raises(openai.BadRequestError, match="messages has 0 entries; send at least 1"):
        client.chat.completions.create(model=model, messages=[])


def test_a_token_that_there_is_not_has_no_text(client: openai.OpenAI) -> None:
    url = str(client.base_url).removesuffix("/v1/")
    answer = httpx2.post(f"{url}/detokenize", json={"tokens": [1, 99_999]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tokens"


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_prompt_too_long_says_so(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a" * 5_000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_embeddings_are_refused(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings are not served"):
        client.embeddings.create(model=model, input="abc")


def test_a_deadline_is_504(complete: Any) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        complete("abc", max_tokens=1_000, extra_body={"ignore_eos": True, "timeout_s": 0.05})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
