"""When a codec is worth its error."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from splitserve.kv_transfer.codec_choice import WORTH_S, LinkSpeed, is_codec_worth_it

BYTES = 64 << 20


def worth(link_bytes_per_s: float | None, prefill_s: float = 0.0, codec_bytes_per_s: float = 2e9) -> bool:
    return is_codec_worth_it(
        num_bytes=BYTES,
        coded_bytes=BYTES // 3,
        link_bytes_per_s=link_bytes_per_s,
        prefill_s=prefill_s,
        codec_bytes_per_s=codec_bytes_per_s,
    )


def test_slow_links_get_a_codec_and_fast_or_unknown_ones_do_not() -> None:
    assert worth(125e6)  # 1 Gbit/s
    assert not worth(20e9)
    assert not worth(None)


def test_a_transfer_that_hides_behind_prefill_keeps_its_precision() -> None:
    assert worth(125e6, prefill_s=0.3)
    assert not worth(125e6, prefill_s=0.6)


def test_a_codec_slower_than_the_link_is_not_taken() -> None:
    assert not worth(1e9, codec_bytes_per_s=0.5e9)


@given(link=st.floats(1e5, 1e12), prefill_s=st.floats(0, 10), codec=st.floats(1e5, 1e12))
def test_it_is_taken_only_if_it_saves_time(link: float, prefill_s: float, codec: float) -> None:
    if worth(link, prefill_s, codec):
        exposed_s = max(0.0, max(BYTES // 3 / link, BYTES / codec) - prefill_s)
        assert exposed_s + WORTH_S < BYTES / link - prefill_s


def test_speed_is_learnt_from_large_transfers() -> None:
    fresh = LinkSpeed()
    small = fresh.observe(num_bytes=1000, wire_bytes=1000, write_s=1.0, num_tokens=10, prefill_s=0.1)
    assert small == LinkSpeed(link_bytes_per_s=None, prefill_tokens_per_s=100.0)
    large = small.observe(num_bytes=BYTES, wire_bytes=BYTES, write_s=0.5, num_tokens=10, prefill_s=0.1)
    assert large.link_bytes_per_s == BYTES / 0.5
    slower = large.observe(num_bytes=BYTES, wire_bytes=BYTES, write_s=1.0, num_tokens=0, prefill_s=0.0)
    assert BYTES < slower.link_bytes_per_s < BYTES / 0.5
    assert slower.prefill_tokens_per_s == 100.0


def test_a_link_that_stalled_once_is_measured_again_by_what_goes_coded() -> None:
    num_bytes, coded_bytes = 3 << 19, 3 << 18
    stalled = LinkSpeed().observe(num_bytes=num_bytes, wire_bytes=num_bytes, write_s=1.5, num_tokens=0, prefill_s=0.0)
    coded = stalled.observe(
        num_bytes=num_bytes, wire_bytes=coded_bytes, write_s=coded_bytes / 10e9, num_tokens=0, prefill_s=0.0
    )
    assert worth(stalled.link_bytes_per_s)
    assert not worth(coded.link_bytes_per_s)
