"""One forward pass over the packed tokens of many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import AttentionBatch, Chunk, DecodeBatch, KvWritten, current
from .pool import KvPool


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTokens:
    """New tokens of one sequence: positions [start, start + len(token_ids))."""

    request_id: str
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    announce: bool = False  # tell `kv_written` about its layers

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@torch.inference_mode()
def forward(
    model: PreTrainedModel,
    pool: KvPool,
    sequences: Sequence[SequenceTokens],
    logit_rows: Sequence[int],
    kv_written: KvWritten | None = None,
) -> Tensor:
    """Compute the KV of all tokens, packed in the order given, and the logits of some: [len(logit_rows), vocab] fp32.

    `logit_rows` are places in the packed row. Sequences with a single new token must come first.
    """
    block_size = pool.block_size
    positions = [p for s in sequences for p in range(s.start, s.end)]
    token_blocks = [s.block_table[p // block_size] for s in sequences for p in range(s.start, s.end)]
    chunks, row = [], 0
    for s in sequences:
        table = torch.tensor(s.block_table[: -(-s.end // block_size)])
        chunks.append(
            Chunk(request_id=s.request_id, row=row, start=s.start, end=s.end, block_table=table, announce=s.announce)
        )
        row += len(s.token_ids)
    single = [chunk for chunk in chunks if chunk.end == chunk.start + 1]
    assert chunks[: len(single)] == single, "sequences with one new token come first"
    position_ids = torch.tensor(positions)
    batch = AttentionBatch(
        pool=pool,
        token_blocks=torch.tensor(token_blocks),
        token_offsets=position_ids % block_size,
        decode=_decode_batch(single) if single else None,
        chunks=chunks[len(single) :],
        announced=[chunk for chunk in chunks if chunk.announce],
        kv_written=kv_written,
    )
    token = current.set(batch)
    try:
        output = model(
            input_ids=torch.tensor([[t for s in sequences for t in s.token_ids]]),
            position_ids=position_ids[None],
            use_cache=False,
            logits_to_keep=torch.tensor(logit_rows, dtype=torch.int64),
        )
    finally:
        current.reset(token)
    logits: Tensor = output.logits[0]
    return logits.float()


def _decode_batch(chunks: Sequence[Chunk]) -> DecodeBatch:
    tables = torch.nn.utils.rnn.pad_sequence([chunk.block_table for chunk in chunks], batch_first=True)
    positions = torch.tensor([chunk.start for chunk in chunks])
    return DecodeBatch(num_sequences=len(chunks), block_tables=tables, positions=positions)
