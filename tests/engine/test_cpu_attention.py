"""The compiled decode attention: equal to the gathered one, blind to what it must not see, absent without harm."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from splitserve.core import compiled
from splitserve.core.compiled import SWITCH
from splitserve.core.kv_geometry import KvDtype, KvGeometry, LayerGeometry
from splitserve.core.request import Request
from splitserve.engine import attention
from splitserve.engine.attention import AttentionRules, DecodeBatch
from splitserve.engine.cpu_attention import DecodeKernel, decode_kernel
from splitserve.engine.loading import LoadedModel
from splitserve.engine.pool import KvPool
from torch import Tensor

LENGTHS = (1, 2, 15, 16, 17, 40, 100)  # tokens that the queries see, their own included
PLAIN = AttentionRules(scaling=0.25, softcap=None, sliding_window=None, sinks=None)


@pytest.fixture
def kernel() -> DecodeKernel:
    found = decode_kernel()
    assert found is not None, "these tests need a C compiler: install gcc, or deselect them"
    return found


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No kernel was looked for yet, and none was compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decode_kernel.cache_clear()
    yield tmp_path / "splitserve" / "compiled"
    decode_kernel.cache_clear()


def make_case(
    num_kv_heads: int = 2,
    key_dim: int = 16,
    value_dim: int | None = None,
    *,
    dtype: KvDtype = "float32",
    block_size: int = 16,
    group: int = 3,
    lengths: tuple[int, ...] = LENGTHS,
    seed: int = 0,
) -> tuple[Tensor, KvPool, DecodeBatch]:
    """Queries, and a pool of two layers with the sequences' KV on scattered blocks; NaN wherever no query looks."""
    generator = torch.Generator().manual_seed(seed)
    layer = LayerGeometry(num_kv_heads=num_kv_heads, key_dim=key_dim, value_dim=value_dim or key_dim)
    counts = [-(-length // block_size) for length in lengths]
    pool = KvPool(
        KvGeometry(model_id="m", layers=(layer, layer), dtype=dtype), num_blocks=sum(counts) + 1, block_size=block_size
    )
    pool.elements.fill_(float("nan"))
    scattered = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        for j in range(count):
            block, filled = next(scattered), min(block_size, length - j * block_size)
            tables[i, j] = block
            for view in (pool.keys(1), pool.values(1)):
                content = torch.randn(num_kv_heads, filled, view.shape[-1], generator=generator)
                view[block, :, :filled] = content.to(view.dtype)
    query = torch.randn(len(lengths), num_kv_heads * group, key_dim, generator=generator)
    batch = DecodeBatch(num_sequences=len(lengths), block_tables=tables, positions=torch.tensor(lengths) - 1)
    return query, pool, batch


def attend(
    kernel: DecodeKernel, query: Tensor, pool: KvPool, batch: DecodeBatch, rules: AttentionRules = PLAIN
) -> Tensor:
    return kernel.attend(
        query,
        pool,
        1,
        batch.block_tables,
        batch.positions,
        scaling=rules.scaling,
        softcap=rules.softcap,
        sliding_window=rules.sliding_window,
        sinks=rules.sinks,
    )


def gathered(query: Tensor, pool: KvPool, batch: DecodeBatch, rules: AttentionRules = PLAIN) -> Tensor:
    """What PyTorch's attention says, of a pool whose unused places hold 0: it reads them, and masks them afterwards."""
    clean = KvPool(pool.geometry, num_blocks=pool.num_blocks, block_size=pool.block_size)
    clean.elements.copy_(pool.elements.nan_to_num(0.0))
    return attention._decode_gathered(query, clean, 1, batch, rules)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("num_kv_heads", "key_dim", "value_dim", "group", "block_size"),
    [
        (3, 64, 64, 3, 16),
        (2, 128, 128, 4, 32),
        (1, 80, 80, 1, 16),
        (4, 24, 20, 1, 16),  # deepseek's keys are longer than its values, and neither fills whole vectors
        (2, 5, 3, 2, 16),
        (1, 512, 512, 2, 48),
        (1, 16, 16, 128, 16),
    ],
)
def test_it_equals_the_gathered_attention_in_every_shape(
    kernel: DecodeKernel,
    dtype: KvDtype,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    group: int,
    block_size: int,
) -> None:
    query, pool, batch = make_case(num_kv_heads, key_dim, value_dim, dtype=dtype, block_size=block_size, group=group)
    assert kernel.serves(pool, 1, query.shape[1])
    torch.testing.assert_close(attend(kernel, query, pool, batch), gathered(query, pool, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 16, 24, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_it_equals_the_gathered_attention_under_every_rule(
    kernel: DecodeKernel, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    query, pool, batch = make_case()
    sinks = torch.linspace(-3, 3, query.shape[1]) if with_sinks else None
    rules = AttentionRules(scaling=0.7, softcap=softcap, sliding_window=window, sinks=sinks)
    expected = gathered(query, pool, batch, rules)
    torch.testing.assert_close(attend(kernel, query, pool, batch, rules), expected, rtol=1e-5, atol=1e-5)
    # A control: each of the rules changes what comes out.
    if window == 24 or softcap == 2.0 or with_sinks:
        assert not torch.allclose(attend(kernel, query, pool, batch, replace(PLAIN, scaling=0.7)), expected, atol=1e-3)


def test_scores_that_leave_the_range_of_the_exponential_are_no_special_case(kernel: DecodeKernel) -> None:
    query, pool, batch = make_case()
    rules = replace(PLAIN, scaling=300.0)  # one token takes all, the others' weights are 0
    torch.testing.assert_close(
        attend(kernel, query, pool, batch, rules), gathered(query, pool, batch, rules), rtol=1e-4, atol=1e-4
    )


def test_a_visible_number_that_is_none_is_not_hidden(kernel: DecodeKernel) -> None:
    query, pool, batch = make_case()
    assert attend(kernel, query, pool, batch).isfinite().all()
    pool.values(1)[batch.block_tables[5, 1], 0, 3] = float("nan")  # token 19 of the sequence of 40
    pool.keys(1)[batch.block_tables[6, 0], 1, 0] = float("nan")
    broken = attend(kernel, query, pool, batch).isnan().view(len(LENGTHS), 2, -1).all(dim=2)
    assert broken.nonzero().tolist() == [[5, 0], [6, 1]]
    # Outside of its window it is not visible.
    assert attend(kernel, query, pool, batch, replace(PLAIN, sliding_window=20)).isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_is_bitwise_the_same_in_any_batch_on_any_blocks_and_threads(
    kernel: DecodeKernel, dtype: KvDtype
) -> None:
    query, pool, batch = make_case(num_kv_heads=8, key_dim=64, dtype=dtype, lengths=(700, 33, 4, 300))
    together = attend(kernel, query, pool, batch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(attend(kernel, query, pool, batch), together)
    finally:
        torch.set_num_threads(before)
    for i in range(batch.num_sequences):
        alone = DecodeBatch(
            num_sequences=1, block_tables=batch.block_tables[i : i + 1], positions=batch.positions[i : i + 1]
        )
        assert torch.equal(attend(kernel, query[i : i + 1], pool, alone)[0], together[i])
    moved = KvPool(pool.geometry, num_blocks=pool.num_blocks, block_size=pool.block_size)
    moved.rows.copy_(pool.rows.flip(0))
    elsewhere = replace(batch, block_tables=pool.num_blocks - 1 - batch.block_tables)
    assert torch.equal(attend(kernel, query, moved, elsewhere), together)


@pytest.mark.parametrize(("block", "position"), [(-1, 5), (10_000, 5), (1, -1), (1, 100_000)])
def test_a_block_or_a_position_out_of_range_is_never_followed(kernel: DecodeKernel, block: int, position: int) -> None:
    query, pool, batch = make_case(lengths=(6,))
    wrong = replace(batch, block_tables=torch.tensor([[block]]), positions=torch.tensor([position]))
    with pytest.raises(AssertionError, match="block"):
        attend(kernel, query, pool, wrong)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"key_dim": 520}, "key_dim"),
        ({"value_dim": 520}, "value_dim"),
        ({"num_kv_heads": 1, "group": 129}, "group"),
    ],
)
def test_what_is_past_its_limits_is_left_to_the_gathered_attention(
    kernel: DecodeKernel, shape: dict[str, Any], why: str
) -> None:
    query, pool, batch = make_case(**shape)
    assert not kernel.serves(pool, 1, query.shape[1]), why
    with pytest.raises(AssertionError, match="serves"):
        attend(kernel, query, pool, batch)
    query = query.to(pool.elements.dtype)
    expected = gathered(query, pool, batch)
    pool.elements.nan_to_num_(0.0)
    assert torch.equal(attention._decode(query, pool, 1, batch, PLAIN), expected)


def test_greedy_equals_the_kernels_without_it(
    make_engine: Any, tiny: LoadedModel, kernel: DecodeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[tuple[str, int]]:
        engine = make_engine(max_step_tokens=17)
        for i, length in enumerate((1, 16, 33, 64)):
            prompt = tuple(range(i, i + length))
            engine.add(Request(request_id=str(i), prompt_token_ids=prompt, max_tokens=24))
        tokens = []
        while engine.has_work():
            tokens += [(token.request_id, token.token_id) for token in engine.step().tokens]
        return tokens

    expected = run()
    monkeypatch.setattr(DecodeKernel, "attend", None)  # would be noticed
    monkeypatch.setattr(attention, "decode_kernel", lambda: None)
    assert run() == expected
    assert len({token for _, token in expected}) > 8


def test_it_is_compiled_once_and_again_when_it_was_damaged(
    fresh_cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decode_kernel() is not None
    (library,) = fresh_cache.iterdir()
    made = library.stat().st_ino
    decode_kernel.cache_clear()
    assert decode_kernel() is not None
    assert library.stat().st_ino == made
    decode_kernel.cache_clear()
    # As another file: the one that this process has mapped must stay as it is.
    library.unlink()
    library.write_bytes(b"\x7fELF")
    assert decode_kernel() is not None
    assert list(fresh_cache.iterdir()) == [library]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("compiler", "reason"), [("/nowhere/cc", "there is no C compiler '/nowhere/cc'"), ("false", "exit status 1")]
)
def test_without_a_compiler_the_log_says_so_and_nothing_is_left_behind(
    compiler: str, reason: str, fresh_cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert decode_kernel() is None
    assert not fresh_cache.exists() or not list(fresh_cache.iterdir())
    assert "cpu_attention.c is not compiled" in caplog.text
    assert reason in caplog.text


def test_a_cache_that_cannot_be_written_is_no_failure(fresh_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh_cache.parent.parent.joinpath("splitserve").write_text("a file where the directory should be")
    assert decode_kernel() is None
    assert "cpu_attention.c is not compiled" in caplog.text


def test_it_can_be_switched_off(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert decode_kernel() is None
    assert not fresh_cache.exists()


def test_what_the_compiler_says_is_in_the_log(
    tmp_path: Path, fresh_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int main(void) { return missing; }")
    assert compiled.compiled(source) is None
    assert "missing" in caplog.text
