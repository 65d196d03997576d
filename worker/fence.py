"""Which attempts at a request may run on this worker, when several routers may have it: the newest call wins."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..core.errors import Superseded
from ..scheduling.attempts import call_of
from .session import Session

MAX_CLAIMS = 65_536
CLAIM_S = 60.0  # a router notices within seconds that its client is gone


@dataclass(frozen=True, slots=True)
class Live:
    """The attempt that runs here."""

    attempt: int
    session: Session[Any, Any]
    since_s: float


class Fence:
    """Attempts are numbered over all routers (`scheduling/attempts.py:first_attempt`), so the newer of two is known.

    A router that takes a request over claims it on every worker, also on those that never heard of it: there the claim
    is remembered, for the other router may still have the request in its queue.
    """

    def __init__(self) -> None:
        self._live: dict[str, Live] = {}
        self._claims: OrderedDict[str, tuple[int, float]] = (
            OrderedDict()
        )  # request id to call and time; calls from 1 on

    def live(self, request_id: str) -> Live | None:
        return self._live.get(request_id)

    def is_repeated(self, request_id: str, attempt: int, session: Session[Any, Any]) -> bool:
        """Whether this session's live attempt is as new or newer: the message is late or came twice.

        Raises: Superseded: another router has the request, for a call that is as new or newer.
        """
        claimed, since_s = self._claims.get(request_id, (0, 0.0))
        live = self._live.get(request_id)
        if live is not None and live.attempt >= attempt:
            if live.session is session:
                return True
            claimed, since_s = call_of(live.attempt), live.since_s
        elif call_of(attempt) >= claimed:
            return False
        raise Superseded(
            f"another router took request {request_id} over", newest_call=claimed, age_s=time.monotonic() - since_s
        )

    def began(self, request_id: str, attempt: int, session: Session[Any, Any]) -> None:
        self._live[request_id] = Live(attempt, session, time.monotonic())
        self.claim(request_id, attempt)

    def ended(self, request_id: str, attempt: int) -> None:
        if (live := self._live.get(request_id)) is not None and live.attempt == attempt:
            del self._live[request_id]

    def claim(self, request_id: str, attempt: int) -> None:
        """Attempts of earlier calls may not begin any more."""
        call, now = call_of(attempt), time.monotonic()
        if call > self._claims.get(request_id, (0, 0.0))[0]:
            self._claims[request_id] = (call, now)
            self._claims.move_to_end(request_id)
        while self._claims and (len(self._claims) > MAX_CLAIMS or next(iter(self._claims.values()))[1] < now - CLAIM_S):
            self._claims.popitem(last=False)
