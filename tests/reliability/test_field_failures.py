"""Failures that users of other serving systems report: each is impossible here, or ends typed and frees everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from splitserve.client import EngineFailed, GenerationResult, SplitserveError, Unavailable
from splitserve.core.errors import TransferFailed
from splitserve.engine.outputs import Usage
from splitserve.engine.testing import make_tiny_model
from splitserve.prefill_worker.server import PrefillServer

from ..e2e.conftest import WAIT_S, Cluster, StartCluster
from ..worker.conftest import held_step

OPTIONS = {"max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 3}


def prompt(number: int, num_tokens: int = 40, shared: int = 0) -> list[int]:
    """Tokens that only prompts of the same number have, after `shared` ones that all have."""
    own = [(number * 31 + 7 * i) % 251 for i in range(num_tokens - shared)]
    return [9] * shared + own


async def until_usage(cluster: Cluster, names: Sequence[str], wanted: Callable[[Usage], bool]) -> str:
    """Wait for a state of a worker's engine, which has no event; name of the worker that is in it first."""
    async with asyncio.timeout(WAIT_S):
        while True:
            for name in names:
                if wanted(cluster.host(name).engine.usage()):
                    return name
            await asyncio.sleep(0.002)


async def exact(start_cluster: StartCluster, prompts: Sequence[list[int]]) -> list[GenerationResult]:
    """Answers of one worker with room for everything and no memory of earlier prompts."""
    alone = await start_cluster(prefill=0, decode=0, colocated=1, prefix_cache=False)
    return [await alone.client.generate(each, **OPTIONS) for each in prompts]


async def test_01_no_answer_comes_from_a_stale_or_reused_block(start_cluster: StartCluster) -> None:
    """Others got another prompt's answer with HTTP 200. Here blocks change hands under aborts and preemption."""
    prompts = [prompt(n % 8, 70, shared=32) for n in range(32)]
    wanted = await exact(start_cluster, prompts[:8])
    cluster = await start_cluster(prefill=2, decode=2, num_kv_blocks=26, decode_headroom_tokens=0)

    async def ask(number: int) -> GenerationResult | None:
        async with cluster.client.stream(prompts[number], **OPTIONS) as stream:
            if number % 4 == 3:
                await anext(stream)
                return None  # leaves in the middle: its blocks go to the next
            return await stream.result()

    answers = await asyncio.gather(*(ask(number) for number in range(len(prompts))))
    for number, answer in enumerate(answers):
        assert answer is None or answer.token_ids == wanted[number % 8].token_ids
    await cluster.idle()


async def test_02_kv_that_did_not_move_is_never_recomputed_in_silence(start_cluster: StartCluster) -> None:
    """Others' decode workers computed the whole prompt again and nobody noticed."""
    cluster = await start_cluster(router={"max_attempts": 2})
    decode, receiver = cluster.host("decode-0").engine, cluster.workers["decode-0"].worker.receiver
    answer = await cluster.client.generate(prompt(1), **OPTIONS)
    assert answer.timing.kv_bytes == 40 * decode.geometry.bytes_per_token

    async def no_kv(*args: object, **options: object) -> None:
        raise TransferFailed("the KV did not come")

    receiver.receive = no_kv
    with pytest.raises(TransferFailed):
        await cluster.client.generate(prompt(2), **OPTIONS)
    assert decode.prompt_tokens == decode.recomputed_prompt_tokens == 0
    assert cluster.router.metrics.retries._value.get() == 1
    await cluster.idle()


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
async def test_03_aborts_rejections_and_lost_clients_leak_no_block(
    start_cluster: StartCluster, num_chunks: int
) -> None:
    """Others lost blocks with every abort until nothing fitted."""
    cluster = await start_cluster(num_kv_blocks=12)

    async def leave(number: int) -> None:
        async with cluster.client.stream(prompt(number), **OPTIONS) as stream:
            for _ in range(num_chunks):
                await anext(stream)

    await asyncio.gather(*(leave(number) for number in range(12)))
    with pytest.raises(SplitserveError):
        await cluster.client.generate(prompt(99, 400), **OPTIONS)  # more than the pool will ever hold
    with pytest.raises(SplitserveError):
        await cluster.client.generate(prompt(98), **{**OPTIONS, "timeout_s": 0.002})
    await cluster.idle()


