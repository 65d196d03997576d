"""`splitserve chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Annotated

import typer

from ..client import Client, Message, RequestOptions
from ..core.errors import SplitserveError
from . import options
from .local import local_router


def command(
    address: options.Address = None,
    local: options.Local = False,
    model: options.Model = "",
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    timeout: options.Timeout = 600.0,
) -> None:
    """Talk with the model, turn by turn; /reset starts over, /exit leaves, Ctrl-C cancels an answer.

    With input from a pipe the exit code is 1 if the last turn failed.

    $ splitserve chat --system "You are a terse assistant." --temperature 0.7
    """
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
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  editing and history for input()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 costs its turn, not the conversation
    opening = [] if system is None else [Message(role="system", content=system)]
    conversation, failed = list(opening), False
    with local_router(local, address, model) as router, Client(router) as client:
        while (line := _ask()) is not None and line != "/exit":
            if line == "/reset":
                conversation = list(opening)
            elif line:
                turn = Message(role="user", content=line)
                reply, failed = _answer(client, [*conversation, turn], request)
                if reply:
                    conversation += [turn, Message(role="assistant", content=reply)]
    if failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _ask() -> str | None:
    """The next line; None at the end of input."""
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n/exit leaves")


def _answer(client: Client, messages: list[Message], request: RequestOptions) -> tuple[str, bool]:
    """Print the answer as it is made; what of it came, also where it was cancelled or failed, and whether it failed."""
    texts, failed = [], False
    try:
        with client.stream(messages, **request) as stream:
            for chunk in stream:
                texts.append(chunk.text)
                print(chunk.text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n(cancelled)")
    except SplitserveError as error:
        typer.secho(f"\nerror: {error.message}", fg="red", err=True)
        failed = True
    return "".join(texts), failed
