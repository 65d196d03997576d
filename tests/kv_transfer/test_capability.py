"""A capability in each grant: only who made it fetches, only who was given it sends, and only while it lasts."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from splitserve.core.errors import CapabilityRefused, KvCorrupted
from splitserve.kv_transfer.capability import Granter, check_proof, sign_end
from splitserve.kv_transfer.grants import Grant
from splitserve.proto import kv_transfer_pb2 as pb
from splitserve.proto.rpc import ERROR_KEY

PROMPT = 100
WAIT_S = 60.0
GRANT = Grant(
    grant_id="ab" * 16,
    request_id="r",
    attempt=1,
    epoch=1,
    decode_boot_id="d",
    prefill_boot_id="p",
    geometry_digest="g",
    num_cached_tokens=0,
    num_tokens=4,
    lease_s=1.0,
    codec="none",
    wire_dtype="float32",
)


def refused(metrics: Any) -> float:
    return metrics.links.refused.labels("capability")._value.get()


async def code_of(call: Any) -> str:
    """The typed error that ends a raw call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WAIT_S):
            await call.read() if hasattr(call, "read") else await call
    return dict(caught.value.trailing_metadata() or ()).get(ERROR_KEY, caught.value.code().name)


async def test_nobody_but_its_maker_fetches_a_grant(pair: Any) -> None:
    """A peer knows every field of a grant, as from a router's log; the transfer that is meant is not disturbed."""
    async with pair("grpc") as p:
        request = p.request(PROMPT)
        grant = p.grant(request)
        p.complete(grant, request)
        another = Granter.new()
        proofs = (b"", grant.proof_sha256, grant.source_key, another.proof(grant), hashlib.sha256(b"").digest())
        for proof in proofs:
            assert await code_of(p.fetch(grant, proof=proof)) == "capability_refused"
        assert refused(p.sender_metrics) == len(proofs)
        assert p.released == p.reports == []
        received = await p.receive(grant, request)
        await p.receiver.commit(grant, p.address, received)
        p.assert_arrived(grant)
        assert refused(p.sender_metrics) == len(proofs)


@pytest.mark.parametrize("transport", ["grpc", "shared_memory"])
async def test_another_decode_worker_cannot_use_it_either(pair: Any, transport: str) -> None:
    """One that may connect, and was told the grant: what it would copy is announced by Fetch alone."""
    async with pair(transport) as p, pair(transport) as thief:
        request = p.request(PROMPT)
        grant = p.grant(request)
        p.complete(grant, request)
        with pytest.raises(CapabilityRefused, match="not the decode worker that made it"):
            await thief.receiver.receive(grant, p.address, request.prompt_token_ids, thief.target_table)
        assert refused(p.sender_metrics) == 1
        await p.receive(grant, request)
        p.assert_arrived(grant)


async def test_a_changed_grant_is_not_the_one_that_was_made(pair: Any) -> None:
    """Its maker's proof is for its fields: for another request, source or attempt there is no proof and no KV."""
    async with pair("grpc") as p:
        request = p.request(PROMPT)
        grant = p.grant(request)
        p.complete(grant, request)
        proof = p.receiver._granter.proof(grant)
        for changes in ({"request_id": "r2"}, {"attempt": 2}, {"epoch": 9}, {"num_cached_tokens": 16}):
            changed = replace(grant, **changes)
            assert p.receiver._granter.proof(changed) != proof
            assert await code_of(p.fetch(changed, proof=proof)) == "stale"
        moved = replace(grant, proof_sha256=hashlib.sha256(b"mine").digest())
        assert await code_of(p.fetch(moved, proof=b"mine")) == "stale"
        await p.receive(grant, request)


async def test_after_its_lease_it_opens_nothing(pair: Any) -> None:
    async with pair("grpc", sender_options={"lease_s": 0.05}) as p:
        request = p.request(PROMPT)
        grant = p.grant(request)
        p.complete(grant, request)
        async with asyncio.timeout(WAIT_S):
            await p.release_seen.wait()
        assert await code_of(p.fetch(grant)) == "lease_expired"


async def test_a_commit_needs_the_proof_too(pair: Any) -> None:
    """Else whoever reads a grant could make the prefill worker drop KV that is still on its way."""
    async with pair("grpc") as p:
        request = p.request(PROMPT)
        grant = p.grant(request)
        p.complete(grant, request)
        received = await p.receive(grant, request)
        assert await code_of(p.fetch(grant, proof=b"guess", commit=pb.Commit(digest=received.digest))) == (
            "capability_refused"
        )
        assert p.released == []
        await p.receiver.commit(grant, p.address, received)
        assert p.released == [request.request_id]


async def test_kv_of_a_worker_that_was_not_given_the_grant_is_refused(pair: Any) -> None:
    """An impostor answers at the prefill worker's address, and knows all but the key."""
    async with pair("grpc") as p:
        request = p.request(PROMPT)
        grant = p.grant(request)
        p.complete(replace(grant, source_key=b"a guess"), request)
        with pytest.raises(KvCorrupted, match="does not come from the prefill worker that was given the grant"):
            await p.receive(grant, request)
        assert refused(p.receiver_metrics) == 1


def test_the_key_does_not_travel_with_a_fetch() -> None:
    sealed = Granter.new().seal(GRANT)
    assert sealed.source_key
    assert sealed.to_peer().source_key == b""
    assert Grant.from_proto(sealed.to_peer()) == sealed
    assert sealed.source_key.hex() not in repr(sealed)
    assert Grant.from_proto(sealed.to_proto()).source_key == sealed.source_key


def test_proofs_belong_to_one_grant_and_one_boot() -> None:
    granter = Granter.new()
    sealed = granter.seal(GRANT)
    check_proof(sealed, granter.proof(sealed))
    others = [
        replace(GRANT, grant_id="cd" * 16),
        replace(GRANT, decode_boot_id="e"),
        replace(GRANT, prefill_boot_id="q"),
    ]
    for proof in (*map(granter.proof, others), Granter.new().proof(sealed), b""):
        with pytest.raises(CapabilityRefused):
            check_proof(sealed, proof)
    with pytest.raises(CapabilityRefused):  # a grant that was never sealed opens to nobody
        check_proof(GRANT, b"")


@pytest.mark.parametrize("field", ["first_token_id", "finished", "num_frames", "num_bytes", "digest", "signature"])
def test_what_the_last_frame_says_is_signed(field: str) -> None:
    granter = Granter.new()
    sealed = granter.seal(GRANT)
    end = pb.TransferEnd(first_token_id=1, num_frames=2, num_bytes=3, digest=b"d")
    sign_end(sealed, end)
    granter.check_end(sealed, end)
    setattr(end, field, b"x" if isinstance(getattr(end, field), bytes) else 9 if field != "finished" else True)
    with pytest.raises(KvCorrupted):
        granter.check_end(sealed, end)
