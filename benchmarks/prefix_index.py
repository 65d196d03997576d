"""How much memory does the router's prefix index take, and how long does it look up a prompt?

python -m splitserve.benchmarks.prefix_index
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..core.kv_geometry import PREFIX_UNIT
from ..scheduling.prefix import prefix_hashes, prefix_namespace
from ..scheduling.prefix_feed import MAX_BLOCKS, PrefixChanges, block_key
from ..scheduling.prefix_index import PrefixIndex
from .report import write_json

_MAX_BYTES = 200e6  # of a million blocks
_MAX_LOOKUP_S = 50e-6  # of 128 blocks among them
_NUM_LOOKUPS = 5_000


def main(
    blocks: Annotated[int, typer.Option(min=1_000, help="Different blocks in the index.")] = 1_000_000,
    workers: Annotated[int, typer.Option(min=1, help="Workers that hold them.")] = 16,
    prompt_blocks: Annotated[int, typer.Option(min=1, help="Blocks of the prompt that is looked up.")] = 128,
    holders: Annotated[int, typer.Option(min=1, help="Workers that hold the beginning of each prompt.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Exit code 1 if a million blocks take more than 200 MB, or a lookup of 128 more than 50 us (median)."""
    rng = random.Random(0)
    tracemalloc.start()
    index = PrefixIndex()
    prompts = _fill(index, rng, blocks, workers, holders, prompt_blocks)
    num_bytes = tracemalloc.get_traced_memory()[0] - _size_of(prompts)
    tracemalloc.stop()

    lookup_s = []
    for _ in range(_NUM_LOOKUPS):
        fresh = [int(str(key)) for key in rng.choice(prompts)]  # the keys of a prompt were made a moment before
        lookup_s.append(_seconds(index.match, fresh))
    tokens = [rng.randrange(32_000) for _ in range(prompt_blocks * PREFIX_UNIT)]
    namespace = prefix_namespace(model_id="m", kv_dtype="bfloat16")
    hash_s = [_seconds(lambda: [block_key(h) for h in prefix_hashes(tokens, namespace)]) for _ in range(200)]
    news = PrefixChanges(number=1, restarts=True, added=[rng.getrandbits(64) for _ in range(MAX_BLOCKS)], removed=[])
    apply_s = _seconds(index.apply, "one more", news)

    figures = {
        "blocks": blocks,
        "workers": workers,
        "holders": holders,
        "prompt_blocks": prompt_blocks,
        "bytes": num_bytes,
        "lookup_s": [_at(lookup_s, share) for share in (0.5, 0.9, 0.99)],
        "hash_s": _at(hash_s, 0.5),
        "apply_s": apply_s,
    }
    table = Table(title=f"{len(index):,} blocks, {workers} workers, each prompt on {holders}", header_style="bold")
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("memory", f"{num_bytes / 1e6:,.0f} MB ({num_bytes / blocks:.0f} bytes a block)")
    p50, p90, p99 = (_at(lookup_s, share) * 1e6 for share in (0.5, 0.9, 0.99))
    table.add_row(f"lookup of {prompt_blocks} blocks, p50 / p90 / p99", f"{p50:.1f} / {p90:.1f} / {p99:.1f} us")
    table.add_row(f"hashing {len(tokens):,} tokens, all of them cached", f"{_at(hash_s, 0.5) * 1e6:.0f} us")
    table.add_row(f"taking in {MAX_BLOCKS:,} blocks, the largest message", f"{apply_s * 1e3:.1f} ms")
    Console().print(table)
    if json_file is not None:
        write_json(json_file, figures)
    scale = max(1.0, blocks / 1e6)
    slow = _at(lookup_s, 0.5) > _MAX_LOOKUP_S * max(1.0, prompt_blocks / 128)
    raise typer.Exit(int(num_bytes > _MAX_BYTES * scale or slow))


def _fill(
    index: PrefixIndex, rng: random.Random, blocks: int, workers: int, holders: int, prompt_blocks: int
) -> list[list[int]]:
    """Prompts of equal length until there are so many blocks, each held by one worker, and its beginning by others."""
    prompts = []
    numbers = [1] * workers
    for worker in range(workers):
        index.apply(f"worker-{worker}", PrefixChanges(number=1, restarts=True, added=(), removed=()))
    for _ in range(max(1, blocks // prompt_blocks)):
        prompt = [rng.getrandbits(64) for _ in range(prompt_blocks)]
        prompts.append(prompt)
        for place, worker in enumerate(rng.sample(range(workers), holders)):
            numbers[worker] += 1
            length = rng.randint(1, prompt_blocks) if place else prompt_blocks
            # As off the wire: equal numbers, but not the same objects as in other messages.
            told = [int(str(key)) for key in prompt[:length]]
            index.apply(
                f"worker-{worker}", PrefixChanges(number=numbers[worker], restarts=False, added=told, removed=())
            )
    return prompts


def _size_of(prompts: list[list[int]]) -> int:
    return sum(prompt.__sizeof__() + sum(key.__sizeof__() for key in prompt) for prompt in prompts)


def _seconds(call: Callable[..., object], *args: object) -> float:
    started_s = time.perf_counter()
    call(*args)
    return time.perf_counter() - started_s


def _at(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


if __name__ == "__main__":
    typer.run(main)
