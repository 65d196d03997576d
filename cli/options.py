"""Flags that several subcommands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..client.address import find_routers as find_routers  # for subcommands that print the address
from ..client.request import RequestOptions
from ..core.errors import ConfigError

Address = Annotated[
    str | None,
    typer.Option(
        envvar="SPLITSERVE_ADDRESS",
        help="Router as HOST:PORT, several with commas; left out: the local cluster that `up` started.",
    ),
]
Local = Annotated[
    bool, typer.Option("--local", help="Start a local cluster for this command, if none is running and none is named.")
]
Model = Annotated[str, typer.Option(help="Model to ask; left out: the only one served.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 (greedy, the default) to 100.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens that sum to this probability.")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens at least this likely relative to the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes tokens already seen less likely.")]
PresencePenalty = Annotated[float | None, typer.Option(help="-2 to 2, once per token already in the answer.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="-2 to 2, per occurrence in the answer.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer; left out: the router picks one.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be given several times.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end of sequence.")]
Timeout = Annotated[float, typer.Option(help="Deadline of a request in seconds.")]


def check_output(flag: str, file: Path | None) -> None:
    """Before the work whose result it takes. Raises: ConfigError: the file could not be written."""
    if file is None:
        return
    if file.is_dir():
        raise ConfigError(f"{flag} {file}: it is a directory; name a file")
    if not os.access(file.absolute().parent, os.W_OK):
        raise ConfigError(f"{flag} {file}: its directory does not exist or cannot be written")
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"{flag} {file}: it cannot be written")


def sampling_options(
    *,
    model: str,
    max_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    presence_penalty: float | None,
    frequency_penalty: float | None,
    seed: int | None,
    stop: list[str] | None,
    timeout_s: float,
) -> RequestOptions:
    """The flags as the SDK takes them."""
    return {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": stop or (),
        "timeout_s": timeout_s,
    }
