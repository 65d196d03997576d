"""How fast is the engine alone, beside transformers' own two ways to generate, in the same process?

Decode starts from caches of random content, so that no time goes into the baselines' slow prefill; every engine gets
the same number of sequences and tokens of context. Prefill is compared with one plain forward pass of the model.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ..core.kv_geometry import KvDtype, blocks_for
from ..core.request import Request
from ..engine.engine import Engine
from ..engine.loading import load_model
from ..engine.options import EngineOptions
from ..engine.pool import TORCH_DTYPES

TARGETS = {1: 1.0, 8: 1.2, 32: 1.5}  # decode, times the better baseline
PREFILL_TARGET = 0.85
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case: medians over `n` runs, tokens per second."""

    kind: str  # decode or prefill
    dtype: str
    batch: int
    context: int  # tokens
    ours: float
    baselines: dict[str, float]
    ratio: float  # ours / the best baseline
    target: float | None


class StepClock(StoppingCriteria):
    """Notes when each of generate's steps ended."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.at_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def engine_decode(engine: Engine, batch: int, context: int, steps: int) -> float:
    """Tokens per second of a full decode batch."""
    generator = torch.Generator().manual_seed(SEED)
    for i in range(batch):
        prompt = torch.randint(10, engine.vocab_size, (context,), generator=generator).tolist()
        engine.reserve(Request(request_id=f"r{i}", prompt_token_ids=tuple(prompt), max_tokens=steps + 2))
    for i in range(batch):
        engine.start_reserved(f"r{i}", 10)
    engine.step()
    began_s = time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = time.perf_counter() - began_s
    for i in range(batch):
        engine.release(f"r{i}")
    return batch * steps / seconds


def generate_decode(model: PreTrainedModel, engine: Engine, batch: int, context: int, steps: int) -> float:
    """The same with `model.generate`, a DynamicCache and the attention that transformers chooses."""
    cache = DynamicCache(config=model.config)
    for layer, shape in enumerate(engine.geometry.layers):
        kv = torch.randn(2, batch, shape.num_kv_heads, context, shape.key_dim).to(model.dtype)
        cache.update(kv[0], kv[1], layer)
    ids = torch.randint(10, engine.vocab_size, (batch, context + 1))
    clock = StepClock()
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=steps + 1,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        stopping_criteria=[clock],
    )
    return batch * (len(clock.at_s) - 1) / (clock.at_s[-1] - clock.at_s[0])


def generate_batch_decode(model: PreTrainedModel, batch: int, context: int, steps: int) -> float:
    """The same with `model.generate_batch`; all prompts are equal, so that it prefills but one and shares the rest."""
    prompt = torch.randint(10, 1000, (context,), generator=torch.Generator().manual_seed(SEED)).tolist()
    outputs = model.generate_batch(  # type: ignore[operator]
        inputs=[prompt] * batch,
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=steps + 1, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=batch * blocks_for(context + steps + 2, 16) + 64, max_batch_tokens=256
        ),
        record_timestamps=True,
        warmup=False,
    )
    times = [output.timestamps for output in outputs.values()]
    # From the moment when all run to the moment when the first ends: prefill is over, the batch is full.
    began_s, ended_s = max(t[0] for t in times), min(t[-1] for t in times)
    tokens = sum(sum(began_s < t <= ended_s for t in stamps) for stamps in times)
    return float(tokens / (ended_s - began_s))


def engine_prefill(engine: Engine, tokens: int) -> float:
    prompt = torch.randint(10, engine.vocab_size, (tokens,)).tolist()
    engine.add(Request(request_id="prefill", prompt_token_ids=tuple(prompt), max_tokens=1))
    began_s = time.perf_counter()
    while engine.has_work():
        engine.step()
    return tokens / (time.perf_counter() - began_s)


@torch.inference_mode()
def plain_prefill(model: PreTrainedModel, tokens: int) -> float:
    ids = torch.randint(10, model.config.vocab_size, (1, tokens))
    began_s = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return tokens / (time.perf_counter() - began_s)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m splitserve.benchmarks.engine", description=__doc__)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: against the device's own limits, see --shape"
    )
    parser.add_argument("--shape", default="llama-3.1-8b", help="with --device cuda: a config with random weights")
    parser.add_argument("--model", help="directory or name (default: smollm2-135m, on a GPU the shape)")
    parser.add_argument("--dtypes", nargs="+", choices=list(TORCH_DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512], help="tokens of context of a decode")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prefills", nargs="*", type=int, default=[512, 1500], help="prompt tokens")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of one run")
    parser.add_argument("--runs", type=int, default=3, help="measured runs, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=512, help="prefill tokens of one engine step")
    parser.add_argument("--skip-generate-batch", action="store_true", help="compare with model.generate alone")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="with --device cuda: over so many GPUs"
    )
    parser.add_argument(
        "--compare-fusions",
        action="store_true",
        help="with --device cuda: prefill of the shape fused by torch.compile, liger-kernel and ourselves",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    if options.compare_fusions and (options.device != "cuda" or options.model is not None):
        parser.error("--compare-fusions needs --device cuda, and takes a --shape, no --model")
    if options.tensor_parallel > 1 and options.device != "cuda":
        parser.error("--tensor-parallel needs --device cuda")
    if options.device == "cpu" and options.model is None:
        options.model = "smollm2-135m"
    return options


def measure(options: argparse.Namespace, dtype: KvDtype, progress: Progress) -> list[Row]:
    """All cases of one dtype; the engines take turns within a case, so that a noisy neighbour hits them alike."""
    loaded = load_model(EngineOptions(model=options.model, dtype=dtype))
    longest = max([*options.contexts, *options.prefills]) + options.steps + 16
    engine = Engine(
        loaded,
        EngineOptions(
            model=options.model,
            num_kv_blocks=max(options.batches) * blocks_for(longest, 16) + 8,
            max_step_tokens=options.chunk,
            num_threads=options.threads,
            prefix_cache=False,
        ),
    )
    engine.pool.elements.normal_()  # as the baselines' caches; denormal numbers would cost twice the time
    plain = AutoModelForCausalLM.from_pretrained(loaded.path, dtype=TORCH_DTYPES[dtype])
    plain.train(False)
    rows = []
    cases = [("decode", b, c) for c in options.contexts for b in options.batches]
    cases += [("prefill", 1, c) for c in options.prefills]
    task = progress.add_task(dtype, total=len(cases))
    for kind, batch, context in cases:
        ours: list[float] = []
        theirs: dict[str, list[float]] = {}
        for run in range(options.runs + 1):
            found: dict[str, float] = {}
            if kind == "decode":
                mine = engine_decode(engine, batch, context, options.steps)
                found["generate"] = generate_decode(plain, engine, batch, context, options.steps)
                if not options.skip_generate_batch:
                    found["generate_batch"] = generate_batch_decode(plain, batch, context, options.steps)
            else:
                mine = engine_prefill(engine, context)
                found["forward"] = plain_prefill(plain, context)
            if run:  # the first one warms up
                ours.append(mine)
                for name, value in found.items():
                    theirs.setdefault(name, []).append(value)
        best = {name: statistics.median(values) for name, values in theirs.items()}
        median = statistics.median(ours)
        rows.append(
            Row(
                kind=kind,
                dtype=dtype,
                batch=batch,
                context=context,
                ours=median,
                baselines=best,
                ratio=median / max(best.values()),
                target=TARGETS.get(batch) if kind == "decode" else PREFILL_TARGET,
            )
        )
        progress.advance(task)
    return rows


def report(rows: list[Row], console: Console) -> None:
    table = Table(title="engine, tokens per second (median)")
    for column in ("", "dtype", "batch", "context", "splitserve", "baselines", "ratio", "target"):
        table.add_column(column, justify="left" if column in ("", "dtype", "baselines") else "right")
    for row in rows:
        baselines = ", ".join(f"{name} {value:,.1f}" for name, value in row.baselines.items())
        met = row.target is None or row.ratio >= row.target
        ratio = f"[{'green' if met else 'red'}]{row.ratio:.2f}[/]"
        target = "" if row.target is None else f"{row.target:.2f}"
        table.add_row(
            row.kind, row.dtype, str(row.batch), str(row.context), f"{row.ours:,.1f}", baselines, ratio, target
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.compare_fusions:
        from . import fusions

        fusions.run(shape=options.shape, rounds=max(options.runs, 5), json_path=options.json)
        return
    if options.device == "cuda":
        from . import gpu_engine

        gpu_engine.run(
            model=options.model,
            shape=options.shape,
            max_step_tokens=max(options.chunk, 8192),
            rounds=max(options.runs, 5),
            json_path=options.json,
            only=None,
            tensor_parallel=options.tensor_parallel,
        )
        return
    torch.set_num_threads(options.threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    rows: list[Row] = []
    console = Console()
    with Progress(console=console) as progress:
        for dtype in options.dtypes:
            rows += measure(options, cast(KvDtype, dtype), progress)
    report(rows, console)
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        document = {
            "commit": commit,
            "command": [sys.executable, "-m", "splitserve.benchmarks.engine", *(arguments or sys.argv[1:])],
            "device": f"{platform.processor() or platform.machine()}, {options.threads} threads",
            "seed": SEED,
            "warm_up": 1,
            "n": options.runs,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
