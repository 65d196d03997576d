"""Was the plan right? A `splitserve bench --json` result beside what was predicted for it, and a history of both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table

from ..core.errors import ConfigError

QUANTITIES = ("ttft", "tpot", "itl")
PERCENTILES = ("p50", "p90", "p99")
TOLERANCE: Mapping[str, float] = {"p50": 0.15, "p90": 0.25}  # share of what was measured; p99 is shown, not judged
_RATE_TOLERANCE = 0.1
_MAX_SEND_LAG = 0.1  # of the median TTFT

Verdict = Literal["held", "missed", "shown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a plan or a simulation said; seconds by quantity and percentile."""

    source: str
    rate: float | None  # requests per second that it was made for
    values: Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a load run met."""

    source: str
    ended_at: str
    rate: float  # requests per second that were sent
    num_requests: int
    num_failed: int
    max_send_lag_s: float
    values: Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One percentile of one quantity."""

    quantity: str
    percentile: str
    predicted_s: float
    measured_s: float
    verdict: Verdict

    @property
    def error(self) -> float:
        """Relative to what was measured; above 0: predicted too slow."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s > 0 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A prediction held against a measurement."""

    prediction: Prediction
    measurement: Measurement
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]  # why the two may not be comparable

    @property
    def held(self) -> bool:
        return all(row.verdict != "missed" for row in self.comparisons)


def verify(
    result: Path,
    prediction: Path,
    *,
    history: Path | None = None,
    tolerance: Mapping[str, float] = TOLERANCE,
) -> Verification:
    """Compare, per percentile, and append to the history.

    Args:
        result: of `splitserve bench --json`.
        prediction: of `splitserve plan --json` or `splitserve simulate --json`.
        history: JSON lines, one a verification.
    Raises: ConfigError: a file cannot be read or is something else, or the two have nothing in common.
    """
    found = compare(read_measurement(result), read_prediction(prediction), tolerance=tolerance)
    if history is not None:
        append_history(history, found)
    return found


def compare(
    measurement: Measurement, prediction: Prediction, *, tolerance: Mapping[str, float] = TOLERANCE
) -> Verification:
    """Raises: ConfigError: the two have no percentile in common."""
    rows = []
    for quantity in QUANTITIES:
        for percentile in PERCENTILES:
            key = (quantity, percentile)
            if key not in prediction.values or key not in measurement.values:
                continue
            predicted_s, measured_s = prediction.values[key], measurement.values[key]
            limit = tolerance.get(percentile)
            held = limit is not None and abs(predicted_s - measured_s) <= limit * measured_s
            rows.append(
                Comparison(
                    quantity=quantity,
                    percentile=percentile,
                    predicted_s=predicted_s,
                    measured_s=measured_s,
                    # A percentile of ITL is over single gaps, which a client sees bunched: shown, not judged.
                    verdict="shown" if limit is None or quantity == "itl" else "held" if held else "missed",
                )
            )
    if not rows:
        raise ConfigError(
            f"{prediction.source} and {measurement.source} share no percentile of TTFT, TPOT or ITL; "
            "verify needs a run in which requests finished"
        )
    return Verification(
        prediction=prediction,
        measurement=measurement,
        comparisons=tuple(rows),
        notes=_notes(measurement, prediction),
    )


def _notes(measurement: Measurement, prediction: Prediction) -> tuple[str, ...]:
    notes = []
    if prediction.rate and abs(measurement.rate / prediction.rate - 1) > _RATE_TOLERANCE:
        notes.append(
            f"the run sent {measurement.rate:.3g} requests/s, the prediction is for {prediction.rate:.3g}: "
            "compare like with like"
        )
    if measurement.num_failed:
        notes.append(f"{measurement.num_failed:,} of {measurement.num_requests:,} requests failed in the run")
    ttft_s = measurement.values.get(("ttft", "p50"), 0.0)
    if measurement.max_send_lag_s > _MAX_SEND_LAG * ttft_s:
        notes.append(
            f"the client itself sent up to {measurement.max_send_lag_s * 1e3:,.1f} ms late, which the run counts as "
            "TTFT: distrust it"
        )
    return tuple(notes)


