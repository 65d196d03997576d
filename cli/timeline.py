"""The timeline of one request as a table with bars."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..client.results import GenerationResult, RequestTiming

_BAR_WIDTH = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One part of a request's life, in seconds since it arrived at the router."""

    name: str
    start_s: float
    duration_s: float


def spans(timing: RequestTiming) -> list[Span]:
    """The parts of a timeline in order; those that did not happen last 0 s.

    A prompt may be sent off while its grant is asked for. The exposed part of the transfer begins when prefill ends;
    the transfer ends with it, so it began before.
    """
    grant_s = timing.queue_s
    queued_s = [event.offset_s for event in timing.events if event.event == "prefill_queued"]
    prefill_queue_s = queued_s[-1] if queued_s else grant_s + timing.grant_s
    prefill_s = max(timing.ttft_s - timing.prefill_s, prefill_queue_s)
    prefill_end_s = prefill_s + timing.prefill_s
    transfer_end_s = prefill_end_s + timing.transfer_exposed_s
    rows = [
        ("queue", 0.0, timing.queue_s),
        ("grant", grant_s, timing.grant_s),
        ("prefill queue", prefill_queue_s, timing.prefill_queue_s),
        ("prefill", prefill_s, timing.prefill_s),
        ("first token", timing.ttft_s, 0.0),
        ("transfer", transfer_end_s - timing.transfer_s, timing.transfer_s),
        ("exposed transfer", prefill_end_s, timing.transfer_exposed_s),
        ("decode queue", transfer_end_s, timing.decode_queue_s),
        ("decode", timing.ttft_s, timing.decode_s),
    ]
    return [Span(name=name, start_s=max(0.0, start), duration_s=length) for name, start, length in rows]


def render(result: GenerationResult) -> Group:
    """Table of spans, then where the request ran and what was moved."""
    timing = result.timing
    end_s = max(timing.e2e_s, 1e-9)
    table = Table(title="Timeline", title_justify="left", header_style="bold")
    table.add_column("part", no_wrap=True)
    table.add_column("start ms", justify="right")
    table.add_column("ms", justify="right")
    table.add_column(f"0 to {timing.e2e_s * 1e3:,.1f} ms", width=_BAR_WIDTH, no_wrap=True)
    for span in spans(timing):
        table.add_row(span.name, f"{span.start_s * 1e3:,.1f}", _duration(span), _bar(span, end_s))
    lines = Table.grid(padding=(0, 2))
    for name, value in facts(result).items():
        lines.add_row(Text(name, style="dim"), value)
    return Group(table, lines)


def facts(result: GenerationResult) -> dict[str, str]:
    """What a person wants to know beside the bars."""
    timing, usage = result.timing, result.usage
    cached = f"{usage.num_cached_tokens:,} cached"
    hidden_s = max(0.0, timing.transfer_s - timing.transfer_exposed_s)  # a short one begins after prefill
    rows = {
        "request": f"{result.request_id} (seed {result.seed}, attempts {timing.attempts})",
        "tokens": f"{usage.num_prompt_tokens:,} in ({cached}), {usage.num_output_tokens:,} out",
        "ran on": f"prefill {timing.prefill_worker or '-'}, decode {timing.decode_worker or '-'}",
        "KV moved": f"{timing.kv_bytes:,} bytes by {timing.transport or 'none'}",
        "transfer": f"{timing.transfer_s * 1e3:,.1f} ms, {hidden_s * 1e3:,.1f} of them behind prefill",
    }
    if timing.preemptions:
        rows["preempted"] = f"{timing.preemptions} times"
    if result.ttft_s is not None:
        rows["client saw"] = f"TTFT {result.ttft_s * 1e3:,.1f} ms, end to end {result.e2e_s * 1e3:,.1f} ms"
    if result.tpot_s is not None:
        rows["client saw"] += f", TPOT {result.tpot_s * 1e3:,.1f} ms"
    return rows


def _duration(span: Span) -> str:
    return "" if span.name == "first token" else f"{span.duration_s * 1e3:,.1f}"


def _bar(span: Span, end_s: float) -> Text:
    start = min(_BAR_WIDTH - 1, int(span.start_s / end_s * _BAR_WIDTH))
    if span.name == "first token":
        return Text(" " * start + "◆", style="bold yellow")
    if span.duration_s <= 0:
        return Text("")
    length = max(1, min(_BAR_WIDTH - start, round(span.duration_s / end_s * _BAR_WIDTH)))
    return Text(" " * start + "█" * length, style="red" if span.name == "exposed transfer" else "cyan")
