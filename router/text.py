"""Text to token ids and back: chat template, tokenise once, detokenise as tokens come, stop strings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..core.errors import InvalidRequest, ModelLoadFailed
from .conversation import explain_tools
from .token_text import TokenText

LONG_TEXT_CHARS = 4_096  # from here on tokenising leaves the event loop
MAX_STOP_STRINGS = 16


class ModelText:
    """A model's tokenizer and chat template. Imports neither torch nor transformers: the router starts in a moment.

    Args:
        directory: holds tokenizer.json, and for chat tokenizer_config.json or chat_template.jinja.
        count: called once for each text that is tokenised.
    Raises: ModelLoadFailed: a file is missing or damaged.
    """

    def __init__(self, directory: Path, count: Callable[[], object] = lambda: None) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadFailed(
                f"there is no tokenizer.json in {directory}; make one with transformers: "
                "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelLoadFailed(f"{path} is damaged: {error}; fetch the model again") from error
        self.tokenizer.no_truncation()  # a prompt that is too long is an error, not a shorter prompt
        self.tokenizer.no_padding()
        self.token_text = TokenText(self.tokenizer)
        self._count = count
        config = _read_json(directory / "tokenizer_config.json")
        self._special = {
            name: _token_text(config[name]) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if config.get(name) is not None
        }  # fmt: skip
        source = _template_source(directory, config)
        self._template = _compile(source, directory) if source is not None else None
        self._knows_tools = source is not None and "tools" in source

    async def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens (BOS) that the model's tokenizer adds to it."""
        return await self._encode(text, special_tokens=True)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn. The template writes BOS itself.

        Raises: InvalidRequest: there is no chat template, or it refuses the conversation.
        """
        return await self._encode(self.render(messages, tools), special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The conversation as text. Raises: InvalidRequest.

        Args: messages, tools: as chat templates expect them, which is OpenAI's shape.
        """
        if self._template is None:
            raise InvalidRequest("the model has no chat template; send text or token ids", field="messages")
        if not messages:
            raise InvalidRequest("the conversation is empty; send at least one message", field="messages")
        try:
            if not self._knows_tools:
                messages, tools = explain_tools(messages, tools), ()
            return self._template.render(
                messages=messages, tools=tools or None, add_generation_prompt=True, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"the chat template refuses the conversation: {error}", field="messages") from error

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's own text."""
        return [self.tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids]

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no whole character show as U+FFFD."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)

    async def _encode(self, text: str, *, special_tokens: bool) -> list[int]:
        check_utf8(text)
        self._count()
        if len(text) < LONG_TEXT_CHARS:
            return list(self.tokenizer.encode(text, add_special_tokens=special_tokens).ids)
        return list((await self.tokenizer.async_encode(text, add_special_tokens=special_tokens)).ids)


def check_utf8(text: str) -> None:
    """Raises: InvalidRequest: a lone surrogate, which no UTF-8 text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text is not valid Unicode at character {error.start} ({error.reason}); send UTF-8", field="text"
        ) from error


class AnswerText:
    """The text of one answer as its tokens come.

    Text leaves only when it is certain: no partial character, and nothing that may turn out to be a stop string.

    Args: min_tokens: in the text of so many first tokens stop strings do not count.
    """

    def __init__(self, model_text: ModelText, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        if len(stop) > MAX_STOP_STRINGS or not all(stop):
            raise InvalidRequest(
                f"stop has {len(stop)} strings{'' if all(stop) else ', one of them empty'}; "
                f"send at most {MAX_STOP_STRINGS}, none empty",
                field="stop",
            )
        self._tokenizer = model_text.tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._num_free = min_tokens  # tokens to come in which stop strings do not count
        self._pending: list[int] = []  # tokens whose text is not out of the decoder yet
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False  # a stop string was found; text ends before it

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Text that became certain, and how many of the tokens were used: not all if a stop string came before."""
        parts = []
        for used, token_id in enumerate(token_ids, 1):
            free, self._num_free = self._num_free > 0, self._num_free - 1
            self._pending.append(token_id)
            text = self._step(token_id)
            if text is None:
                continue
            self._pending.clear()
            parts.append(text if free or not self._stop else self._until_stop(text))
            if self.stopped:
                return "".join(parts), used
        return "".join(parts), len(token_ids)

    def flush(self) -> str:
        """What is left at the end of the answer: held text, and a last character that never became whole."""
        text, self._held = self._held, ""
        if self._pending and not self.stopped:
            text += self._tokenizer.decode(self._pending, skip_special_tokens=True)
        return text

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001  the library raises nothing narrower
            # Bytes that are no text changed how those before them read, and these are out: go on from here.
            self._stream = DecodeStream(ids=self._pending, skip_special_tokens=True)
            return self._tokenizer.decode(self._pending, skip_special_tokens=True)

    def _until_stop(self, text: str) -> str:
        """Of the stop strings in the text the one that ends first counts, however the text was cut into tokens."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadFailed(f"{path} is damaged: {error}; fetch the model again") from error
    return content if isinstance(content, dict) else {}


def _token_text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    source: Any = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named ones
        source = {row["name"]: row["template"] for row in source}.get("default")
    return None if source is None else str(source)


def _compile(source: str, directory: Path) -> jinja2.Template:
    """The model's chat template, compiled as transformers does; it is the model's code, so it runs in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelLoadFailed(f"the chat template in {directory} is damaged: {error}") from error


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
