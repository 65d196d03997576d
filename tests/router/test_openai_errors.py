"""Complaints about a body name the field as OpenAI writes it, whatever union it is in."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from splitserve.router.openai.errors import invalid_body
from splitserve.router.openai.requests import ChatRequest

HELLO = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "got 'wizard'"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].tool_call_id", "is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "is missing"),
        ({"response_format": {}}, "response_format.type", "is missing"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}},
            "response_format.json_schema.schema",
            "got 5",
        ),
        ({"response_format": {"type": "regex"}}, "response_format.regex", "is missing"),
        ({"response_format": {"type": "grammar", "grammar": 5}}, "response_format.grammar", "got 5"),
    ],
)
def test_the_field_is_named_as_the_client_wrote_it(changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ValidationError) as wrong:
        ChatRequest.model_validate({"model": "m", "messages": [HELLO], **changes})
    error = invalid_body(wrong.value, ChatRequest)
    assert error.field == field
    assert error.message.startswith(field)
    assert message in error.message