def mapped_pools() -> int:
    """Pools of others that are mapped into this process, read-only."""
    return sum("r--s" in line and "memfd" in line for line in Path("/proc/self/maps").read_text().splitlines())


async def test_04_a_dead_prefill_workers_memory_is_unmapped_and_it_can_come_back(start_cluster: StartCluster) -> None:
    """Others kept the dead worker's memory mapped, or crashed when it came back at its address."""
    before = mapped_pools()
    cluster = await start_cluster(router={"no_worker_wait_s": WAIT_S})  # until it has found the worker again
    (wanted,) = await exact(start_cluster, [prompt(1)])
    assert (await cluster.client.generate(prompt(1), **OPTIONS)).timing.transport == "shared_memory"
    assert mapped_pools() == before + 1
    old = cluster.workers["prefill-0"].worker
    port = int(old.host.rpc.address.rpartition(":")[2])
    await old.stop()
    async with asyncio.timeout(WAIT_S):
        while mapped_pools() > before:
            await asyncio.sleep(0.01)
    new = PrefillServer(replace(old.host.options, port=port))
    cluster.workers["prefill-0"] = new
    try:
        await new.worker.host.start()
        again = await cluster.client.generate(prompt(1), **OPTIONS)
        assert again.token_ids == wanted.token_ids
        assert again.timing.transport == "shared_memory"
        await cluster.idle()
    finally:
        await new.worker.stop()


async def test_05_a_failed_prefill_frees_the_decode_worker_without_any_time_out(start_cluster: StartCluster) -> None:
    """Others' decode workers waited 300 s for KV of a prefill that had failed, holding a slot."""
    cluster = await start_cluster(router={"max_attempts": 1})
    receiver = cluster.workers["decode-0"].worker.receiver
    receiver._silence_s = receiver._stall_s = 3600.0
    runner = cluster.host("prefill-0").engine._runner

    def broken(plan: object) -> None:
        raise RuntimeError("the device is gone")

    runner.launch = broken
    with pytest.raises(EngineFailed):
        await cluster.client.generate(prompt(1), **OPTIONS)
    await cluster.idle()


