"""Rank 0's side of a step: tell the other ranks, then compute its own share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ...scheduling.step_plan import StepPlan
from ..runner import StepMode, StepResult, StepRunner
from .messages import StepWriter, warm_up_message


class OtherRanks(Protocol):
    """The way to the ranks that hold the model together with this one."""

    def tell(self, message: bytes) -> None:
        """Send every rank a message."""
        ...

    def fail(self, error: Exception) -> None:
        """Some rank cannot go on, so none can."""
        ...


class LeadingRunner:
    """Runs each step on all ranks at once."""

    def __init__(self, own: StepRunner, others: OtherRanks) -> None:
        self._own = own
        self._others = others
        self._writer = StepWriter()
        self.max_steps = own.max_steps

    @property
    def captured(self) -> bool:
        return self._own.captured

    def mode(self, plan: StepPlan) -> StepMode:
        return self._own.mode(plan)

    def is_quick(self, plan: StepPlan) -> bool:
        return self._own.is_quick(plan)

    def launch(self, plan: StepPlan, mode: StepMode | None = None) -> None:
        mode = self._own.mode(plan) if mode is None else mode
        try:
            self._others.tell(self._writer.step(plan, mode))
            self._own.launch(plan, mode)
        except Exception as error:
            self._others.fail(error)
            raise

    def collect(self) -> StepResult:
        try:
            return self._own.collect()
        except Exception as error:
            self._others.fail(error)  # they wait in the middle of the step
            raise

    def abandon(self) -> None:
        self._own.abandon()

    def warm_up(self) -> None:
        try:
            self._others.tell(warm_up_message())
            self._own.warm_up()
        except Exception as error:
            self._others.fail(error)
            raise

    def close(self) -> None:
        self._own.close()

    def bare_step(self, batch: int) -> Callable[[], None]:
        raise NotImplementedError("the device's part of a step is not measured apart when ranks share the model")
