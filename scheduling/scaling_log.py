"""Decisions as JSON lines, and their replay: the same signals must give the same decisions again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..core.errors import ConfigError
from .scaling_config import ScalingPolicy
from .scaling_signals import ScalingDecision, ScalingSignals


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRecord:
    """One line of the log."""

    signals: ScalingSignals
    decision: ScalingDecision

    def to_line(self) -> str:
        row = {"signals": self.signals.to_json(), "decision": self.decision.to_json()}
        return json.dumps(row, separators=(",", ":"))


def read_records(lines: Iterable[str]) -> Iterator[ScalingRecord]:
    """Raises: ConfigError: a line is no record; it names the line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield ScalingRecord(
                signals=ScalingSignals.from_json(row["signals"]), decision=ScalingDecision.from_json(row["decision"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"line {number} is no scaling record ({type(error).__name__}: {error}); wanted one JSON object with "
                "signals and decision, as the controller wrote it"
            ) from error


def replay(records: Iterable[ScalingRecord], policy: ScalingPolicy) -> list[tuple[ScalingRecord, ScalingDecision]]:
    """The records whose decision a new policy, given the same signals from the first on, does not repeat."""
    found = []
    for record in records:
        decision = policy.decide(record.signals)
        if decision != record.decision:
            found.append((record, decision))
    return found