async def test_06_a_worker_that_makes_no_progress_is_not_healthy(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' health checks said 200 while nothing moved."""
    monkeypatch.setattr("splitserve.worker.host._HEALTH_PERIOD_S", 0.05)
    cluster = await start_cluster(prefill=0, decode=0, colocated=1)
    server = cluster.workers["colocated-0"]
    host = server.worker.host
    host.options = replace(host.options, stall_bound_s=0.5)
    async with grpc.aio.insecure_channel(host.rpc.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(WAIT_S):
            while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            with held_step(server):
                asking = asyncio.create_task(cluster.client.generate(prompt(1), **OPTIONS))
                while (await watch.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                    pass
                assert host.status().stalled
            while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                pass  # the step ended after all
            assert len((await asking).token_ids) == 40
        watch.cancel()


async def test_07_a_mismatched_layout_is_an_error_with_the_difference_and_no_hang(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    """Others' clients hung when the two sides had different layouts."""
    cluster = await start_cluster(router={"no_worker_wait_s": 0.1})
    other = make_tiny_model("llama", tmp_path / "other", num_key_value_heads=4)
    stranger = await start_cluster(prefill=1, decode=0, colocated=1, model=other)
    options = stranger.host("prefill-0").options
    foreign = PrefillServer(replace(options, port=0, model_name=cluster.host("decode-0").options.engine.model))
    try:
        address = (await foreign.worker.host.start()).address
        decode = cluster.host("decode-0").rpc.address
        cluster.router.pool.set_workers([address], [decode], cluster.router.dispatcher)
        with pytest.raises(Unavailable):
            await cluster.client.generate(prompt(1), **OPTIONS)
        async with asyncio.timeout(WAIT_S):
            while "no worker of the other role has its model revision" not in (
                reason := cluster.router.pool.prefills[address].reason
            ):
                await asyncio.sleep(0.01)
        assert foreign.worker.host.engine.geometry.digest() in reason
    finally:
        await foreign.worker.stop()


async def test_08_a_preempted_request_is_always_admitted_again(start_cluster: StartCluster) -> None:
    """Others' preempted requests never came back once decode had run out of memory."""
    prompts = [prompt(n, 50) for n in range(6)]
    wanted = await exact(start_cluster, prompts)
    tight = await start_cluster(decode_blocks=16, decode_headroom_tokens=0)
    got = await asyncio.gather(*(tight.client.generate(p, **OPTIONS) for p in prompts))
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in wanted]
    assert sum(answer.timing.preemptions for answer in got) > 0
    await tight.idle()


async def test_09_no_decode_room_is_held_while_long_prompts_wait_for_prefill(start_cluster: StartCluster) -> None:
    """Others reserved decode slots early and stranded them during long prefills."""
    cluster = await start_cluster()
    prompts = [prompt(n, 100) for n in range(10)]
    with held_step(cluster.workers["prefill-0"]):
        asking = [asyncio.create_task(cluster.client.generate(p, **OPTIONS)) for p in prompts]

        def is_queued(usage: Usage) -> bool:
            return cluster.router.dispatcher.num_live == 10 and usage.num_reserved > 0

        await until_usage(cluster, ["decode-0"], is_queued)
        # What the prefill worker will compute next has its room; the others wait in the router, holding nothing.
        assert cluster.host("decode-0").engine.usage().num_reserved < 5
        assert cluster.router.dispatcher.waiting.num_queued > 5
    for answer in await asyncio.gather(*asking):
        assert len(answer.token_ids) == 40
    await cluster.idle()


async def test_10_a_prompt_is_tokenised_once_even_when_it_is_tried_again(start_cluster: StartCluster) -> None:
    """Others tokenise a prompt in the router and in the worker: 164 ms for 37,000 tokens."""
    cluster = await start_cluster(prefill=2)
    receiver = cluster.workers["decode-0"].worker.receiver
    receive, failures = receiver.receive, iter((True, False))

    async def once_broken(*args: object, **options: object) -> object:
        if next(failures):
            raise TransferFailed("the link broke")
        return await receive(*args, **options)

    receiver.receive = once_broken
    answer = await cluster.client.generate("a text of some words", max_tokens=3, ignore_eos=True)
    assert answer.timing.attempts == 2
    assert cluster.router.metrics.tokenizations._value.get() == 1


async def test_11_scaling_down_aborts_nothing_and_prefill_waits_for_its_fetch(start_cluster: StartCluster) -> None:
    """Others abort requests at scale-down, and drop KV that nobody has fetched yet."""
    prompts = [prompt(n) for n in range(8)]
    wanted = await exact(start_cluster, prompts)
    cluster = await start_cluster(prefill=2, decode=2)
    held = asyncio.Event()
    for name in ("decode-0", "decode-1"):
        receiver = cluster.workers[name].worker.receiver

        async def late(*args: object, receive: object = receiver.receive, **options: object) -> object:
            await held.wait()  # nobody fetches
            assert callable(receive)
            return await receive(*args, **options)

        receiver.receive = late
    asking = [asyncio.create_task(cluster.client.generate(p, **OPTIONS)) for p in prompts]
    # Who gets the requests is the policy's choice, by measured times: one of each role that has something to wait for.
    prefill = await until_usage(cluster, ["prefill-0", "prefill-1"], lambda usage: usage.num_held > 0)
    decode = await until_usage(cluster, ["decode-0", "decode-1"], lambda usage: usage.num_reserved > 0)
    draining = [asyncio.create_task(cluster.host(name).drain(WAIT_S)) for name in (prefill, decode)]
    await asyncio.sleep(0)  # both have begun
    assert cluster.host(prefill).draining
    assert not any(drain.done() for drain in draining)
    held.set()
    answers = await asyncio.gather(*asking)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in wanted]
    assert [answer.timing.attempts for answer in answers] == [1] * 8
    await asyncio.gather(*draining)
    await cluster.idle()


async def test_12_the_first_link_to_a_peer_is_set_up_while_its_prompt_is_computed(start_cluster: StartCluster) -> None:
    """Others' first connection to a peer costs the request five seconds."""
    cluster = await start_cluster()
    peers = cluster.workers["decode-0"].worker.receiver._peers._peers
    assert not peers
    with held_step(cluster.workers["prefill-0"]):
        asking = asyncio.create_task(cluster.client.generate(prompt(1), **OPTIONS))
        async with asyncio.timeout(WAIT_S):
            while not peers:
                await asyncio.sleep(0.002)
        assert cluster.host("prefill-0").engine.num_steps == 0  # the link stands before the first step has ended
    assert len((await asking).token_ids) == 40
