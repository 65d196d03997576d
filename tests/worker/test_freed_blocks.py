"""Blocks that become free wake the device loop: what waits for them needs nobody else to come."""

from __future__ import annotations

from splitserve.core.request import Request
from splitserve.proto import worker_pb2
from splitserve.proto.convert import request_to_proto

from .conftest import OpenPair, Pair, until


def prompt(num_tokens: int, first: int) -> tuple[int, ...]:
    return tuple(3 + (first + 7 * i) % 200 for i in range(num_tokens))


async def test_a_prompt_goes_on_when_the_kv_of_another_was_fetched(pair: Pair) -> None:
    engine = pair.prefill.worker.host.engine
    held, waiting = (
        Request(request_id=name, prompt_token_ids=prompt(600, first), max_tokens=4, timeout_s=60.0)
        for first, name in enumerate(("held", "waiting"))
    )
    assert engine.usage().blocks_total * engine.options.block_size < 2 * 600, "both would fit"
    await pair.prefill_run(held)
    assert (await pair.prefill_end.next("first_token")).request_id == "held"
    await pair.prefill_run(waiting)
    await until(lambda usage: usage.num_waiting == 1, pair.prefill.worker.host)
    await pair.prefill_end.send(grant=await pair.grant(held))
    assert (await pair.prefill_end.next("first_token")).request_id == "waiting"
    await pair.prefill_end.send(cancel=worker_pb2.CancelRun(request_id="waiting", attempt=1))
    await pair.decode_end.next("transfer_done")
    assert len(await pair.rest(1)) == 3
    await pair.idle()


async def test_a_preempted_sequence_comes_back_when_a_reservation_is_released(open_pair: OpenPair) -> None:
    pair = await open_pair(num_decode_blocks=8, decode_engine={"decode_headroom_tokens": 16})
    granted = Request(request_id="granted", prompt_token_ids=prompt(80, 0), max_tokens=12, timeout_s=60.0)
    alone = Request(request_id="alone", prompt_token_ids=prompt(30, 1), max_tokens=12, timeout_s=60.0)
    await pair.grant(granted)
    assert pair.decode.worker.host.engine.usage().blocks_granted == 6
    await pair.decode_end.send(run=worker_pb2.RunLocal(request=request_to_proto(alone, alone.timeout_s)))
    for index in range(3):  # its third block is nowhere to be had: it gives its own two back and waits
        (sequence,) = (await pair.decode_end.next("tokens")).sequences
        assert sequence.index == index
    await until(lambda usage: usage.num_waiting == 1, pair.decode.worker.host)
    await pair.decode_end.send(cancel=worker_pb2.CancelRun(request_id="granted", attempt=1))
    assert len(await pair.rest(3)) == 9
    await pair.idle()
