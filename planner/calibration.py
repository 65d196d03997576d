"""Calibration: a worker's step records become the costs of exactly that worker, with interval and held-out error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.events import StepRecord
from .fitting import Array, bootstrap, fit_relative, folds, held_out_errors, relative_errors
from .latency import Provenance, StepLatency

FORMAT = 1
# Tokens of a step beyond which each costs more: small steps wait for the weights, large ones for the arithmetic.
PREFILL_KNEES = (256.0, 512.0, 2048.0)
_MIN_RECORDS = 12  # of a kind; fewer cannot tell its costs apart
_MAX_RECORDS = 4_000  # of a kind, spread over the file
_FAR_OFF = 4.0  # times more or less than the other records say: not what the step cost
_ABOUT_EQUAL, _MIN_GROUP = 1.25, 3  # sizes of steps that are compared, and how many of them tell which are wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class KindFit:
    """Fit of one kind of step."""

    num_records: int
    error: float  # mean relative, held out
    in_sample_error: float
    low: dict[str, float]  # 5th percentile of each cost over resampled records
    high: dict[str, float]
    num_left_out: int = 0  # records far off what all others say


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a calibration file holds. A prefill worker alone tells nothing about decode, and the other way round."""

    latency: StepLatency
    prefill: KindFit | None
    decode: KindFit | None
    source: str
    num_kv_blocks: int | None = None  # of the worker, where it was asked
    max_step_tokens: int | None = None

    @property
    def provenance(self) -> Provenance:
        return Provenance(
            layer="calibrated",
            source=self.source,
            tpot_error=self.decode.error if self.decode else float("nan"),
            ttft_error=self.prefill.error if self.prefill else float("nan"),
        )


def prefill_design(tokens: Array, pairs: Array, sequences: Array) -> Array:
    """Columns: step, token, pair, sequence, and the tokens beyond each knee."""
    beyond = [np.maximum(0.0, tokens - knee) for knee in PREFILL_KNEES]
    return np.stack([np.ones_like(tokens), tokens, pairs, sequences, *beyond], axis=1)


def decode_design(batch: Array, context_tokens: Array) -> Array:
    """Columns: step, sequence, context token."""
    return np.stack([np.ones_like(batch), batch, context_tokens], axis=1)


_PREFILL_COLUMNS = ("step", "token", "pair", "sequence", *(f"token beyond {knee:.0f}" for knee in PREFILL_KNEES))
_DECODE_COLUMNS = ("step", "sequence", "context token")


def read_records(paths: Sequence[Path]) -> list[StepRecord]:
    """Step records of the JSON lines that workers write with --trace-dir. Raises: ConfigError, with file and line."""
    records = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--records: cannot read {path}: {error}") from error
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if row["type"] == "step":
                    records.append(StepRecord(**{k: v for k, v in row.items() if k not in ("type", "process")}))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: not a step record or event: {error}") from error
    return records


