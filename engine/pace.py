"""How long steps take: when to plan the next one, and whether it can be launched before the running one ends."""

from __future__ import annotations

import time
from collections import deque

GPU_PACKED_TOKENS = 512  # from here on a prefill step is bound by arithmetic
_RECENT = 4  # steps that tell how long the next one takes
_HOLD = 0.1  # of a step that the next one waits for a sequence whose transfer is about to end
_SLOW_LAUNCH_S = 0.05  # of a prompt kernel by kernel, until one was seen
_SLACK_S = 3e-4  # between the launch of a step and the end of the one before it


class StepPace:
    """What the last few steps took, by kind. Only the device thread calls.

    `launched_at_s` and `num_prefill_tokens` are those of the step that runs.
    """

    def __init__(self) -> None:
        self._last_end_s = 0.0
        self._decode_s: deque[float] = deque(maxlen=_RECENT)  # durations of pure decode steps
        self._prepare_s: deque[float] = deque(maxlen=_RECENT)  # what planning and launching took
        self._slow_launch_s: deque[float] = deque(maxlen=_RECENT)  # the same of prompts, launched kernel by kernel
        self._prefill_token_s: deque[float] = deque(maxlen=_RECENT)  # of steps bound by their prompts, for each token

    def launched(self, took_s: float, *, slow: bool) -> None:
        """Planning and launching a step took so long; `slow`: a prompt, launched kernel by kernel."""
        (self._slow_launch_s if slow else self._prepare_s).append(took_s)

    def ended(self, num_prefill_tokens: int, launched_at_s: float, ended_s: float) -> None:
        """The running step ended."""
        took_s = ended_s - self.began_s(launched_at_s)
        if not num_prefill_tokens:
            self._decode_s.append(took_s)
        elif num_prefill_tokens >= GPU_PACKED_TOKENS:  # what smaller ones take is no matter of tokens
            self._prefill_token_s.append(took_s / num_prefill_tokens)
        self._last_end_s = ended_s

    def began_s(self, launched_at_s: float) -> float:
        """A step that was launched while another ran began when that one ended."""
        return max(launched_at_s, self._last_end_s)

    def wait_s(self, num_prefill_tokens: int, launched_at_s: float) -> float | None:
        """Seconds from now until the step behind a decode step must be planned; None where it is not waited for."""
        if num_prefill_tokens or not self._decode_s or not self._prepare_s:
            return None
        expected_end_s = self.began_s(launched_at_s) + min(self._decode_s)
        return expected_end_s - max(self._prepare_s) - _SLACK_S - time.monotonic()

    @property
    def hold_s(self) -> float:
        """How long the next step may wait for a sequence about to arrive: a fraction of a decode step."""
        return _HOLD * min(self._decode_s)

    def outlasts(self, num_prefill_tokens: int, launched_at_s: float, *, launches_prompt: bool) -> bool:
        """Whether the running step goes on for longer than the host takes to launch the next one kernel by kernel."""
        known = self._prefill_token_s if num_prefill_tokens else self._decode_s
        if not known:
            return False
        ends_s = self.began_s(launched_at_s) + (num_prefill_tokens or 1) * min(known)
        launches = self._slow_launch_s if launches_prompt else self._prepare_s
        return ends_s > time.monotonic() + max(launches, default=_SLOW_LAUNCH_S)
