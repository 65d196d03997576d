"""Devices and links: what a data sheet says, the part of it that kernels reach, and what an hour costs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import ConfigError

# One worker's side, bytes a second: what large copies reach, not what the plug is named after.
LINKS: Mapping[str, float] = {
    "nvlink": 380e9,
    "ib400": 45e9,
    "eth100": 11e9,
    "eth25": 2.8e9,
    "eth10": 1.1e9,
    "shared-memory": 5e9,
}
LINK_LATENCY_S: Mapping[str, float] = {"nvlink": 1e-3, "shared-memory": 1e-3}
NETWORK_LATENCY_S = 3e-3  # grant, first frame and commit of a transfer between hosts

# Arithmetic that a number type of weights runs in, best first: int4 and int8 weights are widened where a device has no
# such product.
_ARITHMETIC: Mapping[str, tuple[str, ...]] = {
    "float32": ("fp32",),
    "bfloat16": ("bf16", "fp32"),
    "float16": ("bf16", "fp32"),
    "fp8": ("fp8", "bf16", "fp32"),
    "int8": ("int8", "bf16", "fp32"),
    "int4": ("bf16", "fp32"),
    "fp4": ("fp4", "bf16", "fp32"),
}


class _Sheet(BaseModel):
    """One device of a YAML file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    memory_gb: float = Field(gt=0)
    bandwidth_gb_s: float = Field(gt=0)
    tflops: dict[str, Annotated[float, Field(gt=0)]]
    link_gb_s: float = Field(gt=0)
    max_tp: int = Field(default=8, ge=1)
    price: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One device."""

    name: str
    memory_bytes: float
    bandwidth: float  # bytes/s
    flops: Mapping[str, float] = field(hash=False)  # operations/s by arithmetic: fp32, bf16, fp8, int8, fp4
    link_bandwidth: float  # bytes/s one way, to the other devices of a host
    max_tp: int
    price_per_hour: float

    def flops_for(self, dtype: str) -> float:
        """Operations a second of products with weights of that number type."""
        return next(self.flops[kind] for kind in _ARITHMETIC[dtype] if kind in self.flops)


def load_gpu(name: str) -> GpuSpec:
    """A built-in device, or the one (or `FILE.yaml:NAME`) of a YAML file of the same form. Raises: ConfigError."""
    table = _built_in()
    if name.lower() in table:
        return _spec(name.lower(), table[name.lower()], "built-in devices")
    file, _, wanted = name.partition(":")
    if file.endswith((".yaml", ".yml")):
        rows = _read(Path(file))
        if not wanted and len(rows) == 1:
            wanted = next(iter(rows))
        if wanted not in rows:
            raise ConfigError(f"--gpu: {file} holds {', '.join(map(str, rows))}; name one as {file}:NAME")
        return _spec(wanted, rows[wanted], file)
    near = difflib.get_close_matches(name.lower(), table, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(table)}"
    raise ConfigError(f"--gpu: unknown GPU {name!r}; {hint}; or give a YAML file (docs/planner.md)")


@cache
def _built_in() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("data/gpus.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--gpu: cannot read {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--gpu: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"--gpu: {path} names no device; wanted NAME: {{memory_gb: ..., ...}} (docs/planner.md)")
    return rows


def _spec(name: str, row: object, source: str) -> GpuSpec:
    try:
        sheet = _Sheet.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--gpu: {source}: {name}: {key}: {first['msg']}") from error
    if not {"fp32", "bf16"} & sheet.tflops.keys():
        raise ConfigError(f"--gpu: {source}: {name}: tflops: wanted at least fp32 or bf16, got {sheet.tflops}")
    return GpuSpec(
        name=name,
        memory_bytes=sheet.memory_gb * 1e9,
        bandwidth=sheet.bandwidth_gb_s * 1e9,
        flops={kind: value * 1e12 for kind, value in {"fp32": min(sheet.tflops.values()), **sheet.tflops}.items()},
        link_bandwidth=sheet.link_gb_s * 1e9,
        max_tp=sheet.max_tp,
        price_per_hour=sheet.price,
    )


def link_bandwidth(link: str) -> tuple[float, float]:
    """Bytes a second and seconds of latency of a named link, or of a number of GB/s. Raises: ConfigError."""
    if link in LINKS:
        return LINKS[link], LINK_LATENCY_S.get(link, NETWORK_LATENCY_S)
    try:
        gigabytes = float(link)
    except ValueError:
        raise ConfigError(f"--link: {link!r} is neither {', '.join(LINKS)} nor a number of GB/s") from None
    if not 0 < gigabytes < float("inf"):
        raise ConfigError(f"--link: {link} GB/s; it must be above 0")
    return gigabytes * 1e9, NETWORK_LATENCY_S
