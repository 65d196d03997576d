"""One client process of a load: its share of a Poisson stream, every request's times as JSON lines.

Started by other benchmarks, several at once: one Python process reads some thousand messages a second, a router sends
more. The sum of independent Poisson streams is a Poisson stream.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ..client import AsyncClient
from ..client.load import NO_RETRY, run_load
from ..client.workload import poisson_arrivals, random_workload
from ..proto.server import run as run_on_uvloop


def main(
    address: Annotated[str, typer.Option(help="Router.")],
    rate: Annotated[float, typer.Option(help="Requests a second of this process.")],
    seconds: Annotated[float, typer.Option(help="How long to send.")],
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")],
    output_len: Annotated[int, typer.Option(help="Answer tokens.")],
    start_at: Annotated[float, typer.Option(help="Start at this time of the host's monotonic clock.")],
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")],
    out: Annotated[Path, typer.Option(help="JSON lines: one object a request.")],
) -> None:
    """Send and record."""
    run_on_uvloop(_main(address, rate, seconds, input_len, output_len, start_at, seed, out))


async def _main(
    address: str, rate: float, seconds: float, input_len: int, output_len: int, start_at: float, seed: int, out: Path
) -> None:
    arrivals = poisson_arrivals(rate, seed)
    times = []
    while (at_s := next(arrivals)) < seconds:
        times.append(at_s)
    workload = random_workload(
        iter(times), num_requests=len(times), input_len=input_len, output_len=output_len, seed=seed
    )
    async with AsyncClient(address, retry=NO_RETRY) as client:
        (model,) = await client.models()
        requests = list(workload.make(model))  # before the clock starts: making a prompt takes milliseconds
        gc.freeze()  # looking through them would hold up a token that has come
        await asyncio.sleep(max(0.0, start_at - time.monotonic()))
        records = await run_load(client, requests, {"timeout_s": 600.0})
    with out.open("w", encoding="utf-8") as file:
        for record in records:
            row = {
                "scheduled_s": record.scheduled_s,
                "sent_s": record.sent_s,
                "token_times_s": record.token_times_s,
                "error": record.error,
                "prefill_s": record.prefill_s,
                "exposed_s": record.transfer_exposed_s,
                "transport": record.transport,
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
