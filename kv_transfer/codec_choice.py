"""Which codec a transfer takes when the choice is left to us: pure functions of sizes, speeds and times."""

from __future__ import annotations

from dataclasses import dataclass

WORTH_S = 0.005  # precision is not given away for less exposed time than a decode step takes
_WEIGHT = 0.3  # of the newest transfer in the moving averages
_MIN_BYTES = 1 << 20  # of KV, coded or not: smaller transfers measure latency, not speed


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """What the transfers over one link have shown. None: nothing yet."""

    link_bytes_per_s: float | None = None
    prefill_tokens_per_s: float | None = None

    def observe(
        self, *, num_bytes: int, wire_bytes: int, write_s: float, num_tokens: int, prefill_s: float
    ) -> LinkSpeed:
        """After a transfer: `wire_bytes` took `write_s` to hand over, while `num_tokens` were prefilled.

        Args: num_bytes: before coding. By these coded transfers go on measuring a link that stalled once.
        """
        link, prefill = self.link_bytes_per_s, self.prefill_tokens_per_s
        if num_bytes >= _MIN_BYTES and write_s > 0:
            link = _average(link, wire_bytes / write_s)
        if num_tokens > 0 and prefill_s > 0:
            prefill = _average(prefill, num_tokens / prefill_s)
        return LinkSpeed(link_bytes_per_s=link, prefill_tokens_per_s=prefill)


def is_codec_worth_it(
    *,
    num_bytes: int,
    coded_bytes: int,
    link_bytes_per_s: float | None,
    prefill_s: float,
    codec_bytes_per_s: float,
) -> bool:
    """Whether coding shortens what of the transfer is not hidden behind prefill, by more than WORTH_S.

    A part that leaves while the next one is computed costs nobody time; what cannot leave before prefill ends does.
    An unknown speed is measured first, without a codec.
    """
    if link_bytes_per_s is None:
        return False
    plain_s = num_bytes / link_bytes_per_s
    coded_s = max(coded_bytes / link_bytes_per_s, num_bytes / codec_bytes_per_s)  # the two overlap
    return max(0.0, plain_s - prefill_s) - max(0.0, coded_s - prefill_s) > WORTH_S


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
