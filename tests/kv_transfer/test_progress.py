"""What is written leaves once, in frames neither tiny nor huge."""

from __future__ import annotations

from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.kv_transfer.frames import KvPart
from splitserve.kv_transfer.progress import KvProgress

LAYER = LayerGeometry(num_kv_heads=3, key_dim=64, value_dim=64)
SMOLLM2 = KvGeometry(model_id="smollm2", layers=(LAYER,) * 30, dtype="float32")
MIB = 1 << 20


def taken(progress: KvProgress, max_bytes: int, *, whole_rows: bool = False) -> list[KvPart]:
    return list(iter(lambda: progress.take(max_bytes, whole_rows=whole_rows), None))


def box(*, layers: tuple[int, int], heads: tuple[int, int] = (0, 3), tokens: tuple[int, int]) -> KvPart:
    return KvPart(
        layer_start=layers[0],
        layer_end=layers[1],
        head_start=heads[0],
        head_end=heads[1],
        token_start=tokens[0],
        token_end=tokens[1],
    )


def num_bytes(part: KvPart) -> int:
    return part.num_tokens * sum(SMOLLM2.layer_bytes_per_token(n) for n in range(part.layer_start, part.layer_end))


def test_frames_of_any_prompt_are_of_one_to_three_mib() -> None:
    for num_tokens in (1400, 1456, 2100, 5000, 16_000):
        progress = KvProgress(SMOLLM2, 0, num_tokens)
        progress.wrote(0, 30, 0, num_tokens)
        sizes = [num_bytes(part) for part in taken(progress, 2 * MIB)]
        assert sum(sizes) == SMOLLM2.bytes_per_token * num_tokens
        assert min(sizes) >= MIB
        assert max(sizes) <= 3 * MIB
        assert progress.all_taken


def test_a_mapped_pool_is_copied_in_whole_rows() -> None:
    for num_tokens in (100, 1456, 11_650):
        progress = KvProgress(SMOLLM2, 32, num_tokens)
        progress.restart(16)
        progress.wrote(0, 30, 0, num_tokens)
        parts = taken(progress, 8 * MIB, whole_rows=True)
        assert {(part.layer_start, part.layer_end) for part in parts} == {(0, 30)}
        assert [part.token_start for part in parts] == [32, *(part.token_end for part in parts[:-1])]
        assert parts[-1].token_end == num_tokens
        assert all(part.token_end % 16 == 0 for part in parts[:-1])
        assert max(map(num_bytes, parts)) <= 13 * MIB
    progress = KvProgress(SMOLLM2, 0, 640)
    progress.restart(16)
    progress.wrote(0, 4, 0, 640)
    progress.wrote(4, 30, 0, 320)  # the layers behind are not so far yet
    parts = taken(progress, 64 * MIB, whole_rows=True)
    assert parts == [box(layers=(0, 4), tokens=(0, 640)), box(layers=(4, 30), tokens=(0, 320))]


def test_what_is_ready_leaves_at_once_and_only_once() -> None:
    progress = KvProgress(SMOLLM2, 16, 100)
    assert progress.take(MIB) is None
    progress.wrote(0, 30, 0, 16)  # the receiver has these
    assert progress.take(MIB) is None
    progress.wrote(0, 1, 16, 40)
    assert taken(progress, MIB) == [box(layers=(0, 1), tokens=(16, 40))]
    progress.wrote(1, 30, 16, 40)
    progress.wrote(0, 30, 40, 100)
    parts = taken(progress, 64 * MIB)
    assert parts[1] == box(layers=(1, 30), tokens=(16, 100))
    assert len(parts) == 2


def test_the_sender_is_woken_for_a_mebibyte_at_a_time_and_for_less_only_at_the_end_of_more() -> None:
    layer = 64 * SMOLLM2.layer_bytes_per_token(0)
    per_wake = -(-MIB // layer)  # layers
    progress = KvProgress(SMOLLM2, 0, 64)
    woken = [number for number in range(30) if progress.wrote(number, number + 1, 0, 64)]
    assert woken == [*range(per_wake - 1, 29, per_wake), 29]
    small = KvProgress(SMOLLM2, 0, 16)
    assert 30 * 16 * SMOLLM2.layer_bytes_per_token(0) < MIB
    assert not any(small.wrote(number, number + 1, 0, 16) for number in range(30))
    assert small.take(MIB) == box(layers=(0, 30), tokens=(0, 16))


def test_where_the_link_is_fast_frames_get_smaller_towards_the_end() -> None:
    progress = KvProgress(SMOLLM2, 0, 1000)
    progress.restart(16, wake_bytes=MIB, wake_share=0.25)
    layer = 1000 * SMOLLM2.layer_bytes_per_token(0)
    assert layer > MIB
    woken = [number for number in range(30) if progress.wrote(number, number + 1, 0, 1000)]
    sizes = [end - start for start, end in zip([-1, *woken], woken, strict=False)]
    assert woken[-1] == 29
    assert sizes == sorted(sizes, reverse=True) == [6, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1]
    small = KvProgress(SMOLLM2, 0, 1000)
    small.restart(16, wake_bytes=40 * layer, wake_share=0.25)
    assert not any(small.wrote(number, number + 1, 0, 1000) for number in range(30))  # the first token tells


def test_whole_blocks_wait_for_their_last_token_but_for_the_prompts_end() -> None:
    progress = KvProgress(SMOLLM2, 0, 100)
    progress.restart(16)
    progress.wrote(0, 30, 0, 50)
    assert {part.token_end for part in taken(progress, MIB)} == {48}
    progress.wrote(0, 30, 50, 100)
    assert {(part.token_start, part.token_end) for part in taken(progress, MIB)} == {(48, 100)}


def test_writing_again_is_torn_only_after_something_was_taken() -> None:
    progress = KvProgress(SMOLLM2, 0, 100)
    progress.wrote(0, 30, 0, 50)
    progress.wrote(0, 2, 0, 50)
    assert not progress.torn
    assert {part.layer_end for part in taken(progress, 64 * MIB)} == {2}
    progress.wrote(0, 30, 0, 50)
    assert progress.torn


def test_only_the_heads_of_the_route_are_sent_and_layers_without_any_are_skipped() -> None:
    heads = [range(1, 3)] * 10 + [range(0)] * 10 + [range(1)] * 10
    progress = KvProgress(SMOLLM2, 0, 32, heads)
    progress.wrote(0, 30, 0, 32)
    assert not progress.torn
    assert taken(progress, 64 * MIB) == [
        box(layers=(0, 10), heads=(1, 3), tokens=(0, 32)),
        box(layers=(20, 30), heads=(0, 1), tokens=(0, 32)),
    ]
    assert progress.all_taken
