"""The overload benchmark on real processes: 1 prefill and 1 decode worker, and two routers before the same workers.

One router refuses by prediction, the other queues; they are used in turn. The client is a process's own too: this one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..client import AsyncClient
from ..client.load import NO_RETRY, RequestRecord, run_load
from ..client.workload import random_workload
from ..core.config import ClusterConfig, load_config
from ..core.errors import SplitserveError
from ..deploy.process import RoleProcess, StartFailure
from ..deploy.roles import role_command, role_environment
from .overload_runs import BURST_END_S, BURST_FROM_S, Measured, Outcome, burst_times, count, poisson_times
from .processes import ProcessCluster, process_cluster

TTFT_S, TPOT_S = 2.0, 0.5  # the service level
INPUT_LEN, OUTPUT_LEN = 64, 8  # short, so that a run of seconds has enough requests to tell its parts apart
TIMEOUT_S = 30.0
BASE_LOAD = 0.5  # of the capacity, before and after the burst
TRIAL_S = 12.0  # of each rate that may be the capacity
MAX_TRIALS = 6
QUEUE = "queue of 256"
STEP = 0.8  # from one such rate to the next

console = Console(stderr=True)


async def run(model: str, seconds: float, seed: int) -> tuple[float, dict[str, dict[str, Measured]], str]:
    """Capacity, the runs by traffic and policy, and what was measured."""
    common: dict[str, object] = {"model": model, "engine.prefix_cache": False, "engine.self_check": False}
    refuse = {**common, "router.ttft_target_s": TTFT_S, "router.tpot_target_s": TPOT_S}
    queue = load_config(None, {**common, "router.admission": "queue"})
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        async with process_cluster(load_config(None, refuse), logs) as cluster:
            second = RoleProcess(logs / "router-queue.log")
            try:
                addresses = {"refuse": cluster.router.address, QUEUE: await _start(second, queue, cluster)}
                return await _measure(addresses, seconds, seed, model)
            finally:
                await second.stop(2.0)


async def _start(process: RoleProcess, config: ClusterConfig, cluster: ProcessCluster) -> str:
    """A further router before the same workers; its address."""
    command = [*role_command(config, "router", name="queue", host="127.0.0.1", port=0, num_threads=1)]
    for name, worker in cluster.workers.items():
        command += ["--prefill" if name.startswith("prefill") else "--decode", worker.address]
    started = await process.start(command, role_environment(1), config.startup_timeout_s)
    if isinstance(started, StartFailure):
        raise SplitserveError(f"{started.message}\n{started.log_tail}")
    return started.address


async def _measure(
    addresses: dict[str, str], seconds: float, seed: int, model: str
) -> tuple[float, dict[str, dict[str, Measured]], str]:
    for address in addresses.values():  # both know their workers, and these have computed something
        async with AsyncClient(address) as client:
            await client.generate([1] * INPUT_LEN, max_tokens=OUTPUT_LEN, ignore_eos=True)
    rate = await _capacity(addresses["refuse"], await _saturated_rate(addresses[QUEUE], seed), seconds, seed)
    traffic = {
        "capacity": (poisson_times(rate, seconds, seed + 1), 0.0, seconds),
        "2x capacity": (poisson_times(2 * rate, seconds, seed + 1), 0.0, seconds),
        "10x burst": (burst_times(BASE_LOAD * rate, seed), BURST_FROM_S, BURST_END_S),
    }
    rows: dict[str, dict[str, Measured]] = {}
    for name, (times, start, end) in traffic.items():
        rows[name] = {}
        for policy, address in addresses.items():
            rows[name][policy] = count(await _send(address, times, seed), start, end)
            console.print(f"{name}, {policy}: {rows[name][policy]}")
    title = f"1P1D, {model}, a core each, {INPUT_LEN} tokens in, {OUTPUT_LEN} out, TTFT {TTFT_S:g} s, TPOT {TPOT_S:g} s"
    return rate, rows, title


async def _capacity(address: str, rate: float, seconds: float, seed: int) -> float:
    """The highest rate, from `rate` downwards, at which 90 % meet the service level.

    Twice: some seconds are too short for a queue to build up in each of them, and as long as what is measured after it.
    """
    console.print(f"saturated: {rate:.2f} requests/s")
    for _ in range(MAX_TRIALS):
        for trial, trial_s in enumerate((TRIAL_S, seconds)):
            times = poisson_times(rate, trial_s, seed + 100 * trial)
            found = count(await _send(address, times, seed), 0.0, trial_s)
            console.print(f"{rate:.2f} requests/s for {trial_s:g} s: {found.met:.3f} met")
            if found.met < 0.9:
                break
        else:
            return rate
        rate *= STEP
    raise SplitserveError(
        f"at {rate / STEP:.2f} requests/s {found.met:.3f} of the requests meet the service level, wanted 0.9; "
        "the machine is too slow or too busy for it"
    )


async def _saturated_rate(address: str, seed: int) -> float:
    """What comes out with always some requests open; of the second half, when workers know their speed."""
    num_requests = 32
    workload = random_workload(
        iter([0.0] * num_requests),
        num_requests=num_requests,
        input_len=INPUT_LEN,
        output_len=OUTPUT_LEN,
        seed=seed,
    )
    async with AsyncClient(address, retry=NO_RETRY) as client:
        (served,) = await client.models()
        records = await run_load(client, workload.make(served), {"timeout_s": TIMEOUT_S}, concurrency=3)
    ends = sorted(record.ended_s for record in records if record.error is None)
    if len(ends) < num_requests / 2:
        raise SplitserveError(f"{num_requests - len(ends)} of {num_requests} requests failed: {records[-1].message}")
    half = len(ends) // 2
    return (len(ends) - half) / (ends[-1] - ends[half - 1])


async def _send(address: str, times: Sequence[float], seed: int) -> list[Outcome]:
    workload = random_workload(
        iter(times), num_requests=len(times), input_len=INPUT_LEN, output_len=OUTPUT_LEN, seed=seed
    )
    async with AsyncClient(address, retry=NO_RETRY) as client:
        (served,) = await client.models()
        requests = list(workload.make(served))  # before the clock starts
        records = await run_load(client, requests, {"timeout_s": TIMEOUT_S})
    return [_outcome(record) for record in records]


def _outcome(record: RequestRecord) -> Outcome:
    ttft_s, tpot_s = record.ttft_s, record.tpot_s
    late = ttft_s is None or ttft_s > TTFT_S or (tpot_s is not None and tpot_s > TPOT_S)
    return Outcome(
        arrival_s=record.scheduled_s,
        met=record.error is None and not late,
        refused=record.error == "overloaded",
        ttft_s=ttft_s if ttft_s is not None else float("inf"),
    )
