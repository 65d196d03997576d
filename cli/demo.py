"""`splitserve demo`: a small cluster on Ray answers eight prompts at once, and shows where each request's time went."""

from __future__ import annotations

import asyncio
import signal
import time
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from ..client import AsyncClient, GenerationResult, Message
from ..core.config import ClusterConfig, load_config
from ..core.errors import SplitserveError
from ..deploy.ray_environment import prepare_ray_environment
from .background import continue_in_own_session

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.members import ClusterView

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about the sea.",
    "Name three primary colours.",
    "How do I boil an egg? Be brief.",
    "Translate 'good morning' into Spanish.",
    "What does a CPU cache do? Answer in one sentence.",
    "Tell me a fun fact about octopuses.",
)
_RECOMPUTED = "splitserve_decode_recomputed_prompt_tokens_total"


def command(
    model: Annotated[
        str | None, typer.Option(help="Directory, .gguf file, hub id or built-in name.", show_default="smollm2-135m")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 48,
    timeout: Annotated[float, typer.Option(help="Seconds for the cluster to start, and for the answers.")] = 300.0,
) -> None:
    """Start 1 prefill and 1 decode worker on Ray, stream eight answers through the SDK, show the timings, stop.

    Exits 0 only if every answer came through the split path: its KV was moved, and nothing was computed twice.

    $ splitserve demo
    """
    config = load_config(None, {"model": model, "router.port": 0, "startup_timeout_s": timeout})
    continue_in_own_session()
    prepare_ray_environment(None)
    from ..deploy.cluster import cluster_ray
    from ..deploy.members import MemberFailed

    console = Console(highlight=False)
    with console.status("starting Ray") as status, cluster_ray(config):
        status.update("starting 1 router, 1 prefill worker and 1 decode worker")
        try:
            problems = asyncio.run(_run(config, console, status.stop, max_tokens, timeout))
        except MemberFailed as error:
            console.print(error.log_tail, markup=False)
            raise
    console.print("everything has stopped")
    if problems:
        raise SplitserveError("; ".join(problems))


async def _run(
    config: ClusterConfig, console: Console, started: Callable[[], None], max_tokens: int, timeout_s: float
) -> list[str]:
    """Returns what was wrong."""
    from ..deploy.cluster import new_log_dir, running_cluster

    begun = time.monotonic()
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with running_cluster(config, new_log_dir(config)) as controller:
        await controller.ready.wait()
        started()
        address = controller.view().router_addresses[0]
        console.print(
            f"ready in {time.monotonic() - begun:.1f} s at {address}; asking {len(PROMPTS)} questions at once\n"
        )
        async with AsyncClient(address, timeout_s=timeout_s) as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(_answer(client, console, prompt, max_tokens)) for prompt in PROMPTS]
        results = [task.result() for task in tasks]
        console.print(_table(results))
        recomputed = await asyncio.to_thread(_recomputed_tokens, controller.view())
    return _problems(results, recomputed)


async def _answer(client: AsyncClient, console: Console, prompt: str, max_tokens: int) -> GenerationResult:
    """Answers run side by side, so each is printed whole when its stream ends."""
    async with client.stream([Message(role="user", content=prompt)], max_tokens=max_tokens) as stream:
        text = "".join([chunk.text async for chunk in stream])
        result = await stream.result()
    console.print(f"[bold]{prompt}[/]")
    console.print(text.strip() + "\n", markup=False)
    return result


def _table(results: list[GenerationResult]) -> Table:
    table = Table(title="Where the time went (ms)", title_justify="left", header_style="bold", box=None)
    table.padding, table.pad_edge = (0, 1, 0, 0), False  # fits 80 columns
    for title in ("in", "out", "TTFT", "TPOT", "KV bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("transport", no_wrap=True)
    table.add_column("exposed", justify="right", no_wrap=True)
    table.add_column("prefill on", no_wrap=True)
    table.add_column("decode on", no_wrap=True)
    for result in results:
        usage, timing = result.usage, result.timing
        table.add_row(
            *(str(usage.num_prompt_tokens), str(usage.num_output_tokens)),
            *(_milliseconds(result.ttft_s), _milliseconds(result.tpot_s), f"{timing.kv_bytes:,}"),
            *(timing.transport, _milliseconds(timing.transfer_exposed_s)),
            *(timing.prefill_worker, timing.decode_worker),
        )
    return table


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.1f}"


def _problems(results: list[GenerationResult], recomputed: float) -> list[str]:
    """What must not happen on the normal path."""
    found = []
    for prompt, result in zip(PROMPTS, results, strict=True):
        if not result.text.strip():
            found.append(f"the answer to {prompt!r} is empty")
        if result.timing.transport == "none":
            found.append(f"no KV was moved for {prompt!r}")
    if recomputed:
        found.append(f"decode workers computed {recomputed:.0f} prompt tokens again")
    return found


def _recomputed_tokens(view: ClusterView) -> float:
    """Prompt tokens that decode workers computed although their KV should have come."""
    total = 0.0
    for member in view.members:
        if member.role == "decode" and member.endpoint is not None:
            with urllib.request.urlopen(f"http://{member.endpoint.metrics_address}/metrics", timeout=5) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
            values = [s.value for family in families for s in family.samples if s.name == _RECOMPUTED]
            if not values:
                raise SplitserveError(f"{member.name} does not export {_RECOMPUTED}")
            total += sum(values)
    return total
