"""What a worker's KV blocks are held for, by page: the engine's word, joined with who asked for it."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.engine import Engine
from ..engine.outputs import Holding
from ..proto import worker_pb2
from .role import Holder

DEFAULT_PAGE, MAX_PAGE = 200, 1_000


def list_holdings(
    engine: Engine, holders: Sequence[Holder], request: worker_pb2.ListHoldingsRequest
) -> worker_pb2.ListHoldingsResponse:
    """One page in order of the attempts' names. What nobody asked for has an empty router_id."""
    size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
    all_of_them = engine.holdings()
    left = [holding for holding in all_of_them if holding.request_id > request.page_token]
    by_sequence = {holder.sequence_id: holder for holder in holders}
    page = left[:size]
    usage = engine.usage()
    return worker_pb2.ListHoldingsResponse(
        holdings=[_to_proto(holding, by_sequence.get(holding.request_id)) for holding in page],
        next_page_token=page[-1].request_id if len(left) > size else "",
        num_holdings=len(all_of_them),
        num_cached_blocks=usage.blocks_cached,
        num_orphaned_blocks=engine.num_orphaned_blocks(),
    )


def _to_proto(holding: Holding, holder: Holder | None) -> worker_pb2.Holding:
    return worker_pb2.Holding(
        sequence_id=holding.request_id,
        state=holding.state,
        num_blocks=holding.num_blocks,
        num_tokens=holding.num_tokens,
        request_id=holder.request_id if holder is not None else "",
        attempt=holder.attempt if holder is not None else 0,
        router_id=holder.router_id if holder is not None else "",
        age_s=holder.age_s if holder is not None else 0.0,
        lease_left_s=holder.lease_left_s if holder is not None else None,
    )
