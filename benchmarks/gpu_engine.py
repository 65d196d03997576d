"""How near is the engine to what the GPU can do? Whole steps, as a worker runs them, beside floors of the same run.

`python -m splitserve.benchmarks.engine --device cuda` runs this. The floor of prefill is its floating-point operations
over the measured rate of a large matrix product, that of decode its bytes over the measured rate of a large copy.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from ..core.kv_geometry import blocks_for
from ..core.request import Request, SamplingParams
from ..engine.engine import Engine
from ..engine.loading import LoadedModel, load_model
from ..engine.options import EngineOptions
from ..engine.parallel.ranks import start_ranks

PREFILL_CASES = ((1, 128), (1, 512), (1, 2048), (1, 8192), (16, 2048))  # prompts, tokens each
DECODE_CASES = (
    (1, 128), (1, 2048), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024), (64, 4096),
)  # fmt: skip
SEED = 0
_ROUNDS = 7
_STEPS = 40


def shapes() -> dict[str, PretrainedConfig]:
    """Configs of common models, for random weights."""
    return {
        "llama-3.1-8b": LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        "qwen3-8b": Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
        ),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the device does in this run."""

    copy_bytes_per_s: float  # read and written
    bf16_flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case; times are medians over `n` rounds."""

    kind: str  # prefill or decode
    batch: int
    tokens: int  # prompt length, or context
    step_ms: float  # whole steps: schedule, run, sample, postprocess
    device_ms: float  # the device's own time of the same step
    floor_ms: float
    tokens_per_s: float
    n: int

    @property
    def ratio(self) -> float:
        return self.step_ms / self.floor_ms


def measure_limits() -> Limits:
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    copy_s = _device_seconds(lambda: target.copy_(source))
    product_s = _device_seconds(lambda: a @ b)
    return Limits(copy_bytes_per_s=2 * source.numel() / copy_s, bf16_flops_per_s=2 * 8192**3 / product_s)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _device_seconds(work: Callable[[], object], rounds: int = 10) -> float:
    """Median of single timed calls."""
    times = []
    for _ in range(rounds + 2):
        begin, end = _event(), _event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times[2:]))


def _floors(engine: Engine, loaded: LoadedModel, limits: Limits) -> tuple[Callable[..., float], Callable[..., float]]:
    model: Any = loaded.model
    config = model.config.get_text_config()
    ranks = engine.options.tensor_parallel  # each computes its share at the same time
    embedding = int(model.get_input_embeddings().weight.numel())
    head = int(model.get_output_embeddings().weight.numel())
    total = int(sum(parameter.numel() for parameter in model.parameters()))
    layers = total - embedding - (0 if config.tie_word_embeddings else head)
    read = layers + head
    heads = int(config.num_attention_heads) // ranks * sum(g.key_dim + g.value_dim for g in engine.geometry.layers)

    def prefill(batch: int, tokens: int) -> float:
        flops = batch * (2.0 * layers * tokens + heads * tokens**2)  # causal: half of all pairs
        return flops / limits.bf16_flops_per_s

    def decode(batch: int, context: int) -> float:
        return (2.0 * read + batch * context * engine.geometry.bytes_per_token) / limits.copy_bytes_per_s

    return prefill, decode


def _prompt(engine: Engine, tokens: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(10, engine.vocab_size, (tokens,), generator=generator).tolist())


def prefill_seconds(engine: Engine, batch: int, tokens: int, rounds: int) -> tuple[float, float]:
    """(whole, on the device) until every prompt has its first token."""
    whole, device = [], []
    for _ in range(rounds + 2):
        for i in range(batch):
            request = Request(request_id=f"p{i}", prompt_token_ids=_prompt(engine, tokens, i), max_tokens=1)
            engine.add(request)
        torch.cuda.synchronize()
        begin, end = _event(), _event()
        began_s = time.perf_counter()
        begin.record()
        while engine.has_work():
            engine.step()
        whole.append(time.perf_counter() - began_s)
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(whole[2:]), statistics.median(device[2:])


def decode_seconds(engine: Engine, batch: int, context: int, rounds: int) -> tuple[float, float]:
    """(whole step, bare replays of its graph) of a full batch; the KV of the context is whatever the pool holds.

    Replays are not a number where ranks share the model: they would have to replay together.
    """
    steps = _STEPS
    for i in range(batch):
        prompt = _prompt(engine, context - steps * rounds // 2, i)
        engine.reserve(
            Request(
                request_id=f"d{i}",
                prompt_token_ids=prompt,
                max_tokens=steps * (rounds + 2),
                sampling=SamplingParams(temperature=0.0),
            )
        )
        engine.start_reserved(f"d{i}", 10)
    times = []
    for _ in range(10):
        engine.step()
    for _ in range(rounds):
        began_s = time.perf_counter()
        for _ in range(steps):
            engine.step()
        times.append((time.perf_counter() - began_s) / steps)
    replay = _device_seconds(engine.bare_step(batch)) if engine.options.tensor_parallel == 1 else math.nan
    for i in range(batch):
        engine.release(f"d{i}")
    while engine.step() is not None:
        pass
    return statistics.median(times), replay


def run(
    *,
    model: str | None,
    shape: str,
    max_step_tokens: int,
    rounds: int,
    json_path: Path | None,
    only: str | None,
    tensor_parallel: int = 1,
) -> list[Row]:
    """Measure and print; `model` is a directory, else `shape` names a config with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            shapes()[shape].save_pretrained(folder)
        return _run(model, shape, Path(folder), max_step_tokens, rounds, json_path, only, tensor_parallel)


