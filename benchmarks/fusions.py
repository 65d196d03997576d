"""Which way to fuse a layer's elementwise work prefills fastest? The same engine over one model, fused in four ways.

`python -m splitserve.benchmarks.engine --device cuda --compare-fusions` runs this. Steps are launched kernel by kernel,
as those of long prompts are: a graph would hide what the host pays for each way. What compiles is compiled before.
"""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface, PreTrainedModel

from ..engine.attention import NAME, paged_attention
from ..engine.engine import Engine
from ..engine.loading import load_model
from ..engine.options import EngineOptions
from .gpu_engine import SEED, prefill_seconds, shapes

TOKENS = (512, 2048, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way and one prompt length; times are medians over `n` rounds."""

    way: str
    tokens: int
    step_ms: float  # whole steps
    device_ms: float
    n: int


@contextmanager
def _as_it_is(model: PreTrainedModel) -> Iterator[None]:
    yield


@contextmanager
def _compiled(model: PreTrainedModel) -> Iterator[None]:
    """torch.compile of each layer, interrupted by our attention; prompt lengths are dynamic, as in a worker."""
    AttentionInterface.register(NAME, torch.compiler.disable(paged_attention))  # type: ignore[no-untyped-call]
    try:
        base: Any = model.base_model
        for layer in base.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        yield
    finally:
        AttentionInterface.register(NAME, paged_attention)


@contextmanager
def _liger(model: PreTrainedModel) -> Iterator[None]:
    """liger-kernel's norms, rotary embedding and SwiGLU."""
    liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    file = sys.modules[type(model).__module__]
    names = [name for name in vars(file) if name == "apply_rotary_pos_emb" or name.endswith(("RMSNorm", "MLP"))]
    own = {name: getattr(file, name) for name in names}
    try:
        liger.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model, fused_linear_cross_entropy=False)
        yield
    finally:
        for name, value in own.items():
            setattr(file, name, value)


# Ours last: its rotary embedding stays in the model's file.
WAYS: dict[str, Callable[[PreTrainedModel], AbstractContextManager[None]]] = {
    "as transformers has it": _as_it_is,
    "torch.compile": _compiled,
    "liger-kernel": _liger,
    "splitserve": _as_it_is,
}


def measure(way: str, options: EngineOptions, rounds: int) -> list[Row]:
    loaded = load_model(options, fused=way == "splitserve")
    rows = []
    with WAYS[way](loaded.model):
        engine = Engine(loaded, options)
        engine.warm_up()
        engine.pool.elements.normal_()
        for tokens in TOKENS:
            whole, device = prefill_seconds(engine, 1, tokens, rounds)
            rows.append(Row(way=way, tokens=tokens, step_ms=whole * 1e3, device_ms=device * 1e3, n=rounds))
    return rows


def run(*, shape: str, rounds: int, json_path: Path | None) -> list[Row]:
    """Measure every way and print a table."""
    console = Console(width=120)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        shapes()[shape].save_pretrained(folder)
        options = EngineOptions(
            model=folder,
            random_weights=True,
            device="cuda",
            num_kv_blocks=2048,
            max_model_len=16384,
            max_running=8,
            max_step_tokens=8192,
            prefix_cache=False,
            cuda_graphs=False,
        )
        for way in WAYS:
            rows += measure(way, options, rounds)
            gc.collect()
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_properties(0).name
    table = Table(title=f"{shape}, bf16, prefill of one prompt on {name}, ms (median of {rounds})")
    for column in ("", "tokens", "whole step", "on the device"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(row.way, f"{row.tokens:,}", f"{row.step_ms:.2f}", f"{row.device_ms:.2f}")
    console.print(table)
    if json_path is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
        document = {
            "commit": commit.strip(),
            "command": sys.argv,
            "device": name,
            "torch": torch.__version__,
            "seed": SEED,
            "warm_up": 2,
            "rows": [asdict(row) for row in rows],
        }
        json_path.write_text(json.dumps(document, indent=2) + "\n")
    return rows
