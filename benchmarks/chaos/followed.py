"""One request as its client sees it, judged token by token against the answer that it must be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from ...client import AsyncClient, Chunk, GenerationResult, SplitserveError
from .plan import Case, PlannedRequest

DEADLINE_S = 90.0  # of every request: far more than any fault lasts
HUNG_S = DEADLINE_S + 15.0  # the SDK says nothing for so long: it hangs

Outcome = Literal["running", "answered", "aborted", "failed", "hung"]


@dataclass(slots=True, kw_only=True, eq=False)
class Followed:
    """A request from the moment it is sent."""

    planned: PlannedRequest
    expected: GenerationResult
    sent_s: float = field(default_factory=time.monotonic)
    events_s: list[float] = field(default_factory=list)  # each chunk, then the end; monotonic
    token_ids: list[int] = field(default_factory=list)
    outcome: Outcome = "running"
    error: str = ""
    attempts: int = 0  # of the router that ended it
    num_duplicates: int = 0
    num_wrong: int = 0
    request_id: str = ""

    async def run(self, client: AsyncClient, case: Case) -> None:
        """Send it and read it to its end; never raises what the cluster did wrong."""
        try:
            async with asyncio.timeout(HUNG_S):
                self.outcome = await self._read(client, case)
        except SplitserveError as error:
            self.outcome, self.error = "failed", f"{error.code}: {error.message}"
        except TimeoutError:
            self.outcome, self.error = "hung", f"no end within {HUNG_S:g} s"
        self.events_s.append(time.monotonic())

    async def _read(self, client: AsyncClient, case: Case) -> Outcome:
        options: dict[str, Any] = dict(case.options)
        if self.planned.number % 2:  # the other half is named by the SDK or by the router
            options["idempotency_key"] = f"chaos-{self.planned.number}"
        async with client.stream(case.prompt, timeout_s=DEADLINE_S, **options) as stream:
            num_chunks = 0
            while self.planned.abort_after is None or num_chunks < self.planned.abort_after:
                chunk = await anext(stream, None)
                self.request_id = stream.request_id or self.request_id
                if chunk is None:
                    self._judge(await stream.result())
                    return "answered"
                num_chunks += 1
                self._take(chunk)
        return "aborted"

    def _take(self, chunk: Chunk) -> None:
        self.events_s.append(time.monotonic())
        self.num_duplicates += max(0, min(len(self.token_ids) - chunk.index, len(chunk.token_ids)))
        wanted: Sequence[int] = self.expected.token_ids[chunk.index : chunk.index + len(chunk.token_ids)]
        self.num_wrong += sum(a != b for a, b in zip(chunk.token_ids, wanted, strict=False))
        self.num_wrong += max(0, len(chunk.token_ids) - len(wanted))
        self.token_ids += chunk.token_ids

    def _judge(self, result: GenerationResult) -> None:
        """Also what is no token: a missing end, another text or reason counts as one wrong token."""
        self.attempts = result.timing.attempts
        same = (result.token_ids, result.text, result.finish_reason) == (
            self.expected.token_ids,
            self.expected.text,
            self.expected.finish_reason,
        )
        if not same and not self.num_wrong:
            self.num_wrong = 1
            self.error = (
                f"{len(result.token_ids)} tokens ending by {result.finish_reason}, wanted "
                f"{len(self.expected.token_ids)} by {self.expected.finish_reason}"
            )

    @property
    def ended_s(self) -> float | None:
        return None if self.outcome == "running" else self.events_s[-1]

    def silence_s(self, from_s: float, to_s: float) -> float:
        """The longest time between two signs of life of which a part lies in that span; 0 if none does."""
        signs = pairwise([self.sent_s, *self.events_s])
        return max((later - earlier for earlier, later in signs if later > from_s and earlier < to_s), default=0.0)
