"""The embedded model through a split cluster equals transformers' own `generate`, token for token, in fp32."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from splitserve.engine.model_files import resolve_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import Cluster, StartCluster

NUM_NEW = 24
QUESTIONS = (
    "The",
    "The capital of France is",
    "Write a haiku about rain.",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Translate to German: Good morning, how are you?",
    "List three reasons why the sky is blue.",
    "In 1969, the first man on the moon said",
)
LENGTHS = (1, 15, 16, 17, 130, 400, 900, 1500)  # tokens of prompts cut from English prose


def prompts(path: Path) -> list[list[int]]:
    """Sixteen real prompts of 1 to 1,500 tokens: questions, and the docstrings of the standard library."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    prose = "\n".join(textwrap.dedent(inspect.getdoc(module) or "") for module in (inspect, asyncio, textwrap, Path))
    prose += "\n".join(inspect.getdoc(member) or "" for _, member in inspect.getmembers(inspect, inspect.isfunction))
    ids = tokenizer(prose)["input_ids"]
    assert len(ids) >= max(LENGTHS) + 8 * len(LENGTHS)
    # Different starts, so that no prompt is the prefix of another.
    return [tokenizer(q)["input_ids"] for q in QUESTIONS] + [ids[8 * i : 8 * i + n] for i, n in enumerate(LENGTHS)]


Pairs = list[tuple[list[int], list[int]]]
Reference = Callable[..., Pairs]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """reference(n): the prompts of up to n tokens, or every second one, each with what `generate` makes of it alone."""
    path = resolve_model("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    everything = prompts(path)

    @cache
    def generate(number: int, num_new: int) -> list[int]:
        ids = everything[number]
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=num_new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = out[0, len(ids) :].tolist()
        return tokens

    def pairs(most: int, *, step: int = 1, num_new: int = NUM_NEW) -> Pairs:
        numbers = [n for n, ids in enumerate(everything) if len(ids) <= most][::step]
        return [(everything[n], generate(n, num_new)) for n in numbers]

    return pairs


async def check(start_cluster: StartCluster, pairs: Pairs, **options: object) -> Cluster:
    """All prompts at once through one cluster; twice if there is a prefix cache, so that it is used."""
    cluster = await start_cluster(model="smollm2-135m", num_threads=2, **options)
    for _ in range(2 if options.get("prefix_cache", True) else 1):
        results = await asyncio.gather(
            *(cluster.client.generate(ids, max_tokens=len(tokens), ignore_eos=True) for ids, tokens in pairs)
        )
        for (ids, tokens), result in zip(pairs, results, strict=True):
            assert list(result.token_ids) == tokens, f"prompt of {len(ids)} tokens"
    await cluster.idle()
    return cluster


async def test_short_prompts_equal_generate(start_cluster: StartCluster, reference: Reference) -> None:
    pairs = reference(130, step=2, num_new=8)
    assert len(pairs) >= 6
    await check(start_cluster, pairs, max_step_tokens=64, prefix_cache=False)


@pytest.mark.verify
@pytest.mark.timeout(600)
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("chunk", [17, 64, 256])
async def test_all_prompts_equal_generate(
    start_cluster: StartCluster, reference: Reference, chunk: int, prefix_cache: bool
) -> None:
    pairs = reference(1500)
    assert len(pairs) >= 16
    await check(start_cluster, pairs, max_step_tokens=chunk, prefix_cache=prefix_cache, num_kv_blocks=600)


@pytest.mark.verify
@pytest.mark.timeout(600)
async def test_preempted_sequences_equal_generate(start_cluster: StartCluster, reference: Reference) -> None:
    cluster = await check(start_cluster, reference(130), decode_blocks=28, decode_headroom_tokens=0, prefix_cache=False)
    assert cluster.host("decode-0").engine.preemptions > 0
