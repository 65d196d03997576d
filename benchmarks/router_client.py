"""One client process of the router benchmark: keeps so many requests open, and counts what comes.

Thinner than the SDK, which would be measured too.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Annotated, Any

import grpc.aio
import typer

from ..proto import inference_pb2, inference_pb2_grpc
from ..proto.rpc import CHANNEL_OPTIONS
from ..proto.server import run


def main(
    address: Annotated[str, typer.Option(help="Router.")],
    concurrency: Annotated[int, typer.Option(help="Requests to keep open.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")],
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")],
    seconds: Annotated[float, typer.Option(help="How long to send.")],
) -> None:
    """Prints one JSON object: requests and tokens per tenth of a second of the host's monotonic clock, latencies."""
    run(_main(address, concurrency, prompt_tokens, output_tokens, seconds))


async def _main(address: str, concurrency: int, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[65 + index % 26 for index in range(prompt_tokens)]),
        max_tokens=output_tokens,
        ignore_eos=True,
    )
    counts: dict[int, list[int]] = {}  # tenth of a second -> requests ended, tokens
    latencies_s: list[float] = []
    until = time.monotonic() + seconds

    async def keep_asking(stub: Any) -> None:
        while (began := time.monotonic()) < until:
            async for message in stub.Generate(request):
                if num_tokens := len(message.tokens.token_ids):
                    counts.setdefault(int(time.monotonic() * 10), [0, 0])[1] += num_tokens
            counts.setdefault(int(time.monotonic() * 10), [0, 0])[0] += 1
            latencies_s.append(time.monotonic() - began)

    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        await asyncio.gather(*(keep_asking(stub) for _ in range(concurrency)))
    json.dump({"counts": counts, "latencies_s": latencies_s}, sys.stdout)


if __name__ == "__main__":
    typer.run(main)
