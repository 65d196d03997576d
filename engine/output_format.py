"""Output formats through llguidance: which tokens may come next in an answer that must look like something.

A state is a function of the output tokens so far: wherever a sequence turns up, its tokens are replayed. Imports
neither torch nor transformers, because the router checks formats too.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ..core.errors import InvalidRequest
from ..core.request import FormatKind, OutputFormat
from ..scheduling.sequence import PENDING
from ..scheduling.sequence import Sequence as RunningSequence

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TokenMask = np.ndarray[Any, np.dtype[np.bool_]]

_FIELD = "output_format"
_MAX_STARTS = 16
# As much as nicely printed JSON needs; without a bound a model may write spaces until max_tokens.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{1,64}"}


@lru_cache(maxsize=64)
def check_format(output_format: OutputFormat) -> None:
    """Raises: InvalidRequest: it cannot be followed, and why."""
    llguidance = _library()
    message = llguidance.LLMatcher.validate_grammar(_grammar(output_format), limits=_limits())
    if message:
        raise _refusal(output_format, message)


class OutputFormats:
    """States of the sequences of one engine. Only its device thread calls.

    Args:
        directory: holds the model's tokenizer.json.
        eos_token_ids: the tokens that may come where an answer is complete.
    """

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._path = directory / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._states: WeakKeyDictionary[RunningSequence, _State] = WeakKeyDictionary()
        self._starts: dict[OutputFormat, LLMatcher] = {}  # compiled once: a large schema takes 30 ms

    def warm_up(self) -> None:
        """Read the tokenizer, so that the first request with a format need not: 0.2 s for 50,000 tokens."""
        with contextlib.suppress(InvalidRequest):  # told to whoever asks for a format
            self._load_tokenizer()

    def allowed(self, sequence: RunningSequence, num_tokens: int) -> TokenMask:
        """Which tokens [vocab_size] may follow the first `num_tokens` of the sequence; at least one may.

        Raises: InvalidRequest: the format cannot be followed, or the output so far does not.
        """
        output_format = sequence.request.output_format
        assert output_format is not None
        output = sequence.token_ids[sequence.request.num_prompt_tokens : num_tokens]
        assert PENDING not in output, "the next token follows from the one before it"
        state = self._states.get(sequence)
        if state is None:
            state = self._states[sequence] = _State(matcher=self._matcher(output_format))
        if len(output) > state.num_consumed:
            state.matcher.consume_tokens(list(output[state.num_consumed :]))
            state.num_consumed = len(output)
        bits = np.frombuffer(state.matcher.compute_bitmask(), np.uint8)
        if state.matcher.is_error():
            raise _refusal(output_format, state.matcher.get_error())
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        if not allowed.any():
            raise _refusal(output_format, f"no token can follow the {len(output)} that are there")
        return allowed

    def _matcher(self, output_format: OutputFormat) -> LLMatcher:
        """A fresh state. Raises: InvalidRequest: the format cannot be followed."""
        start = self._starts.get(output_format)
        if start is None:
            tokenizer = self._load_tokenizer()
            start = _library().LLMatcher(tokenizer, _grammar(output_format), log_level=0, limits=_limits())
            if start.is_error():
                raise _refusal(output_format, start.get_error())
            if len(self._starts) == _MAX_STARTS:
                del self._starts[next(iter(self._starts))]  # the one that has been there longest
            self._starts[output_format] = start
        return start.deep_copy()

    def _load_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is not None:
            return self._tokenizer
        if not self._eos_token_ids:
            raise InvalidRequest(
                "the model has no end-of-sequence token, so no answer in a format could end; leave the format out",
                field=_FIELD,
            )
        library = _library()
        try:
            tokenizer: LLTokenizer = library.LLTokenizer(
                str(self._path), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        except ValueError as error:
            raise InvalidRequest(
                f"output formats cannot be had with this model: its tokenizer {self._path} does not load ({error})",
                field=_FIELD,
            ) from error
        self._tokenizer = tokenizer
        return tokenizer


@dataclass(slots=True, kw_only=True)
class _State:
    matcher: LLMatcher
    num_consumed: int = 0  # output tokens


def _grammar(output_format: OutputFormat) -> str:
    """The format in llguidance's own notation. Raises: InvalidRequest."""
    matcher, source = _library().LLMatcher, output_format.source
    grammar: str
    match output_format.kind:
        case FormatKind.JSON_OBJECT:
            grammar = matcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON_OPTIONS)
        case FormatKind.JSON_SCHEMA:
            try:
                schema = json.loads(source)
            except (ValueError, RecursionError) as error:
                raise _refusal(output_format, f"it is not JSON: {error}") from error
            if not isinstance(schema, dict):
                raise _refusal(output_format, f"it is a JSON {type(schema).__name__}, a schema is an object")
            grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
        case FormatKind.REGEX:
            if (len(source) - len(source.rstrip("\\"))) % 2:  # the library would read it together with a / of its own
                raise _refusal(output_format, "it ends in the middle of an escape")
            grammar = matcher.grammar_from_regex(source)
        case FormatKind.GRAMMAR:
            if source.lstrip().startswith("{"):  # the library would read its own JSON notation
                raise _refusal(output_format, "a grammar consists of rules and does not begin with {")
            grammar = matcher.grammar_from_lark(source)
    return grammar


def _refusal(output_format: OutputFormat, message: str) -> InvalidRequest:
    reason = " ".join(message.split())[:300]
    return InvalidRequest(f"the {output_format.kind.value} cannot be followed: {reason}", field=_FIELD)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequest(
            "output formats need the extra package llguidance; install splitserve[structured] on routers and workers",
            field=_FIELD,
        ) from error
    return llguidance


def _limits() -> Any:
    return _library().LLParserLimits(verbose_errors=False)
