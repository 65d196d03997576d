"""The GPUs under a worker as NVML sees them: memory, heat, power, clocks, errors, NVLink."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean "slower than asked for".
THROTTLE_REASONS = {
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x20: "thermal_software",
    0x40: "thermal_hardware",
    0x80: "power_brake",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """One GPU at one moment; a value that the device does not tell is 0."""

    name: str
    uuid: str
    memory_used_bytes: int
    memory_total_bytes: int
    temperature_c: float
    power_w: float
    sm_clock_mhz: float
    throttle_reasons: tuple[str, ...]
    corrected_errors: int  # ECC errors of all its memories since its last reset
    uncorrected_errors: int
    nvlinks: int  # that it has
    nvlinks_up: int

    @property
    def fault(self) -> str:
        """Why nothing that it computes can be trusted; empty when it can."""
        if not self.uncorrected_errors:
            return ""
        return (
            f"{self.name} ({self.uuid}) has {self.uncorrected_errors} uncorrectable memory errors since its last "
            "reset; reset it (nvidia-smi --gpu-reset) or take it out of the machine"
        )


class DeviceReader(Protocol):
    """Reads the GPUs of one worker; callable from any thread, takes milliseconds."""

    def read(self) -> Sequence[DeviceState]: ...


class NoDevices:
    """The reader of a worker on CPUs."""

    def read(self) -> Sequence[DeviceState]:
        return ()


class NvmlReader:
    """Reads one CUDA device through nvidia-ml-py.

    Raises: ImportError: nvidia-ml-py is not installed. OSError: NVML does not answer for this device.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self._nvml: Any = pynvml
        # CUDA numbers only what CUDA_VISIBLE_DEVICES shows; the UUID is the same for both.
        self._uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except pynvml.NVMLError as error:
            raise OSError(f"NVML does not answer for {self._uuid}: {error}") from error

    def read(self) -> Sequence[DeviceState]:
        nvml, handle = self._nvml, self._handle
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0
        links = [self._ask(nvml.nvmlDeviceGetNvLinkState, handle, i) for i in range(nvml.NVML_NVLINK_MAX_LINKS)]
        state = DeviceState(
            name=str(self._ask(nvml.nvmlDeviceGetName, handle) or "GPU"),
            uuid=self._uuid,
            memory_used_bytes=memory.used if memory else 0,
            memory_total_bytes=memory.total if memory else 0,
            temperature_c=float(self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU) or 0),
            power_w=(self._ask(nvml.nvmlDeviceGetPowerUsage, handle) or 0) / 1000,
            sm_clock_mhz=float(self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM) or 0),
            throttle_reasons=tuple(name for bit, name in THROTTLE_REASONS.items() if reasons & bit),
            corrected_errors=self._errors(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            uncorrected_errors=self._errors(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            nvlinks=sum(link is not None for link in links),
            nvlinks_up=sum(bool(link) for link in links),
        )
        return (state,)

    def _errors(self, kind: int) -> int:
        nvml = self._nvml
        return int(self._ask(nvml.nvmlDeviceGetTotalEccErrors, self._handle, kind, nvml.NVML_VOLATILE_ECC) or 0)

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None if this device or driver does not know it."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


class _Several:
    """The devices of all ranks that share a model."""

    def __init__(self, readers: Sequence[DeviceReader]) -> None:
        self._readers = readers

    def read(self) -> Sequence[DeviceState]:
        return tuple(state for reader in self._readers for state in reader.read())


def open_devices(device: torch.device, num_devices: int = 1) -> DeviceReader:
    """A reader of that device and those behind it; without NVML one that reads nothing, and a warning."""
    if device.type != "cuda":
        return NoDevices()
    first = device.index or 0
    try:
        return _Several([NvmlReader(torch.device("cuda", first + i)) for i in range(num_devices)])
    except ImportError:
        logger.warning("GPU health is not watched: nvidia-ml-py is missing; run: pip install 'splitserve[gpu]'")
    except OSError as error:
        logger.warning("GPU health is not watched: %s", error)
    return NoDevices()
