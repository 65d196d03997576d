"""A worker and the health of its GPUs: what NVML would say is scripted here, what the worker does about it is real."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from splitserve.core.request import Request
from splitserve.engine.options import EngineOptions
from splitserve.prefill_worker.server import PrefillServer
from splitserve.proto import worker_pb2
from splitserve.proto.convert import request_to_proto
from splitserve.worker.device import DeviceState, NoDevices, NvmlReader, open_devices
from splitserve.worker.options import WorkerOptions

from .conftest import WAIT_S, session

SOUND = DeviceState(
    name="GPU under test",
    uuid="GPU-0",
    memory_used_bytes=1 << 30,
    memory_total_bytes=4 << 30,
    temperature_c=41.0,
    power_w=120.0,
    sm_clock_mhz=1980.0,
    throttle_reasons=("power_cap",),
    corrected_errors=3,
    uncorrected_errors=0,
    nvlinks=18,
    nvlinks_up=17,
)


class ScriptedDevices:
    """Tells what it was given last."""

    def __init__(self) -> None:
        self.states: Sequence[DeviceState] = (SOUND,)

    def read(self) -> Sequence[DeviceState]:
        return self.states


async def test_uncorrectable_errors_take_a_worker_out_of_service(
    stack: AsyncExitStack, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitserve.worker.host._HEALTH_PERIOD_S", 0.05)
    engine = EngineOptions(
        model=str(model_dir), dtype="float32", num_threads=1, num_kv_blocks=64, self_check=False, shared_pool=True
    )
    server = PrefillServer(WorkerOptions(engine=engine, role="prefill"))
    stack.push_async_callback(server.worker.stop)
    host = server.worker.host
    devices = host.devices = ScriptedDevices()
    end, *_ = await session(stack, server)
    health = health_pb2_grpc.HealthStub(end.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="splitserve.v1.PrefillWorker"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    (told,) = host.status().devices
    assert (told.name, told.nvlinks_up, list(told.throttle_reasons)) == ("GPU under test", 17, ["power_cap"])
    assert host.registry.get_sample_value("splitserve_gpu_power_watts", {"gpu": "GPU-0"}) == 120.0
    throttled = {"gpu": "GPU-0", "reason": "power_cap"}
    assert host.registry.get_sample_value("splitserve_gpu_throttled", throttled) == 1.0

    devices.states = (replace(SOUND, uncorrected_errors=2),)
    async with asyncio.timeout(WAIT_S):
        while (await watch.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
    assert "2 uncorrectable memory errors" in host.status().fault
    work = Request(request_id="r", prompt_token_ids=(1, 2, 3), max_tokens=2, timeout_s=60.0)
    grant = worker_pb2.RunPrefill(request=request_to_proto(work, 60.0))
    await end.send(run=grant)
    failed = await end.next("failed")
    assert (failed.failure.code, "out of service" in failed.failure.message) == ("unavailable", True)


def test_cpus_have_no_device_state() -> None:
    assert open_devices(torch.device("cpu")).read() == NoDevices().read() == ()


@pytest.mark.gpu
def test_nvml_tells_the_device_that_torch_computes_on() -> None:
    (state,) = NvmlReader(torch.device("cuda", 0)).read()
    assert state.name == torch.cuda.get_device_name(0)
    assert 0 < state.memory_used_bytes < state.memory_total_bytes
    assert 0 < state.temperature_c < 120
    assert state.power_w > 0
    assert state.sm_clock_mhz > 0
    assert state.nvlinks_up <= state.nvlinks
