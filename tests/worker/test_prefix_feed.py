"""What workers tell of their prefix caches: with the status, numbered, and all of it again when asked."""

from __future__ import annotations

import asyncio

from splitserve.core.request import Request
from splitserve.proto import worker_pb2
from splitserve.scheduling.prefix import prefix_hashes, prefix_namespace
from splitserve.scheduling.prefix_feed import PrefixChanges, block_key
from splitserve.scheduling.prefix_index import PrefixIndex

from .conftest import WAIT_S, Pair

PROMPT = tuple(3 + (7 * i) % 200 for i in range(100))


def keys_of(info: worker_pb2.WorkerInfo, tokens: tuple[int, ...]) -> list[int]:
    namespace = prefix_namespace(model_id=info.prefix_model_id, kv_dtype=info.kv_dtype)
    return [block_key(each) for each in prefix_hashes(tokens, namespace)]


async def test_both_workers_tell_what_they_hold_and_tell_it_again_when_asked(pair: Pair) -> None:
    request = Request(request_id="r", prompt_token_ids=PROMPT, max_tokens=3, timeout_s=60.0)
    await pair.serve(request)
    keys = keys_of(pair.prefill_info, PROMPT)
    for end in (pair.prefill_end, pair.decode_end):
        index = PrefixIndex()
        # What was read while the request ran is missing here: only a restart makes up for it.
        await end.send(restart_prefix_blocks=worker_pb2.RestartPrefixBlocks())
        async with asyncio.timeout(WAIT_S):
            while True:
                message = await end.call.read()
                blocks = message.status.prefix_blocks
                if message.WhichOneof("message") == "status" and blocks.restarts and len(blocks.added) >= 6:
                    break
        assert index.apply(
            "w",
            PrefixChanges(number=blocks.number, restarts=True, added=blocks.added, removed=blocks.removed),
        )
        assert index.match(keys) == {"w": len(PROMPT) // 16}


async def test_the_operators_status_takes_nothing_from_a_routers(pair: Pair) -> None:
    host = pair.prefill.worker.host
    assert not host.status().HasField("prefix_blocks")
