"""Triton kernels against float32 references: scattered blocks, poisoned padding, every attention rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU: Triton compiles for one", allow_module_level=True)

from splitserve.core.request import SamplingParams
from splitserve.engine.gpu import attention_kernels as kernels
from splitserve.engine.gpu.layer_kernels import add_rms_norm, rms_norm, rotary, silu_multiply
from splitserve.engine.gpu.sampling import sample_rows
from splitserve.engine.sampler import SampleInput, noise_keys, sample

LENGTHS = (1, 15, 16, 17, 100, 1000, 4097, 20000)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RULES: list[dict[str, Any]] = [{}, {"softcap": 5.0}, {"window": 20}, {"window": 1000}, {"sinks": True}]


class Paged:
    """Random KV of several sequences in scattered blocks of a pool whose every other element is NaN."""

    def __init__(self, *, heads: int, key_dim: int, value_dim: int, page: int, dtype: torch.dtype) -> None:
        self.keys, self.values, self.tables = [], [], []
        num_blocks = sum(-(-n // page) for n in LENGTHS) + 7
        row = 2 * heads * page * (key_dim + value_dim) + 64
        pool = torch.full((num_blocks * row,), float("nan"), dtype=dtype, device="cuda")
        self.kv = kernels.LayerKv(
            elements=pool, row=row, key_offset=32, value_offset=32 + heads * page * key_dim,
            num_heads=heads, key_dim=key_dim, value_dim=value_dim, page=page,
        )  # fmt: skip
        blocks = torch.randperm(num_blocks).tolist()
        table = torch.zeros(len(LENGTHS), -(-max(LENGTHS) // page), dtype=torch.int32)
        for i, n in enumerate(LENGTHS):
            mine = [blocks.pop() for _ in range(-(-n // page))]
            table[i, : len(mine)] = torch.tensor(mine)
            key = torch.randn(heads, n, key_dim, device="cuda").to(dtype)
            value = torch.randn(heads, n, value_dim, device="cuda").to(dtype)
            at = torch.arange(n)
            slots = torch.tensor(mine)[at // page] * page + at % page
            kernels.write_kv(key, value, self.kv, slots.cuda())
            self.keys.append(key)
            self.values.append(value)
        self.table = table.cuda()


def reference(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, softcap: float | None, window: int | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """[tokens, heads, value_dim] fp32 for queries [tokens, heads, dim] at `positions` of one sequence."""
    groups = query.shape[1] // key.shape[0]
    key, value = (x.float().repeat_interleave(groups, 0) for x in (key, value))
    scores = torch.einsum("thd,hsd->hts", query.float(), key) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(key.shape[1], device="cuda")[None]
    visible = at <= positions[:, None]
    if window is not None:
        visible &= at > positions[:, None] - window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        extra = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, extra), dim=-1)
    return torch.einsum("hts,hsd->thd", scores.softmax(-1)[..., : key.shape[1]], value)


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    error = (ours.float() - theirs).norm() / theirs.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"  # a NaN fails too


SHAPES = [
    (8, 2, 64, 64, 16, torch.bfloat16),
    (8, 2, 128, 128, 32, torch.bfloat16),
    (4, 4, 80, 80, 48, torch.float16),
    (4, 2, 256, 256, 16, torch.bfloat16),
    (4, 2, 96, 64, 16, torch.bfloat16),  # MLA: keys wider than values
    (4, 1, 64, 64, 16, torch.float32),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim", "page", "dtype"), SHAPES)
def test_decode_and_prefill_attention(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, page: int, dtype: torch.dtype, rules: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    paged = Paged(heads=kv_heads, key_dim=key_dim, value_dim=value_dim, page=page, dtype=dtype)
    softcap, window = rules.get("softcap"), rules.get("window")
    sinks = torch.randn(heads, device="cuda").to(dtype) if rules.get("sinks") else None
    named = {"scaling": key_dim**-0.5, "softcap": softcap, "window": window, "sinks": sinks}

    query = torch.randn(len(LENGTHS), heads, key_dim, device="cuda").to(dtype)
    rows, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (range(len(LENGTHS)), LENGTHS))
    longest_first = torch.argsort(lengths, descending=True)
    for splits, order in ((1, None), (1, longest_first), (4, longest_first), (64, None)):
        size = len(LENGTHS) * heads * splits
        split = kernels.Split(
            count=splits,
            partial=torch.full((size * value_dim,), float("nan"), device="cuda"),
            lse=torch.full((size,), float("nan"), device="cuda"),
        )
        ours = kernels.decode_attention(query, paged.kv, paged.table, rows, lengths, split=split, order=order, **named)
        for i, n in enumerate(LENGTHS):
            last = torch.tensor([n - 1], device="cuda")
            theirs = reference(query[i : i + 1], paged.keys[i], paged.values[i], last, softcap, window, sinks)
            assert_close(ours[i : i + 1], theirs, dtype)

    spans, row = [], 0
    for n in LENGTHS:
        start = max(0, n - 150) if n > 200 else 0
        spans.append((row, start, n))
        row += n - start
    query = torch.randn(row, heads, key_dim, device="cuda").to(dtype)
    output = torch.full((row, heads, value_dim), float("nan"), dtype=dtype, device="cuda")
    tiles = torch.tensor(kernels.prefill_tiles(spans), dtype=torch.int32, device="cuda")
    kernels.prefill_attention(query, paged.kv, paged.table, tiles, output, **named)
    for i, (first, start, end) in enumerate(spans):
        part = slice(first, first + end - start)
        at = torch.arange(start, end, device="cuda")
        theirs = reference(query[part], paged.keys[i], paged.values[i], at, softcap, window, sinks)
        assert_close(output[part], theirs, dtype)


def test_a_sequence_of_length_0_gives_zeros() -> None:
    paged = Paged(heads=2, key_dim=64, value_dim=64, page=16, dtype=torch.bfloat16)
    query = torch.randn(2, 4, 64, dtype=torch.bfloat16, device="cuda")
    rows, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ((0, 1), (0, 0)))
    for splits in (1, 8):
        split = kernels.Split(
            count=splits,
            partial=torch.full((2 * 4 * splits * 64,), float("nan"), device="cuda"),
            lse=torch.full((2 * 4 * splits,), float("nan"), device="cuda"),
        )
        ours = kernels.decode_attention(query, paged.kv, paged.table, rows, lengths, scaling=0.1, split=split)
        assert (ours == 0).all()


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotated"), [(8, 2, 128, 128), (4, 4, 80, 32), (6, 3, 64, 64)])
def test_rotary_and_write_in_one_pass(heads: int, kv_heads: int, dim: int, rotated: int) -> None:
    page, tokens = 16, 9
    torch.manual_seed(0)
    pool = torch.zeros(4 * 2 * kv_heads * page * dim, device="cuda")
    kv = kernels.LayerKv(
        elements=pool, row=2 * kv_heads * page * dim, key_offset=0, value_offset=kv_heads * page * dim,
        num_heads=kv_heads, key_dim=dim, value_dim=dim, page=page,
    )  # fmt: skip
    merged = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device="cuda")
    parts = merged.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    query, key, value = (x.view(tokens, -1, dim).transpose(0, 1) for x in parts)
    angle = torch.rand(tokens, rotated // 2, device="cuda").repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()

    def rotate(x: Tensor) -> Tensor:
        low, high = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
        return torch.cat((x[..., :rotated] * cos + torch.cat((-high, low), -1) * sin, x[..., rotated:]), -1)

    slots = torch.tensor([5, 6, 20, 33, -1, 0, 1, 50, 63], device="cuda")
    ours = kernels.rotate_and_write(query, key, value, cos, sin, kv, slots, keep_key=True)
    torch.testing.assert_close(ours[0], rotate(query))
    torch.testing.assert_close(ours[1], rotate(key))
    torch.testing.assert_close(rotary(query[None], cos[None], sin[None])[0], rotate(query))
    stored = pool.view(4, 2, kv_heads, page, dim)
    written = torch.zeros(64, dtype=torch.bool)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            written[slot] = True
            torch.testing.assert_close(stored[slot // page, 0, :, slot % page], rotate(key)[:, i])
            assert torch.equal(stored[slot // page, 1, :, slot % page], value[:, i])
    nowhere = stored.permute(0, 3, 1, 2, 4).reshape(64, -1)[~written]
    assert (nowhere == 0).all()


@pytest.mark.parametrize("one_plus", [False, True])
def test_norms_and_activation(one_plus: bool) -> None:
    x, residual = torch.randn(2, 5, 96, device="cuda")
    weight = torch.randn(96, device="cuda")
    scale = 1 + weight if one_plus else weight

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale

    torch.testing.assert_close(rms_norm(x, weight, 1e-6, one_plus=one_plus), norm(x))
    total, normed = add_rms_norm(x, residual, weight, 1e-6, one_plus=one_plus)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, norm(x + residual))
    gate, up = torch.randn(3, 10_000, device="cuda").split(5_000, -1)
    torch.testing.assert_close(silu_multiply(gate, up), torch.nn.functional.silu(gate) * up)


def choose(logits: Tensor, params: list[SamplingParams], indices: list[int]) -> list[int]:
    rows = torch.zeros(len(params), 6, dtype=torch.int32)
    floats, keys = rows.numpy().view("float32"), rows.numpy().view("uint32")[:, 4:]
    for i, (p, index) in enumerate(zip(params, indices, strict=True)):
        if not p.is_greedy:
            rows[i, 0] = p.top_k
            floats[i, 1:4] = (p.temperature, p.top_p, p.min_p)
            keys[i] = noise_keys(p.seed, index)
    chosen = torch.full((len(params),), -1, dtype=torch.int64, device="cuda")
    last = torch.full((len(params) + 2,), -1, dtype=torch.int64, device="cuda")
    slots = torch.arange(1, len(params) + 1, dtype=torch.int32, device="cuda")
    sample_rows(logits, rows.cuda(), slots, last_tokens=last, chosen=chosen)
    told, kept = chosen.tolist(), last.tolist()
    assert kept[0] == kept[-1] == -1
    assert all(0 <= k < logits.shape[1] and t in (k, -1) for t, k in zip(told, kept[1:-1], strict=True))
    return told


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=5, seed=2),
    SamplingParams(temperature=1.3, top_p=0.8, seed=3),
    SamplingParams(temperature=1.0, min_p=0.05, seed=4),
    SamplingParams(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=5),
]


@pytest.mark.parametrize("vocab", [100, 8192, 151_936])
def test_a_mixed_batch_chooses_what_the_host_sampler_chooses(vocab: int) -> None:
    torch.manual_seed(0)
    disagree = total = 0
    for index in range(40):
        logits = 3 * torch.randn(len(PARAMS), vocab, device="cuda")
        ours = choose(logits, PARAMS, [index] * len(PARAMS))
        inputs = [SampleInput(params=p, index=index, token_ids=(), num_prompt_tokens=0) for p in PARAMS]
        theirs = sample(logits.cpu(), inputs)
        assert ours[0] == theirs[0]
        disagree += sum(a != b for a, b in zip(ours, theirs, strict=True))
        total += len(PARAMS)
    # The host computes in float64: a race closer than 1e-6, or a weight as close to top-p's edge, may go otherwise.
    assert disagree <= total // 100


def test_what_is_masked_is_never_chosen() -> None:
    """Whole blocks of the vocabulary may be forbidden, the first among them."""
    torch.manual_seed(5)
    vocab = 20_000
    allowed = [9_001, 9_002, 19_999]
    logits = torch.full((64, vocab), float("-inf"), device="cuda")
    logits[:, allowed] = torch.randn(64, 3, device="cuda")
    params = [
        SamplingParams(temperature=1.0 if i % 2 else 0.0, seed=i, top_p=0.9, top_k=i % 4, min_p=0.01) for i in range(64)
    ]
    chosen = choose(logits, params, list(range(64)))
    assert set(chosen) <= set(allowed)


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_row_that_says_nothing_gives_no_token_and_the_others_theirs(params: SamplingParams) -> None:
    torch.manual_seed(6)
    vocab = 20_000
    logits = torch.randn(6, vocab, device="cuda")
    sound = choose(logits, [params] * 6, [3] * 6)
    broken = logits.clone()
    broken[1, 12_345] = float("nan")
    broken[2] = float("nan")
    broken[3, 7] = float("inf")
    broken[4] = float("-inf")
    chosen = choose(broken, [params] * 6, [3] * 6)
    assert chosen == [sound[0], -1, -1, -1, -1, sound[5]]
    inputs = [SampleInput(params=params, index=3, token_ids=(), num_prompt_tokens=0)] * 6
    assert [token_id is None for token_id in sample(broken.cpu(), inputs)] == [i < 0 for i in chosen]


@pytest.mark.parametrize("params", PARAMS[1:], ids=str)
def test_choices_follow_the_distribution(params: SamplingParams) -> None:
    """Chi-square of 20,000 draws against the filtered softmax in float64."""
    torch.manual_seed(1)
    logits = 2 * torch.randn(1, 50, device="cuda")
    weights = ((logits[0].double() - logits[0].double().max()) / params.temperature).exp()
    ordered = weights.sort(descending=True).values
    if params.top_k:
        weights[weights < ordered[params.top_k - 1]] = 0
    if params.top_p < 1:
        kept = weights.sort(descending=True).values
        mass = kept.cumsum(0)
        weights[weights < kept[int((mass < params.top_p * mass[-1]).sum())]] = 0
    weights[weights < params.min_p] = 0
    expected = (weights / weights.sum()).cpu()
    n = 20_000
    counts = torch.zeros(50, dtype=torch.float64)
    for start in range(0, n, 2_000):
        drawn = choose(logits.expand(2_000, 50).contiguous(), [params] * 2_000, list(range(start, start + 2_000)))
        counts += torch.bincount(torch.tensor(drawn), minlength=50)
    assert counts[expected == 0].sum() == 0
    likely = expected * n >= 5
    statistic = ((counts - expected * n)[likely] ** 2 / (expected * n)[likely]).sum()
    freedom = max(1, int(likely.sum()) - 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10