def calibrate(records: Iterable[StepRecord], *, source: str, seed: int = 0) -> Calibration:
    """Fit the costs of the worker that wrote the records.

    Raises: ConfigError: fewer than 12 prefill and fewer than 12 decode steps.
    """
    prefill = [record for record in records if record.kind == "prefill"]
    decode = [record for record in records if record.kind == "decode"]
    # The first steps of a process pay for memory and caches that later ones find ready.
    prefill, decode = (_spread(kind[min(3, len(kind) // 10) :]) for kind in (prefill, decode))
    if len(prefill) < _MIN_RECORDS and len(decode) < _MIN_RECORDS:
        raise ConfigError(
            f"{len(prefill)} prefill and {len(decode)} decode steps in the records; a calibration needs at least "
            f"{_MIN_RECORDS} of a kind, of different sizes"
        )
    prefill_x, prefill_fit = np.zeros(len(_PREFILL_COLUMNS)), None
    if len(prefill) >= _MIN_RECORDS:
        tokens = np.array([float(record.num_prefill_tokens) for record in prefill])
        sequences = np.array([float(record.num_sequences) for record in prefill])
        ends = np.array([float(record.num_context_tokens) for record in prefill])
        # Of equal chunks: each of t/n new tokens that end at e/n attends to e/n - t/2n others on average.
        pairs = tokens * (ends - tokens / 2) / sequences
        matrix, seconds = prefill_design(tokens, pairs, sequences), np.array([record.total_s for record in prefill])
        prefill_x, prefill_fit = _fit(matrix, seconds, _PREFILL_COLUMNS, seed)
    decode_x, decode_fit = np.zeros(len(_DECODE_COLUMNS)), None
    if len(decode) >= _MIN_RECORDS:
        batch = np.array([float(record.num_decode_tokens) for record in decode])
        context = np.array([float(record.num_context_tokens) for record in decode])
        matrix, seconds = decode_design(batch, context), np.array([record.total_s for record in decode])
        decode_x, decode_fit = _fit(matrix, seconds, _DECODE_COLUMNS, seed)
    latency = StepLatency(
        prefill_base_s=float(prefill_x[0]),
        prefill_token_s=float(prefill_x[1]),
        prefill_pair_s=float(prefill_x[2]),
        prefill_sequence_s=float(prefill_x[3]),
        prefill_knees=tuple((knee, float(x)) for knee, x in zip(PREFILL_KNEES, prefill_x[4:], strict=True) if x > 0),
        decode_base_s=float(decode_x[0]),
        decode_sequence_s=float(decode_x[1]),
        decode_context_s=float(decode_x[2]),
    )
    return Calibration(latency=latency, prefill=prefill_fit, decode=decode_fit, source=source)


def _spread(records: list[StepRecord]) -> list[StepRecord]:
    return records[:: max(1, len(records) // _MAX_RECORDS)]


def _fit(matrix: Array, seconds: Array, columns: Sequence[str], seed: int) -> tuple[Array, KindFit]:
    num_records = len(seconds)
    likely = _likely(matrix, seconds)
    matrix, seconds = matrix[likely], seconds[likely]
    x = fit_relative(matrix, seconds)
    low, high = bootstrap(matrix, seconds, seed=seed)
    held = held_out_errors(matrix, seconds, folds(len(seconds), 5, seed))
    fit = KindFit(
        num_records=len(seconds),
        error=float(np.abs(held).mean()),
        in_sample_error=float(np.abs(relative_errors(matrix, seconds, x)).mean()),
        low=dict(zip(columns, low.tolist(), strict=True)),
        high=dict(zip(columns, high.tolist(), strict=True)),
        num_left_out=num_records - len(seconds),
    )
    return x, fit


def _likely(matrix: Array, seconds: Array) -> NDArray[np.bool_]:
    """Rows that are not far off a fit through the median of each group of about equal steps.

    A step that compiles something first seems too long, and the one that ran meanwhile, behind it, far too short. Of
    relative errors the second kind would decide the fit: what took a hundredth of its time is wrong by 10,000 %.
    """
    sizes = np.round(np.log(np.maximum(matrix[:, 1:], 1.0)) / np.log(_ABOUT_EQUAL))
    _, group, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    medians = []
    for number in np.flatnonzero(counts >= _MIN_GROUP):
        rows = np.flatnonzero(group.ravel() == number)
        medians.append(rows[np.argsort(seconds[rows])[len(rows) // 2]])
    if len(medians) < matrix.shape[1]:
        return np.ones(len(seconds), dtype=bool)
    expected = matrix @ fit_relative(matrix[medians], seconds[medians])
    return np.asarray((expected < _FAR_OFF * seconds) & (seconds < _FAR_OFF * expected))


def write_calibration(path: Path, calibration: Calibration, facts: Mapping[str, object]) -> None:
    """Write the file that `splitserve plan --calibration` reads; `facts` say what was measured."""
    document = {"format": FORMAT, **asdict(calibration), **facts}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_calibration(path: Path) -> Calibration:
    """Raises: ConfigError: the file is missing, or none that `splitserve calibrate` wrote."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ConfigError(f"{path}: format {document['format']}, this version reads {FORMAT}; calibrate again")
        row = dict(document["latency"])
        row["prefill_knees"] = tuple((float(knee), float(seconds)) for knee, seconds in row["prefill_knees"])
        return Calibration(
            latency=StepLatency(**row),
            prefill=KindFit(**document["prefill"]) if document["prefill"] else None,
            decode=KindFit(**document["decode"]) if document["decode"] else None,
            source=document["source"],
            num_kv_blocks=document.get("num_kv_blocks"),
            max_step_tokens=document.get("max_step_tokens"),
        )
    except OSError as error:
        raise ConfigError(f"--calibration: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--calibration: {path} is not a file of `splitserve calibrate`: {error!r}") from error


def merge_calibrations(given: Sequence[Calibration]) -> Calibration:
    """One latency model of a prefill worker's and a decode worker's calibration.

    Raises: ConfigError: two of them measured the same kind of step, or one kind is in none.
    """
    prefill = [one for one in given if one.prefill is not None]
    decode = [one for one in given if one.decode is not None]
    for kind, found in (("prefill", prefill), ("decode", decode)):
        if len(found) != 1:
            raise ConfigError(
                f"--calibration: {len(found)} of {len(given)} files hold {kind} steps; give one that does, or two "
                "files of which each holds one kind"
            )
    first, second = prefill[0], decode[0]
    if first is second:
        return first
    latency = replace(
        first.latency,
        decode_base_s=second.latency.decode_base_s,
        decode_sequence_s=second.latency.decode_sequence_s,
        decode_context_s=second.latency.decode_context_s,
    )
    source = f"{first.source}; {second.source}"
    return Calibration(
        latency=latency,
        prefill=first.prefill,
        decode=second.decode,
        source=source,
        num_kv_blocks=second.num_kv_blocks,
        max_step_tokens=first.max_step_tokens,
    )
