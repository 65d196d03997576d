"""What does mutual TLS on every link cost? The same requests, in turn, to a plain split cluster and to one with TLS.

python -m splitserve.benchmarks.tls --requests 100
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..client import AsyncClient, Tls
from ..core.config import ClusterConfig, load_config
from ..deploy.certificates import ROLES, make_authority, make_certificate
from .processes import process_cluster
from .report import write_json

WARMUP = 5
ROUNDS = 5  # of each cluster, in turn, for the rate


def main(
    requests: Annotated[int, typer.Option(min=10, help="Requests to each cluster, one at a time.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, for the rate.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    model: Annotated[str | None, typer.Option(help="Model to serve.", show_default="a tiny random Llama")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """TTFT and time per token one at a time, and tokens a second of many, with KV over gRPC, without TLS and with it.

    $ python -m splitserve.benchmarks.tls --requests 100

    $ python -m splitserve.benchmarks.tls --model smollm2-135m --requests 20 --concurrency 4
    """
    asyncio.run(_main(requests, concurrency, prompt_tokens, output_tokens, model, seed, json_file))


async def _main(
    num_requests: int,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    model: str | None,
    seed: int,
    json_file: Path | None,
) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if model is None:
            from ..engine.testing import make_tiny_model

            model = str(make_tiny_model("llama", directory / "llama"))
        certificates = _certificates(directory / "certificates")
        async with (
            process_cluster(_config(model, None), directory / "plain") as plain,
            process_cluster(_config(model, certificates), directory / "tls") as secure,
            AsyncClient(plain.router.address) as plain_client,
            AsyncClient(secure.router.address, tls=_tls(certificates, "client")) as secure_client,
        ):
            clients = {"plain text": plain_client, "mutual TLS": secure_client}
            prompts = [[rng.randrange(5, 200) for _ in range(prompt_tokens)] for _ in range(num_requests + WARMUP)]
            ttft: dict[str, list[float]] = {name: [] for name in clients}
            per_token: dict[str, list[float]] = {name: [] for name in clients}
            rates: dict[str, list[float]] = {name: [] for name in clients}
            for number, prompt in enumerate(track(prompts, "one at a time")):
                for link, client in clients.items():
                    result = await client.generate(prompt, max_tokens=output_tokens, ignore_eos=True)
                    if number >= WARMUP:
                        times = result.token_times_s
                        ttft[link].append(times[0])
                        per_token[link].append((times[-1] - times[0]) / (output_tokens - 1))
            for _ in track(range(ROUNDS), f"{concurrency} at once"):
                for link, client in clients.items():
                    rates[link].append(await _rate(client, prompts, concurrency, output_tokens))
    Console().print(_table(ttft, per_token, rates, num_requests, concurrency))
    if json_file is not None:
        figures = {"ttft_s": ttft, "per_token_s": per_token, "tokens_per_s": rates}
        sizes = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "concurrency": concurrency}
        write_json(json_file, {**figures, **sizes, "model": model, "seed": seed, "warmup": WARMUP, "n": num_requests})


def _certificates(directory: Path) -> Path:
    make_authority(directory, days=1)
    for role in ROLES:
        make_certificate(directory, role, hosts=("127.0.0.1",), days=1)
    return directory


def _tls(directory: Path, role: str) -> Tls:
    return Tls(ca=directory / "ca.pem", cert=directory / f"{role}.pem", key=directory / f"{role}.key")


def _config(model: str, certificates: Path | None) -> ClusterConfig:
    options: dict[str, object] = {"model": model, "engine.prefix_cache": False, "engine.self_check": False}
    if certificates is not None:
        files = {"ca": "ca.pem", "cert": "{role}.pem", "key": "{role}.key"}
        options |= {f"security.{key}": str(certificates / file) for key, file in files.items()}
    return load_config(None, {**options, "transport": "grpc"})


async def _rate(client: AsyncClient, prompts: list[list[int]], concurrency: int, output_tokens: int) -> float:
    """Tokens of answers a second, with so many requests at once."""
    waiting = iter(prompts)

    async def send() -> None:
        for prompt in waiting:
            await client.generate(prompt, max_tokens=output_tokens, ignore_eos=True)

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(send())
    return len(prompts) * output_tokens / (time.perf_counter() - began_s)


def _table(
    ttft: dict[str, list[float]],
    per_token: dict[str, list[float]],
    rates: dict[str, list[float]],
    count: int,
    concurrency: int,
) -> Table:
    table = Table(title=f"n={count} one at a time; {concurrency} at once, the median of {ROUNDS} rounds")
    for column in ("", "TTFT ms p50", "p90", "ms a token p50", "p90", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for link in ttft:
        cells = [link]
        for rows in (ttft[link], per_token[link]):
            cells += [f"{1e3 * statistics.median(rows):.2f}", f"{1e3 * statistics.quantiles(rows, n=10)[8]:.2f}"]
        table.add_row(*cells, f"{statistics.median(rates[link]):.0f}")
    return table


if __name__ == "__main__":
    typer.run(main)
