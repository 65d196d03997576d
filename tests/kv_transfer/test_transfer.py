"""What both transports must do, over real gRPC servers."""

from __future__ import annotations


import pytest

TRANSPORTS = ["grpc", "shared_memory"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_kv_arrives_bit_exact_and_commit_frees_the_sender(pair, transport: str) -> None:
    async with pair(transport) as p:
        request = p.request(100)
        grant = p.grant(request, num_cached_tokens=32)
        p.offer(grant, request)
        p.write_all(grant)
        p.sender.finish("r1", 7, final=False)
        received = await p.receive(grant, request)
        p.assert_arrived(grant)
        assert (received.first_token_id, received.finished, received.transport) == (7, False, transport)
        assert received.num_bytes == p.source.geometry.bytes_per_token * 68
        assert p.released == []
        await p.receiver.commit(grant, p.address, received)
        assert p.released == ["r1"]
