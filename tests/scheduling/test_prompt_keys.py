"""A prompt is hashed no further than somebody holds it, and matches as if all of it were."""

from __future__ import annotations

import random

import pytest
from splitserve.core.kv_geometry import PREFIX_UNIT
from splitserve.scheduling.prefix import prefix_hashes, prefix_namespace
from splitserve.scheduling.prefix_feed import block_key
from splitserve.scheduling.prefix_index import PrefixIndex
from splitserve.scheduling.prompt_keys import PromptKeys

ROOT = prefix_namespace(model_id="m", kv_dtype="float32")


def all_keys(tokens: list[int], block_size: int) -> list[int]:
    units = block_size // PREFIX_UNIT
    return [block_key(each) for each in prefix_hashes(tokens, ROOT)[units - 1 :: units]]


@pytest.mark.parametrize("block_size", [16, 32, 48, 528, 1024])
@pytest.mark.parametrize("num_tokens", [0, 15, 16, 511, 512, 513, 1_100, 5_000])
def test_it_matches_as_if_all_were_hashed_while_caches_grow_and_shrink(block_size: int, num_tokens: int) -> None:
    rng = random.Random(block_size + num_tokens)
    tokens = [rng.randrange(2**32) for _ in range(num_tokens)]
    keys, index = all_keys(tokens, block_size), PrefixIndex()
    prompt = PromptKeys(tokens, ROOT, block_size)
    held = dict.fromkeys(("a", "b", "c"), 0)
    for _ in range(40):
        worker = rng.choice(list(held))
        before, held[worker] = held[worker], rng.randint(0, len(keys))
        index.add(worker, keys[before : held[worker]])
        index.remove(worker, keys[held[worker] : before])
        assert prompt.match(index) == {worker: count for worker, count in held.items() if count}


def test_of_a_prompt_that_nobody_holds_only_the_beginning_is_hashed() -> None:
    tokens, index = list(range(8_000)), PrefixIndex()
    prompt, keys = PromptKeys(tokens, ROOT, 16), all_keys(tokens, 16)
    assert prompt.match(index) == {}
    assert len(prompt._hashes) == 32
    index.add("a", keys[:31])
    assert prompt.match(index) == {"a": 31}
    assert len(prompt._hashes) == 32
    index.add("a", keys[31:40])
    assert prompt.match(index) == {"a": 40}
    assert len(prompt._hashes) == 64


def test_prompts_that_begin_alike_are_of_one_session() -> None:
    tokens = list(range(2_000))
    prompts = [PromptKeys(each, ROOT, 16) for each in (tokens, tokens[:512], [*tokens[:511], 0], tokens[:15])]
    assert prompts[0].session == b""
    for prompt in prompts:
        prompt.match(PrefixIndex())
    one, same, other, none = (prompt.session for prompt in prompts)
    assert one == same != other
    assert none == b""


def test_blocks_that_no_hash_ends_with_never_match() -> None:
    tokens, index = list(range(4_000)), PrefixIndex()
    index.add("a", all_keys(tokens, 16))
    prompt = PromptKeys(tokens, ROOT, 24)
    assert prompt.match(index) == {}
    assert len(prompt._hashes) == 32
    assert prompt.session == prefix_hashes(tokens, ROOT)[31]
