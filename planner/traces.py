"""Recorded traffic: Mooncake's JSONL, Azure's CSV, and a plain CSV of timestamp, isl and osl."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..core.recorded_times import spread_note, spread_times
from .types import SimRequest

MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_TRACE = "mooncake_conversation_trace.jsonl"
AZURE_TRACE = "AzureLLMInferenceTrace_2023_conv.csv"

_PLAIN = ("timestamp", "isl", "osl")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = '{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival, the first at 0 s."""

    requests: tuple[SimRequest, ...]
    notes: tuple[str, ...] = ()  # what was done to them, for the reader of results


def data_directory() -> Path:
    """Where public traces lie that the project does not ship: SPLITSERVE_DATA, else ~/.cache/splitserve/data."""
    return Path(os.environ.get("SPLITSERVE_DATA") or Path.home() / ".cache" / "splitserve" / "data")


def read_trace(path: Path, *, spread: bool = True, seed: int = 0, limit: int | None = None) -> Trace:
    """A trace file; its kind is told by its suffix and header.

    Args:
        spread: where timestamps are rounded (Mooncake's to 3 s), put arrivals at random within their bin instead of
            all at its start, which would be bursts that nobody sent. Said in `notes`.
        seed: of that.
        limit: take only so many requests.
    Raises: ConfigError: the file cannot be read, or a line is wrong; it names file, line and what is wrong.
    """
    rows = _mooncake_rows(path) if path.suffix in (".jsonl", ".json") else _csv_rows(path)
    requests: list[SimRequest] = []
    for request in rows:
        requests.append(request)
        if limit is not None and len(requests) >= limit:
            break
    if not requests:
        raise ConfigError(f"{path} holds no requests")
    requests.sort(key=lambda request: request.arrival_s)
    notes: tuple[str, ...] = ()
    if spread:
        requests, notes = _spread(requests, path, seed)
    start_s = requests[0].arrival_s
    return Trace(
        requests=tuple(replace(request, arrival_s=request.arrival_s - start_s) for request in requests), notes=notes
    )


def _spread(requests: list[SimRequest], path: Path, seed: int) -> tuple[list[SimRequest], tuple[str, ...]]:
    times_s, bin_s = spread_times([request.arrival_s for request in requests], seed)
    if not bin_s:
        return requests, ()
    moved = [replace(request, arrival_s=at_s) for request, at_s in zip(requests, times_s, strict=True)]
    return sorted(moved, key=lambda request: request.arrival_s), (spread_note(path.name, bin_s),)


def _mooncake_rows(path: Path) -> Iterator[SimRequest]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _bad_line(path, number, "is not JSON", _MOONCAKE) from error
        if not isinstance(row, dict):
            raise _bad_line(path, number, f"is {json.dumps(row)[:40]}", _MOONCAKE)
        hash_ids = row.get("hash_ids", [])
        if not isinstance(hash_ids, list) or not all(isinstance(hash_id, int) for hash_id in hash_ids):
            raise _bad_line(path, number, "hash_ids is not a list of whole numbers", _MOONCAKE)
        request = SimRequest(
            arrival_s=_number(path, number, row, "timestamp", _MOONCAKE) / 1000,
            isl=_count(path, number, row, "input_length", _MOONCAKE),
            osl=_count(path, number, row, "output_length", _MOONCAKE),
            hash_ids=tuple(hash_ids),
            hash_block_tokens=MOONCAKE_BLOCK_TOKENS,
        )
        if hash_ids and len(hash_ids) * MOONCAKE_BLOCK_TOKENS < request.isl:
            what = f"{len(hash_ids)} hash_ids of {MOONCAKE_BLOCK_TOKENS} tokens do not cover {request.isl:,} tokens"
            raise _bad_line(path, number, what, _MOONCAKE)
        yield request


def _csv_rows(path: Path) -> Iterator[SimRequest]:
    reader = csv.DictReader(_lines(path))
    header = tuple(reader.fieldnames or ())
    names = next((names for names in (_AZURE, _PLAIN) if set(names) <= set(header)), None)
    if names is None:
        raise _bad_line(path, 1, f"the header is {','.join(header)!r}", f"{','.join(_PLAIN)} or {','.join(_AZURE)}")
    wanted = ",".join(names)
    for row in reader:
        number = reader.line_num
        yield SimRequest(
            arrival_s=_time(path, number, row, names[0], wanted),
            isl=_count(path, number, row, names[1], wanted),
            osl=_count(path, number, row, names[2], wanted),
        )


def _time(path: Path, number: int, row: Mapping[str, Any], name: str, wanted: str) -> float:
    """Seconds, from a number or from a date and time."""
    with suppress(TypeError, ValueError):
        if math.isfinite(found := float(row[name])):
            return found
    try:
        return datetime.fromisoformat(str(row[name])).timestamp()
    except ValueError as error:
        raise _bad_line(path, number, f"{name} is {row[name]!r}, no time", wanted) from error


def _number(path: Path, number: int, row: Mapping[str, Any], name: str, wanted: str) -> float:
    value = row.get(name)
    try:
        found = float(value) if value is not None and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise _bad_line(path, number, f"{name} is {value!r}, no number" if name in row else f"has no {name}", wanted)
    return found


def _count(path: Path, number: int, row: Mapping[str, Any], name: str, wanted: str) -> int:
    found = _number(path, number, row, name, wanted)
    if found < 1 or found != int(found):
        raise _bad_line(path, number, f"{name} is {found:g}; it must be a whole number of at least 1", wanted)
    return int(found)


def _bad_line(path: Path, number: int, what: str, wanted: str) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {what}; wanted {wanted}")


def _lines(path: Path) -> Iterator[str]:
    """Raises: ConfigError: there is no such file, or it is not UTF-8 text."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the trace {path}: {reason}") from error


def covered_tokens(requests: Sequence[SimRequest]) -> float:
    """Share of prompt tokens whose block an earlier prompt had at the same place: what an endless cache would serve."""
    seen: set[tuple[int, int]] = set()
    chains: dict[tuple[int, int], int] = {}
    covered = total = 0
    for request in requests:
        total += request.isl
        chain, known = 0, True
        for place, hash_id in enumerate(request.hash_ids):
            chain = chains.setdefault((chain, hash_id), len(chains) + 1)
            known = known and (chain, place) in seen
            seen.add((chain, place))
            if known:
                covered += min(request.hash_block_tokens, request.isl - place * request.hash_block_tokens)
    return covered / total if total else 0.0
