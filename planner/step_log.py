"""What one simulated worker did: runs of decode steps and single steps, for utilisation and token gaps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class StepLog:
    """Columns of equal length; an entry is one step or a run of steps whose times grow evenly."""

    num_steps: list[int] = field(default_factory=list)
    first_step_s: list[float] = field(default_factory=list)
    last_step_s: list[float] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)  # sequences that got a token in each of its steps
    num_joined: list[int] = field(default_factory=list)  # of them, those whose token before came in no step here
    busy_s: float = 0.0

    def __len__(self) -> int:
        return len(self.num_steps)

    def append(self, *, num_steps: int, first_step_s: float, last_step_s: float, batch: int, num_joined: int) -> None:
        self.num_steps.append(num_steps)
        self.first_step_s.append(first_step_s)
        self.last_step_s.append(last_step_s)
        self.batch.append(batch)
        self.num_joined.append(num_joined)
        self.busy_s += num_steps * (first_step_s + last_step_s) / 2

    def max_step_s(self, first: int, end: int, skips_first_step: bool) -> float:
        """The longest step of entries [first, end), 0 if there is none."""
        if skips_first_step and self.num_steps[first] == 1:
            first += 1
        if first >= end:
            return 0.0
        return max(max(self.first_step_s[first:end]), max(self.last_step_s[first:end]))