def _run(
    model: str | None,
    shape: str,
    shape_dir: Path,
    max_step_tokens: int,
    rounds: int,
    json_path: Path | None,
    only: str | None,
    tensor_parallel: int,
) -> list[Row]:
    console = Console(width=120)
    limits = measure_limits()
    gc.collect()
    torch.cuda.empty_cache()
    options = EngineOptions(
        model=model or str(shape_dir),
        random_weights=model is None,
        device="cuda",
        tensor_parallel=tensor_parallel,
        max_model_len=16384,
        max_running=256,
        max_step_tokens=max_step_tokens,
        prefix_cache=False,
        decode_headroom_tokens=_STEPS * (rounds + 2),
    )
    began_s = time.monotonic()
    others = start_ranks(options)
    loaded = load_model(options, None if others is None else others.group)
    loaded_s = time.monotonic() - began_s
    engine = Engine(loaded, options, others=others)
    engine.warm_up()
    ready_s = time.monotonic() - began_s - loaded_s
    engine.pool.elements.normal_()  # numbers of ordinary size: a GPU takes less power for tiny ones, and is faster
    prefill_floor, decode_floor = _floors(engine, loaded, limits)
    rows_out = []
    cases = [("prefill", *case) for case in PREFILL_CASES] + [("decode", *case) for case in DECODE_CASES]
    cases = [case for case in cases if only in (None, case[0])]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for kind, batch, tokens in cases:
            if blocks_for(tokens + _STEPS * (rounds + 3), engine.options.block_size) * batch > engine.pool.num_blocks:
                console.print(f"{kind} {batch} x {tokens}: the KV pool is too small, left out")
                continue
            measure, floor = (prefill_seconds, prefill_floor) if kind == "prefill" else (decode_seconds, decode_floor)
            whole, device = measure(engine, batch, tokens, rounds)
            rows_out.append(
                Row(
                    kind=kind,
                    batch=batch,
                    tokens=tokens,
                    step_ms=whole * 1e3,
                    device_ms=device * 1e3,
                    floor_ms=floor(batch, tokens) * 1e3,
                    tokens_per_s=(batch * tokens if kind == "prefill" else batch) / whole,
                    n=rounds,
                )
            )
            progress.advance(task)
    properties = torch.cuda.get_device_properties(0)
    console.print(
        f"{properties.name}, copy {limits.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 product "
        f"{limits.bf16_flops_per_s / 1e12:.0f} TFLOP/s; loaded in {loaded_s:.1f} s, ready {ready_s:.1f} s after that"
    )
    split = f" on {tensor_parallel} GPUs" if tensor_parallel > 1 else ""
    table = Table(title=f"{model or shape}{split}, bf16, ms per step (median of {rounds})")
    for column in ("", "batch", "tokens", "whole step", "on the device", "floor", "whole / floor", "tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows_out:
        table.add_row(
            row.kind, str(row.batch), f"{row.tokens:,}", f"{row.step_ms:.2f}", f"{row.device_ms:.2f}",
            f"{row.floor_ms:.2f}", f"{row.ratio:.2f}", f"{row.tokens_per_s:,.0f}",
        )  # fmt: skip
    console.print(table)
    if json_path is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
        document = {
            "commit": commit.strip(),
            "command": sys.argv,
            "device": properties.name,
            "torch": torch.__version__,
            "seed": SEED,
            "warm_up": 2,
            "tensor_parallel": tensor_parallel,
            "limits": asdict(limits),
            "ready_s": ready_s,
            "rows": [asdict(row) | {"ratio": row.ratio} for row in rows_out],
        }
        json_path.write_text(json.dumps(document, indent=2) + "\n")
    if others is not None:
        others.close()
    return rows_out
