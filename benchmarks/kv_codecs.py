"""What does a KV codec cost in precision, and what does it save? Real KV of SmolLM2, coded and decoded.

python -m splitserve.benchmarks.kv_codecs
"""

from __future__ import annotations

import asyncio
import inspect
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ..engine.model_files import resolve_model
from ..kv_transfer.codecs import PlaneShape, WireFormat, decode, encode, wire_bytes
from .report import write_json

WIRES = {
    "none": WireFormat(codec="none", dtype="float32"),
    "none, bfloat16": WireFormat(codec="none", dtype="bfloat16"),
    "fp8": WireFormat(codec="fp8", dtype="float32"),
    "int8": WireFormat(codec="int8", dtype="float32"),
}
QUESTIONS = (
    "The",
    "The capital of France is",
    "Write a haiku about rain.",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Translate to German: Good morning, how are you?",
    "List three reasons why the sky is blue.",
    "In 1969, the first man on the moon said",
)
PROMPT_TOKENS, SCORED_TOKENS = 256, 128  # of each piece of prose: through the codec, and scored on top of it


@dataclass(kw_only=True)
class Figures:
    """One wire format's figures, summed over all texts."""

    wire_bytes: int = 0
    log_loss: float = 0.0
    num_scored: int = 0
    num_top_agree: int = 0  # scored positions whose likeliest token is that of uncoded KV
    num_same_tokens: int = 0  # greedy tokens before the first that differs
    num_same_answers: int = 0
    answers: list[list[int]] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return math.exp(self.log_loss / self.num_scored)


def main(
    num_pieces: Annotated[int, typer.Option(min=1, help="Pieces of prose, 384 tokens each.")] = 16,
    num_new: Annotated[int, typer.Option(min=1, help="Greedy tokens for each prompt.")] = 32,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Perplexity and greedy agreement when a prompt's KV went through each codec, with the bytes it took."""
    path = resolve_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # comes in evaluation mode
    prose: list[int] = tokenizer(_prose())["input_ids"]
    length = PROMPT_TOKENS + SCORED_TOKENS
    num_pieces = min(num_pieces, len(prose) // length)
    pieces = [prose[number * length : (number + 1) * length] for number in range(num_pieces)]
    prompts = [tokenizer(question)["input_ids"] for question in QUESTIONS] + [p[:PROMPT_TOKENS] for p in pieces]
    figures = {name: Figures() for name in WIRES}
    with torch.inference_mode():
        for piece in track(pieces, "perplexity"):
            _score(model, piece, figures)
        for prompt in track(prompts, "greedy"):
            _answer(model, prompt, num_new, figures)
    title = f"KV of SmolLM2-135M: {num_pieces} x {SCORED_TOKENS} tokens scored, {len(prompts)} x {num_new} generated"
    table = Table(title=title)
    for column in (
        "codec",
        "bytes/token",
        "of float32",
        "perplexity",
        "change",
        "top-1 agrees",
        "greedy tokens",
        "same",
    ):
        table.add_column(column, justify="right" if column != "codec" else "left")
    plain = figures["none"]
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row.wire_bytes / (num_pieces * PROMPT_TOKENS):,.0f}",
            f"{row.wire_bytes / plain.wire_bytes:.3f}",
            f"{row.perplexity:.4f}",
            f"{100 * (row.perplexity / plain.perplexity - 1):+.3f} %",
            f"{100 * row.num_top_agree / row.num_scored:.2f} %",
            f"{100 * row.num_same_tokens / (len(prompts) * num_new):.1f} %",
            f"{row.num_same_answers}/{len(prompts)}",
        )
    Console().print(table)
    if json_file is not None:
        rows = {
            name: {
                "wire_bytes": row.wire_bytes,
                "perplexity": row.perplexity,
                "top_1_agreement": row.num_top_agree / row.num_scored,
                "greedy_token_agreement": row.num_same_tokens / (len(prompts) * num_new),
                "same_answers": row.num_same_answers,
            }
            for name, row in figures.items()
        }
        write_json(json_file, {"num_pieces": num_pieces, "num_prompts": len(prompts), "num_new": num_new, "rows": rows})


def _score(model: Any, piece: Sequence[int], figures: dict[str, Figures]) -> None:
    """Loss of a piece's last tokens, on top of its first ones' coded KV."""
    cache = model(torch.tensor([piece[:PROMPT_TOKENS]]), use_cache=True).past_key_values
    inputs = torch.tensor([piece[PROMPT_TOKENS:-1]])
    targets = torch.tensor(piece[PROMPT_TOKENS + 1 :])
    top: torch.Tensor | None = None
    for name, row in figures.items():
        coded, num_bytes = _through(cache, WIRES[name])
        logits = model(inputs, past_key_values=coded).logits[0].float()
        top = logits.argmax(-1) if top is None else top
        row.wire_bytes += num_bytes
        row.log_loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        row.num_scored += len(targets)
        row.num_top_agree += int((logits.argmax(-1) == top).sum())


def _answer(model: Any, prompt: Sequence[int], num_new: int, figures: dict[str, Figures]) -> None:
    """Greedy tokens as a decode worker continues them: the first comes with the KV, the rest from coded KV."""
    out = model(torch.tensor([prompt]), use_cache=True)
    first, reference = int(out.logits[0, -1].argmax()), None
    for name, row in figures.items():
        coded, _ = _through(out.past_key_values, WIRES[name])
        tokens = [first]
        while len(tokens) < num_new:
            step = model(torch.tensor([[tokens[-1]]]), past_key_values=coded, use_cache=True)
            tokens.append(int(step.logits[0, -1].argmax()))
        reference = tokens if reference is None else reference
        same = next((i for i, (a, b) in enumerate(zip(tokens, reference, strict=True)) if a != b), num_new)
        row.num_same_tokens += same
        row.num_same_answers += same == num_new


def _through(cache: Any, wire: WireFormat) -> tuple[DynamicCache, int]:
    """A copy of a cache after the wire, and the bytes it took."""
    coded, num_bytes = DynamicCache(), 0
    for number, layer in enumerate(cache.layers):
        planes = []
        for is_key, values in ((True, layer.keys[0]), (False, layer.values[0])):
            heads, tokens, dim = values.shape
            planes.append((PlaneShape(is_key=is_key, heads=heads, tokens=tokens, dim=dim), values))
        shapes = [shape for shape, _ in planes]
        payload = torch.empty(wire_bytes(wire, shapes), dtype=torch.uint8)
        encode(wire, planes, payload)
        keys, values = (plane.clone() for plane in decode(wire, shapes, payload, torch.float32))
        coded.update(keys[None], values[None], number)
        num_bytes += payload.nbytes
    return coded, num_bytes


def _prose() -> str:
    """English prose that every Python has: docstrings of the standard library."""
    text = "\n".join(textwrap.dedent(inspect.getdoc(module) or "") for module in (inspect, asyncio, textwrap, Path))
    return text + "\n".join(
        inspect.getdoc(member) or "" for _, member in inspect.getmembers(inspect, inspect.isfunction)
    )


if __name__ == "__main__":
    typer.run(main)
