"""`splitserve generate`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..client import Client, GenerationResult, Message
from ..core.errors import InvalidRequest
from . import options
from .local import local_router


def command(
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" or nothing reads standard input.')] = None,
    address: options.Address = None,
    local: options.Local = False,
    model: options.Model = "",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    min_tokens: Annotated[int, typer.Option(help="Do not end by itself before so many tokens.")] = 0,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the answer follows.", exists=True, dir_okay=False)
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the answer matches as a whole.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Tell each token's log probability, and so many of the likeliest; with --json.")
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print the answer as it is made.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with tokens and timing.")] = False,
    timing: Annotated[bool, typer.Option("--timing", help="Show the request's timeline after the answer.")] = False,
    timeout: options.Timeout = 600.0,
) -> None:
    """Send one prompt to a router and print the answer.

    $ splitserve generate "The capital of France is" --max-tokens 16

    $ splitserve generate --chat "Why is the sky blue?" --temperature 0.7 --seed 1 --timing

    $ splitserve generate - --json < prompt.txt

    $ splitserve generate "My phone number: " --regex "[0-9]{3}-[0-9]{4}"

    $ splitserve generate --local "Once upon a time"
    """
    text = _read_stdin() if prompt in (None, "-") else prompt
    request = options.sampling_options(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop,
        timeout_s=timeout,
    )
    request["ignore_eos"] = ignore_eos
    request["min_tokens"] = min_tokens
    request["logprobs"] = logprobs
    if json_schema is not None:
        request["json_schema"] = _text_of(json_schema.read_bytes(), str(json_schema), "json_schema")
    if regex is not None:
        request["regex"] = regex
    messages = [Message(role="user", content=text)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    with (
        local_router(local, address, model) as router,
        Client(router) as client,
        client.stream(messages if chat or system is not None else text, **request) as answer,
    ):
        if stream and not as_json:
            printed = False
            try:
                for chunk in answer:
                    printed = True
                    print(chunk.text, end="", flush=True)
            finally:
                if printed:  # an error's line starts below what came of the answer
                    print(flush=True)
        result = answer.result()
    if as_json:
        print(json.dumps(_row(result), default=_text))
    elif not stream:
        print(result.text)
    if timing and not as_json:
        from rich.console import Console

        from .timeline import render

        Console().print(render(result))


def _read_stdin() -> str:
    """Standard input without its last newline. Raises: InvalidRequest: it is a terminal or not UTF-8."""
    if sys.stdin.isatty():
        raise InvalidRequest('no prompt: give it as an argument, or pipe it in and write "-"', field="prompt")
    return _text_of(sys.stdin.buffer.read(), "standard input", "prompt").removesuffix("\n")


def _text_of(data: bytes, source: str, field: str) -> str:
    """Raises: InvalidRequest: it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{source} is not valid UTF-8: byte {data[error.start]:#04x} at position {error.start}; "
            "convert it, for example with iconv",
            field=field,
        ) from error


def _row(result: GenerationResult) -> dict[str, Any]:
    return {
        **dataclasses.asdict(result),
        "finish_reason": result.finish_reason.value,
        "ttft_s": result.ttft_s,
        "tpot_s": result.tpot_s,
    }


def _text(data: object) -> str:
    """A token's bytes; those that are no whole character show as U+FFFD."""
    assert isinstance(data, bytes)
    return data.decode("utf-8", "replace")
