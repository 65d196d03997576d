"""Tells when the KV of prompts whose sequences leave this worker is in the pool, without making a step wait."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence

import torch

from ...scheduling.step_plan import ScheduledTokens
from ..attention import KvWritten

logger = logging.getLogger(__name__)


class Announcer:
    """Says when KV that kernels were queued for is in the pool: a thread that waits for one event a layer and chunk."""

    def __init__(self, kv_written: KvWritten) -> None:
        self._kv_written = kv_written
        self._queue: queue.SimpleQueue[tuple[torch.cuda.Event, int, int, list[tuple[str, int, int]]]]
        self._queue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kv-announcer", daemon=True).start()

    def of_step(self, parts: Sequence[ScheduledTokens], stream: torch.cuda.Stream) -> Callable[[int, int], None] | None:
        """What to call when the writes of a range of layers are queued; None when no sequence leaves this worker."""
        leaving = [(part.sequence.request_id, part.start, part.end) for part in parts if part.sequence.prefill_only]
        if not leaving:
            return None
        return lambda first, end: self._put(stream, first, end, leaving)

    def _put(self, stream: torch.cuda.Stream, first: int, end: int, leaving: list[tuple[str, int, int]]) -> None:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        self._queue.put((event, first, end, leaving))

    def _run(self) -> None:
        try:
            while True:
                event, first, end, leaving = self._queue.get()
                event.synchronize()
                for request_id, token_start, token_end in leaving:
                    self._kv_written(request_id, first, end, token_start, token_end)
        except Exception:
            logger.critical("no KV can be announced any more, so this process ends", exc_info=True)
            os._exit(1)
