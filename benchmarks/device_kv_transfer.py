"""How fast does KV move between two GPUs, and does a decode step notice? Each transport beside the limits of the run.

`python -m splitserve.benchmarks.kv_transfer --device cuda` runs this: two processes, a GPU each, KV of the
Llama-3.1-8B shape in scattered blocks of 16 tokens. Packing, unpacking and checksums are part of every figure.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import grpc.aio
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..client.load import percentile
from ..core.kv_geometry import KvGeometry, LayerGeometry
from ..core.request import Request
from ..engine.pool import KvPool
from ..kv_transfer import framing
from ..kv_transfer.channel import Channel, Rendezvous
from ..kv_transfer.fetching import Received
from ..kv_transfer.grants import Grant, KvSource
from ..kv_transfer.identity import WorkerIdentity, current_host_id
from ..kv_transfer.receiver import KvReceiver
from ..kv_transfer.sender import KvSender
from ..proto.rpc import SERVER_OPTIONS
from ..proto.server import run as run_role
from .decode_step import Stepping, StepTimes
from .report import write_json

PREFILL_BOOT = "benchmark"
BLOCK_SIZE = 16
WARM_UP = 2
LLAMA_8B = KvGeometry(
    model_id="llama-3.1-8b",
    layers=(LayerGeometry(num_kv_heads=8, key_dim=128, value_dim=128),) * 32,
    dtype="bfloat16",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What both processes are to do."""

    ways: tuple[str, ...]
    sizes: tuple[int, ...]  # tokens of one transfer
    rounds: int
    in_flight: int  # transfers at a time, of the sustained figure
    devices: tuple[str, str] = ("cuda:0", "cuda:1")
    geometry: KvGeometry = LLAMA_8B
    step_seconds: float = 0.0  # of steps beside each transport; 0: none are measured
    max_ctas: int | None = None
    frame_bytes: int | None = None  # of NCCL

    @property
    def num_blocks(self) -> int:
        return self.in_flight * -(-max(self.sizes) // BLOCK_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """One transport and size; seconds of each round."""

    way: str
    num_bytes: int
    seconds: list[float]  # one transfer at a time, from the call of receive() to verified KV
    stream_seconds: list[float]  # the same, from its first frame
    sustained_seconds: list[float]  # per transfer, with several in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All that a run found."""

    connect_s: dict[str, list[float]]  # by way: the first transfer of one block to each of some new receivers
    limits: dict[str, dict[int, list[float]]]  # by name and size in bytes: seconds
    moved: list[Moved]
    steps: dict[str, StepTimes] = field(default_factory=dict)  # by what ran beside them
    beside_bytes_per_s: dict[str, float] = field(default_factory=dict)


def run(plan: Plan, json_file: Path | None) -> Figures:
    """Measure, print, write."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    sender = spawn.Process(target=_sender, args=(theirs, plan), daemon=True)
    sender.start()
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as receiver:
            figures = receiver.submit(_receiver, ours, plan).result()
    finally:
        sender.terminate()
        sender.join()
    _print(figures, plan)
    if json_file is not None:
        device = torch.cuda.get_device_name(plan.devices[1]) if plan.devices[1] != "cpu" else "cpu"
        said = {name: value for name, value in asdict(plan).items() if name != "geometry"}
        write_json(json_file, {"plan": said, "warm_up": WARM_UP, **asdict(figures)}, device=device)
    return figures


# -- the prefill side --


def _sender(control: Connection, plan: Plan) -> None:
    run_role(_serve(control, plan))


async def _serve(control: Connection, plan: Plan) -> None:
    """Whatever is asked for was computed long ago."""
    pool = _pool(plan, 0)
    identity = WorkerIdentity(worker_id="prefill", boot_id=PREFILL_BOOT, host_id=current_host_id())
    sender = KvSender(pool, identity, release=lambda _: None)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    sender.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel: Channel | None = None
    control.send(f"127.0.0.1:{port}")
    while (asked := await asyncio.to_thread(control.recv)) is not None:
        if isinstance(asked, Grant):
            table = torch.randperm(pool.num_blocks).tolist()
            sender.offer(asked, range(asked.num_tokens), partial(_table, table))
            sender.kv_written(asked.request_id, 0, pool.geometry.num_layers, 0, asked.num_tokens)
            sender.finish(asked.request_id, 0, final=False)
            control.send("ready")
        elif asked == "channel":
            meeting = _raw_rendezvous(plan, 0).invite()
            control.send(meeting.invitation)
            channel = await asyncio.to_thread(meeting.join)
        else:
            assert channel is not None
            control.send("posted")
            await asyncio.to_thread(_move, channel, pool.rows.view(-1)[:asked], is_send=True)
    await sender.close()
    await server.stop(0)
    if channel is not None:
        await asyncio.to_thread(channel.close)


def _table(table: list[int], _: str) -> list[int]:
    return table


# -- the decode side --


def _receiver(control: Connection, plan: Plan) -> Figures:
    return run_role(_measure(control, plan))


class _Link:
    """Asks the other process for transfers."""

    def __init__(self, control: Connection, plan: Plan, pool: KvPool) -> None:
        self._control = control
        self._pool = pool
        self._plan = plan
        self._address: str = control.recv()
        blocks = torch.randperm(pool.num_blocks).tolist()
        each = pool.num_blocks // plan.in_flight
        self._asking = asyncio.Lock()
        self._longest = tuple(range(max(plan.sizes)))
        self._blocks = [blocks[n * each : (n + 1) * each] for n in range(plan.in_flight)]
        self._orders: dict[str, list[int]] = {}  # of the blocks of each transfer that was prepared

    @asynccontextmanager
    async def receiver(self, way: str) -> AsyncIterator[KvReceiver]:
        """A decode worker that the prefill worker has not heard of."""
        identity = WorkerIdentity(worker_id="decode", boot_id=secrets.token_hex(8), host_id=current_host_id())
        receiver = KvReceiver(self._pool, identity, transports=[way])
        try:
            yield receiver
        finally:
            await receiver.close()

    async def prepare(self, receiver: KvReceiver, num_tokens: int) -> Grant:
        """A transfer whose KV the other process has."""
        request = Request(request_id=secrets.token_hex(8), prompt_token_ids=self._prompt(num_tokens), max_tokens=1)
        source = KvSource(address=self._address, boot_id=PREFILL_BOOT)
        grant = receiver.make_grant(request, source, receiver.choose_wire(source, num_tokens), 0)
        self._orders[grant.grant_id] = torch.randperm(len(self._blocks[0])).tolist()  # no two prompts lie alike
        async with self._asking:
            await asyncio.to_thread(self._offer, grant)
        return grant

    async def move(self, receiver: KvReceiver, way: str, grant: Grant, slot: int = 0) -> tuple[float, Received]:
        """Seconds from the call of receive() to verified KV in our blocks."""
        blocks = self._blocks[slot]
        table = [blocks[index] for index in self._orders.pop(grant.grant_id)]
        prompt = self._prompt(grant.num_tokens)
        began_s = time.perf_counter()
        received = await receiver.receive(grant, self._address, prompt, table)
        seconds = time.perf_counter() - began_s
        assert received.transport == way, f"{received.transport} was taken, {way} was to be measured"
        await receiver.commit(grant, self._address, received)
        return seconds, received

    async def sustained(self, receiver: KvReceiver, way: str, num_tokens: int, count: int) -> float:
        """Seconds a transfer of `count`, some of them in flight at any time."""
        grants = iter([await self.prepare(receiver, num_tokens) for _ in range(count)])

        async def keep_one_going(slot: int) -> None:
            for grant in grants:
                await self.move(receiver, way, grant, slot)

        began_s = time.perf_counter()
        await asyncio.gather(*(keep_one_going(slot) for slot in range(self._plan.in_flight)))
        return (time.perf_counter() - began_s) / count

    def _offer(self, grant: Grant) -> None:
        self._control.send(grant)
        self._control.recv()

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        return self._longest[:num_tokens]


async def _measure(control: Connection, plan: Plan) -> Figures:
    pool = _pool(plan, 1)
    link = _Link(control, plan, pool)
    figures = Figures(connect_s={}, limits=await _limits(control, plan, pool), moved=[])
    for way in plan.ways:
        figures.connect_s[way] = []
        for _ in range(4):  # the first one of the process also loads libraries
            async with link.receiver(way) as receiver:
                grant = await link.prepare(receiver, BLOCK_SIZE)
                figures.connect_s[way].append((await link.move(receiver, way, grant))[0])
        async with link.receiver(way) as receiver:
            for num_tokens in plan.sizes:
                figures.moved.append(await _moved(link, receiver, way, num_tokens, plan))
    if plan.step_seconds:
        await _beside_steps(link, plan, figures)
    control.send(None)
    return figures


async def _moved(link: _Link, receiver: KvReceiver, way: str, num_tokens: int, plan: Plan) -> Moved:
    num_bytes = num_tokens * plan.geometry.bytes_per_token
    alone: list[tuple[float, Received]] = []
    for number in track(range(plan.rounds + WARM_UP), f"{way}, {num_bytes / 2**20:.0f} MiB"):
        took = await link.move(receiver, way, await link.prepare(receiver, num_tokens))
        if number >= WARM_UP:
            alone.append(took)
    await link.sustained(receiver, way, num_tokens, plan.in_flight)  # memory for as many
    count = 4 * plan.in_flight
    return Moved(
        way=way,
        num_bytes=num_bytes,
        seconds=[seconds for seconds, _ in alone],
        stream_seconds=[received.transfer_s for _, received in alone],
        sustained_seconds=[await link.sustained(receiver, way, num_tokens, count) for _ in range(plan.rounds)],
    )


async def _limits(control: Connection, plan: Plan, pool: KvPool) -> dict[str, dict[int, list[float]]]:
    """What the machine can do: one contiguous copy by the copy engines, one contiguous message."""
    sizes = [num_tokens * plan.geometry.bytes_per_token for num_tokens in plan.sizes]
    on_gpus = plan.devices[0] != "cpu"
    name, message = ("peer copy", "NCCL, contiguous") if on_gpus else ("copy", "gloo, contiguous")
    source = torch.empty(max(sizes), dtype=torch.uint8, device=plan.devices[0])
    target = pool.rows.view(-1)
    found: dict[str, dict[int, list[float]]] = {name: {}}
    for size in sizes:
        found[name][size] = [_copy_s(source[:size], target[:size]) for _ in range(plan.rounds + WARM_UP)][WARM_UP:]
    if ("nccl" if on_gpus else "gloo") not in plan.ways:
        return found
    found[message] = {}
    control.send("channel")
    invitation = control.recv()
    channel = await asyncio.to_thread(_raw_rendezvous(plan, 1).accept, "127.0.0.1", invitation)
    for size in sizes:
        times = []
        for _ in range(plan.rounds + WARM_UP):
            control.send(size)
            control.recv()
            await asyncio.sleep(0.002)  # posted there by now; if not, the figure only gets worse
            began_s = time.perf_counter()
            await asyncio.to_thread(_move, channel, target[:size], is_send=False)
            times.append(time.perf_counter() - began_s)
        found[message][size] = times[WARM_UP:]
    await asyncio.to_thread(channel.close)
    return found


def _move(channel: Channel, data: torch.Tensor, *, is_send: bool) -> None:
    channel.wait(channel.post(data, is_send=is_send))


def _copy_s(source: torch.Tensor, target: torch.Tensor) -> float:
    if source.device.type == "cpu":
        began_s = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(target.device):
        torch.cuda.synchronize()
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


async def _beside_steps(link: _Link, plan: Plan, figures: Figures) -> None:
    """Steps alone and with transfers that come in as fast as they can, in the process that steps."""
    num_tokens = min(plan.sizes, key=lambda size: abs(size * plan.geometry.bytes_per_token - (256 << 20)))
    stepping = Stepping(plan.devices[1])
    figures.steps["nothing"] = await stepping.measure(plan.step_seconds)
    for way in plan.ways:
        async with link.receiver(way) as receiver:
            await link.sustained(receiver, way, num_tokens, plan.in_flight)
            over = asyncio.Event()

            async def keep_one_going(slot: int, receiver: KvReceiver = receiver, way: str = way) -> int:
                number = 0
                while not over.is_set():  # noqa: B023
                    await link.move(receiver, way, await link.prepare(receiver, num_tokens), slot)
                    number += 1
                return number

            began_s = time.perf_counter()
            moving = [asyncio.ensure_future(keep_one_going(slot)) for slot in range(plan.in_flight)]
            figures.steps[way] = await stepping.measure(plan.step_seconds)
            seconds = time.perf_counter() - began_s
            over.set()
            count = sum(await asyncio.gather(*moving))
            figures.beside_bytes_per_s[way] = count * num_tokens * plan.geometry.bytes_per_token / seconds
    figures.steps["nothing, again"] = await stepping.measure(plan.step_seconds)


# -- both --


def _pool(plan: Plan, side: int) -> KvPool:
    if plan.max_ctas is not None or plan.frame_bytes is not None:
        from ..kv_transfer import nccl

        nccl.MAX_CTAS = plan.max_ctas or nccl.MAX_CTAS
        framing.NCCL_FRAME_BYTES = plan.frame_bytes or framing.NCCL_FRAME_BYTES
    torch.manual_seed(side)
    device = torch.device(plan.devices[side])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    pool = KvPool(plan.geometry, num_blocks=plan.num_blocks, block_size=BLOCK_SIZE, shared=True, device=device)
    pool.elements.normal_()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return pool


def _raw_rendezvous(plan: Plan, side: int) -> Rendezvous:
    if plan.devices[side] == "cpu":
        from ..kv_transfer.gloo import GlooRendezvous

        return GlooRendezvous(set_up_s=60.0, stall_s=60.0)
    from ..kv_transfer.nccl import NcclRendezvous

    return NcclRendezvous(torch.device(plan.devices[side]), set_up_s=60.0, stall_s=60.0, max_ctas=32)


def _print(figures: Figures, plan: Plan) -> None:
    console = Console(width=130)
    limits = {
        name: {size: statistics.median(times) for size, times in by_size.items()}
        for name, by_size in figures.limits.items()
    }
    for num_tokens in plan.sizes:
        size = num_tokens * plan.geometry.bytes_per_token
        table = Table(title=f"{size / 2**20:.0f} MiB, {num_tokens} tokens in scattered blocks; GB/s, n={plan.rounds}")
        for column in (
            "",
            f"{plan.in_flight} in flight",
            "alone",
            "alone, from 1st frame",
            *(f"x {n}" for n in limits),
        ):
            table.add_column(column, justify="right" if column else "left")
        for name, by_size in limits.items():
            table.add_row(name, f"{size / by_size[size] / 1e9:.1f}")
        for row in figures.moved:
            if row.num_bytes == size:
                p50 = [statistics.median(t) for t in (row.sustained_seconds, row.seconds, row.stream_seconds)]
                ratios = [f"{by_size[size] / p50[0]:.2f}" for by_size in limits.values()]
                table.add_row(row.way, *(f"{size / seconds / 1e9:.1f}" for seconds in p50), *ratios)
        console.print(table)
    table = Table(title="first transfer of one block to a receiver, set-up included; s")
    for column in ("", "first of the processes", "later ones, median"):
        table.add_column(column)
    for way, (first, *later) in figures.connect_s.items():
        table.add_row(way, f"{first:.3f}", f"{statistics.median(later):.3f}")
    console.print(table)
    if figures.steps:
        _print_steps(console, figures)


def _print_steps(console: Console, figures: Figures) -> None:
    alone = figures.steps["nothing"]
    table = Table(title="a decode-like step beside a saturating incoming transfer; ms")
    for column in ("beside", "host p50", "host p99", "device p50", "device p99", "device p99 vs alone", "GB/s"):
        table.add_column(column, justify="left" if column == "beside" else "right")
    for name, times in figures.steps.items():
        p99 = percentile(times.device_s, 99) / percentile(alone.device_s, 99)
        table.add_row(
            name,
            *(f"{1e3 * percentile(t, q):.3f}" for t in (times.host_s, times.device_s) for q in (50, 99)),
            f"{100 * (p99 - 1):+.1f} %",
            f"{figures.beside_bytes_per_s.get(name, 0.0) / 1e9:.1f}",
        )
    console.print(table)


def plan_of(
    mib: Sequence[int],
    rounds: int,
    ways: Sequence[str],
    in_flight: int,
    step_seconds: float,
    gpus: tuple[int, int],
    **tuning: int | None,
) -> Plan:
    """Args: mib: sizes of a transfer. gpus: of prefill and decode side."""
    sizes = tuple((number << 20) // LLAMA_8B.bytes_per_token for number in mib)
    plan = Plan(
        ways=tuple(ways),
        sizes=sizes,
        rounds=rounds,
        in_flight=in_flight,
        devices=(f"cuda:{gpus[0]}", f"cuda:{gpus[1]}"),
        step_seconds=step_seconds,
    )
    return replace(plan, **tuning)  # type: ignore[arg-type]
