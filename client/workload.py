"""Requests to load a router with: random tokens, prompts of a file, or a trace of real traffic."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ..core.errors import ConfigError
from ..core.recorded_times import spread_note, spread_times
from .request import Prompt
from .results import Model

_Item = TypeVar("_Item")

_MOONCAKE_BLOCK = 512  # tokens that one hash id of a Mooncake trace stands for
_PLAIN = ("timestamp", "isl", "osl")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """One request to send."""

    prompt: Prompt
    max_tokens: int
    at_s: float = 0.0  # arrival, since the start of the run
    ignore_eos: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One request of a trace file: when, how long, and which blocks of the prompt it shares with others."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests still to be made: they are, one at a time, once the served model is known."""

    num_requests: int
    make: Callable[[Model], Iterator[LoadRequest]]
    notes: tuple[str, ...] = ()  # what was done to them, for the reader of results


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds since the start at which requests arrive, `rate` a second on average, without end."""
    rng = random.Random(f"{seed}:arrivals")
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate)
        yield at_s


def random_workload(
    arrivals: Iterator[float], *, num_requests: int, input_len: int, output_len: int, seed: int
) -> Workload:
    """Prompts of random token ids: no two share a prefix."""

    def make(model: Model) -> Iterator[LoadRequest]:
        for index, at_s in enumerate(islice(arrivals, num_requests)):
            prompt = _random_tokens(model, input_len, f"{seed}:prompt {index}")
            yield LoadRequest(prompt=prompt, max_tokens=output_len, at_s=at_s)

    return Workload(num_requests=num_requests, make=make)


def prompts_workload(arrivals: Iterator[float], path: Path, *, num_requests: int | None, output_len: int) -> Workload:
    """The lines of a text file that are not blank, each once; answers may end early.

    Raises: ConfigError: the file cannot be read or holds none.
    """
    prompts = _some(path, (line for line in _lines(path) if line.strip()), num_requests)

    def make(model: Model) -> Iterator[LoadRequest]:
        for prompt, at_s in zip(prompts, arrivals, strict=False):
            yield LoadRequest(prompt=prompt, max_tokens=output_len, at_s=at_s, ignore_eos=False)

    return Workload(num_requests=len(prompts), make=make)


def trace_workload(
    path: Path, *, num_requests: int | None, time_scale: float, max_input_len: int | None, seed: int
) -> Workload:
    """A trace's requests with random tokens; equal hash ids become equal blocks, so prefixes are shared as recorded.

    Lengths are clipped to `max_input_len` and to what the model can hold; rounded times are spread, as a plan does.
    Raises: ConfigError: the file cannot be read, a row is wrong, or it holds none.
    """
    rows = sorted(_some(path, read_trace(path), num_requests), key=lambda row: row.at_s)
    times_s, bin_s = spread_times([row.at_s for row in rows], seed)
    first_s = min(times_s)
    arrivals = sorted(zip(times_s, rows, strict=True), key=lambda arrival: arrival[0])

    def make(model: Model) -> Iterator[LoadRequest]:
        limit = min(max_input_len or model.max_model_len, model.max_model_len - 1)
        for index, (at_s, row) in enumerate(arrivals):
            input_len = min(row.num_prompt_tokens, limit)
            prompt: list[int] = []
            for name in row.hash_ids or (f"row {index}",):
                if len(prompt) < input_len:
                    prompt += _random_tokens(model, _MOONCAKE_BLOCK if row.hash_ids else input_len, f"{seed}:{name}")
            yield LoadRequest(
                prompt=prompt[:input_len],
                max_tokens=min(row.num_output_tokens, model.max_model_len - input_len),
                at_s=(at_s - first_s) * time_scale,
            )

    notes = (spread_note(path.name, bin_s),) if bin_s else ()
    return Workload(num_requests=len(rows), make=make, notes=notes)


def read_trace(path: Path) -> Iterator[TraceRow]:
    """Rows of a trace, times from its first row on.

    Formats: `.csv` as Azure publishes (TIMESTAMP, ContextTokens, GeneratedTokens) or plain (timestamp, isl, osl);
    `.jsonl` as Mooncake does (timestamp in ms, input_length, output_length, hash_ids).
    Raises: ConfigError: the file cannot be read, with its line.
    """
    rows = _csv_rows(path) if path.suffix == ".csv" else _mooncake_rows(path)
    first_s: float | None = None
    for row in rows:
        first_s = row.at_s if first_s is None else first_s
        yield TraceRow(
            at_s=row.at_s - first_s,
            num_prompt_tokens=row.num_prompt_tokens,
            num_output_tokens=row.num_output_tokens,
            hash_ids=row.hash_ids,
        )


def _csv_rows(path: Path) -> Iterator[TraceRow]:
    reader = csv.DictReader(_lines(path))
    at, isl, osl = _PLAIN if set(_PLAIN) <= set(reader.fieldnames or ()) else _AZURE
    for row in reader:
        try:
            yield _checked(at_s=_seconds(row[at]), num_prompt_tokens=int(row[isl]), num_output_tokens=int(row[osl]))
        except (KeyError, ValueError, TypeError) as error:
            raise _bad_row(path, reader.line_num, error, f"{','.join(_AZURE)} or {','.join(_PLAIN)}") from error


def _seconds(text: str) -> float:
    """From a number or from a date and time."""
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def _mooncake_rows(path: Path) -> Iterator[TraceRow]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
            yield _checked(
                at_s=row["timestamp"] / 1000,
                num_prompt_tokens=int(row["input_length"]),
                num_output_tokens=int(row["output_length"]),
                hash_ids=tuple(row.get("hash_ids", ())),
            )
        except (KeyError, ValueError, TypeError) as error:
            wanted = '{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}'
            raise _bad_row(path, number, error, wanted) from error


def _random_tokens(model: Model, count: int, seed: str) -> list[int]:
    return random.Random(seed).choices(range(model.vocab_size), k=count)


def _some(path: Path, items: Iterator[_Item], limit: int | None) -> list[_Item]:
    """At most `limit` items. Raises: ConfigError: there is none."""
    found = list(islice(items, limit))
    if not found:
        raise ConfigError(f"{path} holds no requests")
    return found


def _checked(
    *, at_s: float, num_prompt_tokens: int, num_output_tokens: int, hash_ids: tuple[int, ...] = ()
) -> TraceRow:
    if not math.isfinite(at_s):
        raise ValueError(f"the time is {at_s}")
    if num_prompt_tokens < 1 or num_output_tokens < 1:
        raise ValueError(f"{num_prompt_tokens} tokens in and {num_output_tokens} out; both must be at least 1")
    if hash_ids and len(hash_ids) * _MOONCAKE_BLOCK < num_prompt_tokens:
        raise ValueError(f"{len(hash_ids)} hash ids are too few for {num_prompt_tokens} tokens")
    return TraceRow(
        at_s=at_s, num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens, hash_ids=hash_ids
    )


def _bad_row(path: Path, number: int, error: Exception, wanted: str) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {error!r}; wanted {wanted}")


def _lines(path: Path) -> Iterator[str]:
    """Raises: ConfigError: there is no such file, or it is not UTF-8 text."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
