"""Whether and when a failed attempt is followed by another: back-off, budget, poison. Time is an argument."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from ..core.errors import PoisonRequest, RetryBudgetSpent, SplitserveError, WorkerDied

WINDOW_S = 60.0  # requests and retries of so long count for the budget
_SLICES = 12  # that the window moves by
CLEARED_TOKENS = 8  # so many tokens past a worker's death prove that the request was not its cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential and jittered; only the first retry goes at once, for one death must cost a user little."""

    initial_s: float = 0.1
    max_s: float = 2.0

    def delay_s(self, num_failures: int, jitter: float) -> float:
        """Seconds to wait after failure number `num_failures` (from 1). Args: jitter: from 0 to 1."""
        if num_failures <= 1:
            return 0.0
        return min(self.max_s, self.initial_s * 2.0 ** (num_failures - 2)) * (0.5 + jitter / 2)


class RetryBudget:
    """Retries of the last minute stay below a share of that minute's requests, so that a bad worker causes no storm.

    Args:
        ratio: retries allowed per request.
        floor: retries allowed in any case: the death of a worker costs as many as it ran requests.
    """

    def __init__(self, *, ratio: float, floor: int) -> None:
        self._ratio = ratio
        self._floor = floor
        self._slices: deque[list[int]] = deque(maxlen=_SLICES)  # [number of the slice, requests, retries]

    def admitted(self, now: float) -> None:
        """A request came."""
        self._slice(now)[1] += 1

    def left(self, now: float, *, num_live: int) -> int:
        """Retries that may be made now. Args: num_live: requests not ended, of which some came before the window."""
        self._slice(now)
        requests, retries = (sum(row[column] for row in self._slices) for column in (1, 2))
        return max(0, self._floor + int(self._ratio * max(requests, num_live)) - retries)

    def spend(self, now: float, *, num_live: int) -> bool:
        """Take one retry; False if none is left."""
        if self.left(now, num_live=num_live) == 0:
            return False
        self._slice(now)[2] += 1
        return True

    def _slice(self, now: float) -> list[int]:
        number = int(now * _SLICES / WINDOW_S)
        while self._slices and self._slices[0][0] <= number - _SLICES:
            self._slices.popleft()
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append([number, 0, 0])
        return self._slices[-1]


@dataclass(slots=True)
class Failures:
    """What went wrong with one request so far."""

    num: int = 0
    dead_boots: list[str] = field(default_factory=list)  # of workers that died computing it, at the same place
    died_at: int = 0  # tokens of the answer at the last of them


class RetryRules:
    """The rules over all requests of one router.

    Args:
        max_attempts: failures of a request before its error goes to the client.
        max_deaths: workers that may die computing a request; it is the cause, as far as anybody can tell, and is not
            tried on one more.
    """

    def __init__(
        self, *, max_attempts: int, max_deaths: int, budget: RetryBudget, backoff: Backoff | None = None
    ) -> None:
        self.budget = budget
        self._max_attempts = max_attempts
        self._max_deaths = max_deaths
        self._backoff = backoff or Backoff()
        self._random = random.Random()

    def delay_s(
        self,
        failures: Failures,
        error: SplitserveError,
        *,
        boot_id: str,
        alive: Collection[str],
        num_tokens: int,
        now: float,
        num_live: int,
    ) -> float:
        """An attempt failed: counts it, and tells the seconds until the next one.

        Args:
            boot_id: of the worker that failed, if it was computing the request; else empty: it held a place or KV.
            alive: boot ids of workers that are there; one whose link broke and that came back did not die.
            num_tokens: tokens of the answer so far.
        Raises: SplitserveError: what the request ends with instead.
        """
        failures.num += 1
        if isinstance(error, WorkerDied) and boot_id:
            # Tokens are a function of the request alone, so what kills a worker at one place kills the next one there.
            if num_tokens >= failures.died_at + CLEARED_TOKENS:
                failures.dead_boots.clear()
            failures.dead_boots = [boot for boot in failures.dead_boots if boot not in alive] + [boot_id]
            failures.died_at = num_tokens
            if len(failures.dead_boots) >= self._max_deaths:
                raise PoisonRequest(
                    f"{len(failures.dead_boots)} workers died computing this request, the last one after {num_tokens} "
                    f"tokens of its answer; it is not tried again, look into the workers' logs ({error.message})"
                )
        if not error.retryable or failures.num >= self._max_attempts:
            raise error
        if not self.budget.spend(now, num_live=num_live):
            raise RetryBudgetSpent(
                f"{error.message}; not tried again, because the retries of the last "
                f"{WINDOW_S:g} s are used up: look for a bad worker in the router's status, and send it again later",
                retry_after_s=1.0,
            )
        return self._backoff.delay_s(failures.num, self._random.random())
