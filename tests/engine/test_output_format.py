"""Output formats: what is refused, and that every token that is allowed leads to an answer that fits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from splitserve.core.errors import InvalidRequest
from splitserve.core.request import FormatKind, OutputFormat, Request
from splitserve.engine.loading import LoadedModel
from splitserve.engine.output_format import OutputFormats, check_format
from splitserve.engine.testing import EOS_TOKEN_ID, VOCAB_SIZE
from splitserve.scheduling.sequence import PENDING, Sequence

REGEX, GRAMMAR, SCHEMA = FormatKind.REGEX, FormatKind.GRAMMAR, FormatKind.JSON_SCHEMA
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"enum": ["x", 1, None, {"k": [True]}]},
    {"type": "string", "pattern": "^[a-z]{2,4}$"},
    {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0, "maximum": 10}]},
    {"$defs": {"t": {"type": "object", "properties": {"t": {"$ref": "#/$defs/t"}}, "additionalProperties": False}},
     "$ref": "#/$defs/t"},
    {"type": "string", "format": "date"},
]  # fmt: skip


def sequence(output_format: OutputFormat, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (3, 4)) -> Sequence:
    request = Request(
        request_id="r",
        prompt_token_ids=prompt,
        output_token_ids=output,
        max_tokens=1000,
        output_format=output_format,
    )
    return Sequence(request=request, token_ids=[*prompt, *output], arrival=1)


@pytest.fixture
def formats(tiny: LoadedModel) -> OutputFormats:
    return OutputFormats(tiny.path, VOCAB_SIZE, tiny.eos_token_ids)


def text_of(tiny: LoadedModel, token_ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tiny.path / "tokenizer.json")).decode(token_ids)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_any_walk_over_allowed_tokens_ends_in_a_document_that_fits(
    tiny: LoadedModel, formats: OutputFormats, schema: dict[str, Any]
) -> None:
    choose = random.Random(0)
    ended = 0
    for _ in range(12):
        running = sequence(OutputFormat(kind=SCHEMA, source=json.dumps(schema)))
        while running.num_output < 300:
            allowed = np.flatnonzero(formats.allowed(running, running.num_tokens))
            token_id = EOS_TOKEN_ID if EOS_TOKEN_ID in allowed else int(choose.choice(allowed))
            running.token_ids.append(token_id)
            if token_id == EOS_TOKEN_ID:
                jsonschema.validate(json.loads(text_of(tiny, running.token_ids[2:-1])), schema)
                ended += 1
                break
    assert ended >= 6


def test_a_state_is_a_function_of_the_output_so_far(tiny: LoadedModel, formats: OutputFormats) -> None:
    """As it must be after a hand-over, a retry and a preemption, whatever else the engine runs."""
    output_format = OutputFormat(kind=FormatKind.JSON_OBJECT)
    choose = random.Random(1)
    running = sequence(output_format)
    for _ in range(60):
        allowed = formats.allowed(running, running.num_tokens)
        output = tuple(running.token_ids[2:])
        moved = sequence(output_format, output, prompt=(9,))
        other = OutputFormats(tiny.path, VOCAB_SIZE, tiny.eos_token_ids)
        assert (other.allowed(moved, moved.num_tokens) == allowed).all()
        assert (formats.allowed(moved, moved.num_tokens) == allowed).all()
        choices = [i for i in np.flatnonzero(allowed) if i != EOS_TOKEN_ID]
        if not choices:
            break
        running.token_ids.append(int(choose.choice(choices)))


def test_many_formats_are_followed_at_once_and_again(formats: OutputFormats) -> None:
    for _ in range(2):
        for number in range(40):
            running = sequence(OutputFormat(kind=REGEX, source=f"{chr(97 + number % 26)}{{{number + 1}}}"))
            assert np.flatnonzero(formats.allowed(running, 2)).tolist() == [64 + number % 26]


def test_a_token_that_is_still_being_chosen_is_never_part_of_a_state(formats: OutputFormats) -> None:
    running = sequence(OutputFormat(kind=REGEX, source="a+"))
    running.token_ids.append(PENDING)
    assert formats.allowed(running, 2).sum() == 1
    with pytest.raises(AssertionError):
        formats.allowed(running, 3)


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        (REGEX, "(a", "unclosed group"),
        (REGEX, "(?=a)b", "look"),
        (REGEX, "a\\\\\\", "middle of an escape"),
        (GRAMMAR, "start: foo", "unknown name"),
        (GRAMMAR, 'root: "a"', "no start rule"),
        (GRAMMAR, '{"grammars": []}', "does not begin with"),
        (SCHEMA, "{", "not JSON"),
        (SCHEMA, "[" * 100_000, "not JSON"),
        (SCHEMA, "[1]", "JSON list"),
        (SCHEMA, '{"type": "objct"}', "Invalid type"),
        (SCHEMA, '{"enum": []}', "Unsatisfiable"),
        (SCHEMA, '{"$ref": "https://example.com/schema"}', "does not fetch"),
        (SCHEMA, '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        (SCHEMA, '{"type": "integer"}}], "x": [{"a": {}', "not JSON"),
    ],
)
def test_a_format_that_cannot_be_followed_is_refused_with_the_reason(kind: Any, source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check_format(OutputFormat(kind=kind, source=source))
    assert caught.value.field == "output_format"


def test_what_can_be_followed_is_not_refused() -> None:
    for schema in SCHEMAS:
        check_format(OutputFormat(kind=SCHEMA, source=json.dumps(schema)))
    check_format(OutputFormat(kind=FormatKind.JSON_OBJECT))


def test_output_that_left_the_format_is_an_error(formats: OutputFormats) -> None:
    running = sequence(OutputFormat(kind=REGEX, source="[0-9]+"), output=(70,))
    with pytest.raises(InvalidRequest, match="cannot be followed"):
        formats.allowed(running, running.num_tokens)


def test_a_tokenizer_that_does_not_load_is_an_error_of_the_request_and_not_of_the_start(tmp_path: Path) -> None:
    broken = OutputFormats(tmp_path, VOCAB_SIZE, frozenset({EOS_TOKEN_ID}))
    broken.warm_up()
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json does not load"):
        broken.allowed(sequence(OutputFormat(kind=REGEX, source="a")), 2)


def test_a_model_without_an_end_takes_no_format(tiny: LoadedModel) -> None:
    endless = OutputFormats(tiny.path, VOCAB_SIZE, frozenset())
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        endless.allowed(sequence(OutputFormat(kind=REGEX, source="a")), 2)