def read_measurement(path: Path) -> Measurement:
    """Raises: ConfigError: it is not a result of `splitserve bench --json`."""
    document = _read_json(path)
    summary, rows = document.get("summary"), document.get("requests")
    if not isinstance(summary, dict) or not isinstance(rows, list) or "num_finished" not in summary:
        raise ConfigError(f"{path} is not a result of `splitserve bench --json`; it has no summary and requests")
    scheduled = [float(row["scheduled_s"]) for row in rows]
    span_s = max(scheduled, default=0.0) - min(scheduled, default=0.0)
    return Measurement(
        source=str(path),
        ended_at=str(document.get("ended_at", "")),
        rate=(len(rows) - 1) / span_s if span_s > 0 else math.inf,
        num_requests=len(rows),
        num_failed=len(rows) - int(summary["num_finished"]),
        max_send_lag_s=float(summary.get("max_send_lag_s", 0.0)),
        values=_values(summary),
    )


def read_prediction(path: Path) -> Prediction:
    """Raises: ConfigError: it is neither a plan nor a simulation, or the plan found nothing to deploy."""
    document = _read_json(path)
    if "verdict" in document:
        answer = document.get({"disaggregate": "disaggregated", "colocate": "colocated"}.get(document["verdict"], ""))
        if not isinstance(answer, dict):
            raise ConfigError(f"{path} is a plan whose verdict is {document['verdict']!r}; there is nothing to verify")
    else:
        answer = document
    values = _values(answer)
    if not values:
        raise ConfigError(
            f"{path} predicts nothing; give a file of `splitserve plan --json` or `splitserve simulate --json`"
        )
    rate = answer.get("rate")
    return Prediction(source=str(path), rate=float(rate) if rate is not None else None, values=values)


def append_history(path: Path, verification: Verification) -> None:
    """Add one line. Raises: ConfigError: it cannot be written."""
    row = {
        "verified_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "prediction": verification.prediction.source,
        "result": verification.measurement.source,
        "ended_at": verification.measurement.ended_at,
        "rate": verification.measurement.rate,
        "held": verification.held,
        "notes": list(verification.notes),
        "rows": [
            {
                "quantity": row.quantity,
                "percentile": row.percentile,
                "predicted_s": row.predicted_s,
                "measured_s": row.measured_s,
                "error": row.error,
                "verdict": row.verdict,
            }
            for row in verification.comparisons
        ],
    }
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the history {path}: {error.strerror}") from error


def read_history(path: Path) -> list[dict[str, Any]]:
    """Every verification so far, the oldest first. Raises: ConfigError: a line is damaged."""
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: is not JSON; it is a history of verifications") from error
    return rows


def render(verification: Verification, history: Sequence[Mapping[str, Any]] = ()) -> RenderableType:
    """For the terminal: a table, notes, and how earlier predictions did."""
    table = Table(title="Prediction and measurement, ms", title_justify="left", header_style="bold")
    for name in ("", "percentile", "predicted", "measured", "error", ""):
        table.add_column(name, justify="left" if name in ("", "percentile") else "right")
    styles = {"held": "green", "missed": "red", "shown": "dim"}
    for row in verification.comparisons:
        table.add_row(
            row.quantity.upper(),
            row.percentile,
            f"{row.predicted_s * 1e3:,.1f}",
            f"{row.measured_s * 1e3:,.1f}",
            f"{row.error:+.1%}",
            f"[{styles[row.verdict]}]{row.verdict}[/]",
        )
    lines = [f"note: {note}" for note in verification.notes]
    if history:
        held = sum(bool(row.get("held")) for row in history)
        lines.append(f"of {len(history):,} verifications so far {held:,} held")
    return Group(table, *lines)


def _values(document: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    found = {}
    for quantity in QUANTITIES:
        figures = document.get(f"{quantity}_s")
        if isinstance(figures, dict):
            for percentile in PERCENTILES:
                if isinstance(figures.get(percentile), int | float):
                    found[quantity, percentile] = float(figures[percentile])
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds {type(document).__name__}; wanted an object")
    return document


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
