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
    """Seconds of each step: as a device loop sees it, and between two events on the device."""

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
        number = 0
        while time.perf_counter() < until_s or number <= _WARM_UP:
            began_s = time.perf_counter()
            on_device_s = self._step()
            number += 1
            if number > _WARM_UP:
                host_s.append(time.perf_counter() - began_s)
                device_s.append(on_device_s or host_s[-1])
        return StepTimes(host_s=host_s, device_s=device_s)

    def _step(self) -> float:
        """Seconds between its events on the device; 0 without one."""
        if self._graph is None:
            self._forward()
            return 0.0
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

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
