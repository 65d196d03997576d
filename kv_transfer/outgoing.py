"""One offered request until its KV is no longer needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..core.errors import SplitserveError
from .frames import KvPart
from .grants import Grant
from .progress import KvProgress
from .wire import WireBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SentFrame:
    """What a resumed transfer must know of a data frame that its receiver kept."""

    header: bytes
    part: KvPart
    num_bytes: int
    has_late_checksum: bool


@dataclass(slots=True, kw_only=True, eq=False)
class Outgoing:
    """One offered request until its KV is no longer needed."""

    grant: Grant
    token_ids: Sequence[int]
    block_table: Callable[[str], Sequence[int]]
    progress: KvProgress
    wire_bytes: WireBytes
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    wake_pending: bool = False
    stream: object | None = None  # the Fetch that serves it; a newer one replaces an older
    first_token_id: int | None = None
    finished: bool = False  # the answer is complete with the first token: no KV is needed
    prefill_began_s: float | None = None  # first KV written
    prefill_ended_s: float = 0.0
    sent: list[SentFrame] = field(default_factory=list)  # by the newest stream, and what it did not repeat
    digest: bytes | None = None  # of what was sent, once END is out
    num_counted: int = 0  # bytes that the metrics know of
    released: bool = False
    error: SplitserveError | None = None
    lease: asyncio.TimerHandle | None = None
