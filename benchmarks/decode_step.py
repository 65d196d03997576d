"""A step like decode's: the matrix products of Llama-3.1-8B for a batch of 32, one CUDA graph bound by memory."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import torch
from torch import Tensor

_LAYERS, _HIDDEN, _QKV, _FEED = 32, 4096, 6144, 14336
_BATCH = 32
_WARM_UP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds from each step's end to the next one's: as a device loop sees it, and on the device."""

    host_s: list[float]
    device_s: list[float]


class Stepping:
    """Steps in a thread of their own, as an engine does. Args: device: "cpu" runs one small layer, without a graph."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        layers, scale = (_LAYERS, 1) if self._on_gpu else (1, 16)
        shapes = ((_HIDDEN, _QKV), (_HIDDEN, _HIDDEN), (_HIDDEN, 2 * _FEED), (_FEED, _HIDDEN))
        self._weights = [
            [
                torch.randn(rows // scale, columns // scale, dtype=torch.bfloat16, device=self._device) / rows**0.5
                for rows, columns in shapes
            ]
            for _ in range(layers)
        ]
        self._tokens = torch.randn(_BATCH, _HIDDEN // scale, dtype=torch.bfloat16, device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None

    async def measure(self, seconds: float) -> StepTimes:
        """Step for so long; what else the process does goes on."""
        return await asyncio.to_thread(self._run, seconds)

    def _run(self, seconds: float) -> StepTimes:
        if self._on_gpu:
            torch.cuda.set_device(self._device)
            if self._graph is None:
                self._graph = self._captured()
        host_s: list[float] = []
        device_s: list[float] = []
        until_s = time.perf_counter() + seconds
        before, running = self._launch(), self._launch()  # one ahead, as an engine does: the device waits for no thread
        ended_s = self._end(before)
        while time.perf_counter() < until_s or len(host_s) <= _WARM_UP:
            following = self._launch()
            began_s, ended_s = ended_s, self._end(running)
            host_s.append(ended_s - began_s)
            device_s.append(host_s[-1] if before is None or running is None else before.elapsed_time(running) / 1e3)
            before, running = running, following
        self._end(running)
        return StepTimes(host_s=host_s[_WARM_UP:], device_s=device_s[_WARM_UP:])

    def _launch(self) -> torch.cuda.Event | None:
        """Queue a step, behind those that are; its end, or None where it has ended already."""
        if self._graph is None:
            self._forward()
            return None
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._graph.replay()
        end.record()
        return end

    def _end(self, step: torch.cuda.Event | None) -> float:
        """When the host saw it end."""
        if step is not None:
            step.synchronize()
        return time.perf_counter()

    def _captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._forward()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Threads of transfers may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._forward()
        return graph

    def _forward(self) -> Tensor:
        x = self._tokens
        for qkv, out, gate_up, down in self._weights:
            x = x + (x @ qkv)[:, : out.shape[0]] @ out
            gate, up = (x @ gate_up).chunk(2, dim=-1)
            x = x + (gate * torch.sigmoid(up)) @ down
        return x
