"""Prefix-aware routing over real workers: what a cache holds is known to the router, and draws what begins alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from splitserve.scheduling.prefix import prefix_hashes, prefix_namespace
from splitserve.scheduling.prefix_feed import block_key

from .conftest import WAIT_S, Cluster, StartCluster


def prompt(number: int, length: int = 200) -> list[int]:
    return [5 + (number * 37 + 7 * i) % 200 for i in range(length)]


def known_blocks(cluster: Cluster, tokens: list[int]) -> dict[str, int]:
    """Blocks of a prompt that the router knows of, by worker id."""
    links = list(cluster.router.pool)
    info = links[0].info
    assert info is not None, "the router lost a worker"
    namespace = prefix_namespace(model_id=info.prefix_model_id, kv_dtype=info.kv_dtype)
    found = cluster.router.dispatcher._routing.index.match([block_key(h) for h in prefix_hashes(tokens, namespace)])
    return {link.worker_id: found[link.address] for link in links if link.address in found}


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():
            await asyncio.sleep(0.005)


async def test_a_repeated_prefix_lands_on_the_worker_that_holds_it(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(prefill=3, decode=2)
    homes: dict[int, set[str]] = {}
    for turn in range(4):  # conversations that grow, each turn of all of them at once
        prompts = {number: prompt(number, 200 + 32 * turn) for number in range(3)}
        results = await asyncio.gather(*(cluster.client.generate(p, max_tokens=2) for p in prompts.values()))
        await cluster.idle()
        for number, result in zip(prompts, results, strict=True):
            homes.setdefault(number, set()).add(result.timing.prefill_worker)
            if turn:
                expected = (200 + 32 * (turn - 1)) // 16 * 16
                assert result.usage.num_cached_tokens == expected
            tokens, worker = prompts[number], result.timing.prefill_worker
            await until(lambda t=tokens, w=worker: known_blocks(cluster, t).get(w, 0) >= len(t) // 16)
    assert all(len(workers) == 1 for workers in homes.values()), homes
    assert len(set.union(*homes.values())) > 1, "they were spread at first"
    assert cluster.router.metrics.expected_cached_tokens._value.get() > 0


async def test_what_is_evicted_is_forgotten_by_the_router(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(num_kv_blocks=40)
    await cluster.client.generate(prompt(1), max_tokens=2)
    await until(lambda: known_blocks(cluster, prompt(1)).get("prefill-0", 0) == 12)
    for number in range(2, 6):  # 13 blocks each
        await cluster.client.generate(prompt(number), max_tokens=2)
    await until(lambda: "prefill-0" not in known_blocks(cluster, prompt(1)))
    await until(lambda: known_blocks(cluster, prompt(5)).get("prefill-0", 0) == 12)


async def test_short_prompts_are_answered_by_the_decode_worker_alone_and_nothing_is_recomputed(
    start_cluster: StartCluster,
) -> None:
    """A limit of many seconds, so that every prompt is short; the tokens are those of a pair."""
    asked = {"max_tokens": 12, "temperature": 0.9, "seed": 5, "ignore_eos": True}
    split = await start_cluster()
    expected = [await split.client.generate(prompt(n, 30), **asked) for n in range(4)]
    assert {result.timing.transport for result in expected} == {"shared_memory"}

    local = await start_cluster(router={"local_prefill_itl_s": 60.0}, local_prefill=True)
    for number in (8, 9):  # by the pair: nobody knows yet how long it takes, and the first one says nothing
        await local.client.generate(prompt(number, 30), max_tokens=1)
    await until(lambda: max(link.status.prefill_tokens_per_s for link in local.router.pool) > 0)
    results = await asyncio.gather(*(local.client.generate(prompt(n, 30), **asked) for n in range(4)))
    await local.idle()
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert {result.timing.transport for result in results} == {"none"}
    assert local.router.metrics.local_prefills._value.get() == 4
    assert local.router.metrics.remote_prefills._value.get() == 2
    assert local.host("decode-0").engine.recomputed_prompt_tokens == 0
