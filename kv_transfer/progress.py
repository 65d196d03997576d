"""Which KV of one request is written, and which of it was taken for sending; pure but for one lock."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import takewhile

from ..core.kv_geometry import KvGeometry
from .frames import KvPart
from .framing import WAKE_BYTES


class KvProgress:
    """The device thread reports what it wrote; the event loop takes what is ready, each byte once per stream.

    Every layer's tokens are written in order, so one count per layer says it all.

    Args: heads: what is to be sent of each layer (all, if not given); of some layers it may be nothing.
    """

    def __init__(
        self, geometry: KvGeometry, num_cached_tokens: int, num_tokens: int, heads: Sequence[range] | None = None
    ) -> None:
        self._heads = tuple(heads or (range(layer.num_kv_heads) for layer in geometry.layers))
        # Bytes of a token, per layer: of all heads that are written, and of those that are sent.
        self._written_bytes = [geometry.layer_bytes_per_token(layer) for layer in range(geometry.num_layers)]
        self._token_bytes = [
            written // layer.num_kv_heads * len(sent)
            for written, layer, sent in zip(self._written_bytes, geometry.layers, self._heads, strict=True)
        ]
        self._start = [num_cached_tokens if sent else num_tokens for sent in self._heads]
        self._num_tokens = num_tokens
        self._lock = threading.Lock()
        self._written = [0] * len(self._heads)
        self._bytes_since_wake = 0
        self._woke = False
        self._granularity, self._wake_bytes, self._wake_share = 1, WAKE_BYTES, 0.0
        self._taken = list(self._start)
        self.torn = False  # written again after some of it was taken: what was sent may not be what it seemed

    def restart(
        self,
        granularity: int,
        kept: Iterable[KvPart] = (),
        *,
        wake_bytes: int = WAKE_BYTES,
        wake_share: float = 0.0,
    ) -> None:
        """A new stream begins: all but what the receiver kept is to be taken again, in order.

        Args:
            granularity: parts end at multiples of it (but for the last).
            wake_bytes, wake_share: how much is worth sending; see `Framing`.
        """
        with self._lock:
            self._granularity, self._wake_bytes, self._wake_share = granularity, wake_bytes, wake_share
            self._taken = list(self._start)
            for part in kept:
                self._taken[part.layer_start : part.layer_end] = [part.token_end] * (part.layer_end - part.layer_start)

    def wrote(self, layer_start: int, layer_end: int, token_start: int, token_end: int) -> bool:
        """Any thread. Returns whether it is time to send: enough has come together, or this was the last part and
        some had before. Whoever has less is told by the first token.

        A preempted sequence starts over; harmless unless a stream has taken something before.
        """
        with self._lock:
            if any(self._written[layer] != token_start for layer in range(layer_start, layer_end)):
                self.torn = self.torn or self._taken != self._start
                self._written = [min(written, token_start) for written in self._written]
            self._written[layer_start:layer_end] = [token_end] * (layer_end - layer_start)
            self._bytes_since_wake += sum(self._written_bytes[layer_start:layer_end]) * (token_end - token_start)
            last = layer_end == len(self._heads) and token_end == self._num_tokens
            due = (last and self._woke) or self.torn or self._is_enough()
            if due:
                self._woke, self._bytes_since_wake = True, 0
            return due

    def take(self, max_bytes: int, *, whole_rows: bool = False) -> KvPart | None:
        """The next ready part, or None. Neighbouring layers go together, up to about `max_bytes`.

        Args: whole_rows: many layers of few tokens rather than many tokens of few layers: the longest runs of a block.
        """
        num_layers = len(self._heads)
        with self._lock:
            for start in range(num_layers):
                token_start, token_end = self._taken[start], self._ready(start)
                if token_start == token_end:
                    continue
                token_bytes = self._token_bytes[start]
                if whole_rows:
                    alike = takewhile(partial(self._goes_with, start, token_end), range(start, num_layers))
                    token_bytes = sum(self._token_bytes[layer] for layer in alike)
                # What is too much is cut evenly; up to one and a half times too much, cutting costs more.
                pieces = (token_bytes * (token_end - token_start) + max_bytes // 2) // max_bytes
                if pieces > 1:
                    piece = -(-(token_end - token_start) // pieces)
                    token_end = min(token_end, token_start + -(-piece // self._granularity) * self._granularity)
                most = max(max_bytes, token_bytes * (token_end - token_start))
                end, size = start + 1, self._token_bytes[start] * (token_end - token_start)
                while (
                    end < num_layers
                    and self._goes_with(start, token_end, end)
                    and (size := size + self._token_bytes[end] * (token_end - token_start)) <= most
                ):
                    end += 1
                self._taken[start:end] = [token_end] * (end - start)
                return KvPart(
                    layer_start=start,
                    layer_end=end,
                    head_start=self._heads[start].start,
                    head_end=self._heads[start].stop,
                    token_start=token_start,
                    token_end=token_end,
                )
        return None

    @property
    def all_taken(self) -> bool:
        with self._lock:
            return all(taken == self._num_tokens for taken in self._taken)

    def _is_enough(self) -> bool:
        """Whether what came since the last wake-up is worth another."""
        if self._bytes_since_wake < self._wake_bytes or not self._wake_share:
            return self._bytes_since_wake >= self._wake_bytes
        to_come = sum(
            size * (self._num_tokens - written)
            for size, written in zip(self._written_bytes, self._written, strict=True)
        )
        return self._bytes_since_wake >= self._wake_share * to_come

    def _goes_with(self, first: int, token_end: int, layer: int) -> bool:
        """Whether a part that begins at layer `first` and ends at `token_end` may hold this layer too."""
        alike = self._heads[layer] == self._heads[first] and self._taken[layer] == self._taken[first]
        return alike and self._ready(layer) >= token_end

    def _ready(self, layer: int) -> int:
        written = self._written[layer]
        if written < self._num_tokens:
            written -= written % self._granularity
        return max(written, self._taken[layer])
