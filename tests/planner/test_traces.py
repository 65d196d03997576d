"""Trace files: each format is read, a wrong line is named, and the generator resembles the published traces."""

import json
from pathlib import Path

import numpy as np
import pytest
from splitserve.core.errors import ConfigError
from splitserve.planner.published_traffic import published_traffic
from splitserve.planner.traces import AZURE_TRACE, MOONCAKE_TRACE, covered_tokens, data_directory, read_trace
from splitserve.planner.traffic import mean_rate
from splitserve.planner.types import SimRequest


def public_trace(name: str) -> Path:
    path = data_directory() / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set SPLITSERVE_DATA to the directory of the published traces")
    return path


def write_mooncake(path: Path, num_lines: int) -> None:
    rows = [
        {"timestamp": 3000 * (i // 10), "input_length": 600 + i % 400, "output_length": 5, "hash_ids": [0, i]}
        for i in range(num_lines)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_plain_csv(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,isl,osl\n10.5,100,20\n10,50,2\n")
    assert read_trace(path).requests == (
        SimRequest(arrival_s=0.0, isl=50, osl=2),
        SimRequest(arrival_s=0.5, isl=100, osl=20),
    )


def test_azure_csv(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.6805900,396,109\n"
    )
    trace = read_trace(path)
    assert [(r.arrival_s, r.isl, r.osl) for r in trace.requests] == [(0.0, 374, 44), (pytest.approx(4.0), 396, 109)]


def test_rounded_timestamps_are_spread_inside_their_bins_and_this_is_said(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_mooncake(path, 1000)
    as_recorded = read_trace(path, spread=False)
    assert as_recorded.notes == ()
    assert len({request.arrival_s for request in as_recorded.requests}) == 100
    trace = read_trace(path)
    assert "rounded to 3 s" in trace.notes[0]
    gaps = np.diff([request.arrival_s for request in trace.requests])
    assert gaps.max() < 3
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.15)  # random: as Poisson, not ten at once
    assert trace == read_trace(path)
    assert trace != read_trace(path, seed=1)
    assert len(read_trace(path, limit=7).requests) == 7


def test_exact_timestamps_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,isl,osl\n" + "".join(f"{i * 0.3},10,2\n" for i in range(100)))
    trace = read_trace(path)
    assert trace.notes == ()
    assert trace.requests[99].arrival_s == pytest.approx(29.7)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{oops", "is not JSON"),
        ("[1, 2]", r"is \[1, 2\]"),
        ('{"input_length": 600, "output_length": 5}', "has no timestamp"),
        ('{"timestamp": "x", "input_length": 600, "output_length": 5}', "timestamp is 'x', no number"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 5}', "input_length is 0; it must be a whole number"),
        ('{"timestamp": 1, "input_length": 9, "output_length": 1.5}', "output_length is 1.5"),
        ('{"timestamp": 1, "input_length": 900, "output_length": 5, "hash_ids": [1]}', "do not cover 900 tokens"),
        ('{"timestamp": 1, "input_length": 9, "output_length": 5, "hash_ids": ["a"]}', "not a list of whole numbers"),
    ],
)
def test_a_malformed_line_17_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "trace.jsonl"
    write_mooncake(path, 20)
    lines = path.read_text().splitlines()
    lines[16] = line
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"trace.jsonl, line 17: .*{what}.*; wanted") as caught:
        read_trace(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a,b\n1,2\n", "line 1: the header is 'a,b'; wanted timestamp,isl,osl"),
        ("timestamp,isl,osl\n1,2,3\nsoon,2,3\n", "line 3: timestamp is 'soon', no time"),
        ("timestamp,isl,osl\n1,2,3\nnan,2,3\n", "line 3: timestamp is 'nan', no time"),
        ("timestamp,isl,osl\n1,2\n", "line 2: osl is None, no number"),
        ("timestamp,isl,osl\n1,-2,3\n", "line 2: isl is -2"),
        ("timestamp,isl,osl\n", "holds no requests"),
    ],
)
def test_a_malformed_csv_is_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_trace(path)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*missing\.csv: No such file"):
        read_trace(tmp_path / "missing.csv")


def quantiles(values: list[int]) -> list[float]:
    return [float(np.mean(values)), *np.percentile(values, [25, 50, 90])]


@pytest.mark.verify
@pytest.mark.parametrize(("name", "file"), [("mooncake", MOONCAKE_TRACE), ("azure", AZURE_TRACE)])
def test_generated_traffic_resembles_the_trace(name: str, file: str) -> None:
    recorded = read_trace(public_trace(file)).requests
    generated = published_traffic(name, len(recorded), seed=3)
    assert mean_rate(generated) == pytest.approx(mean_rate(recorded), rel=0.05)
    assert quantiles([r.isl for r in generated]) == pytest.approx(quantiles([r.isl for r in recorded]), rel=0.08)
    assert quantiles([r.osl for r in generated]) == pytest.approx(quantiles([r.osl for r in recorded]), rel=0.08)
    assert covered_tokens(generated) == pytest.approx(covered_tokens(recorded), abs=0.05)
    for requests in (generated, recorded):
        gaps = np.diff([request.arrival_s for request in requests])
        assert gaps.std() / gaps.mean() == pytest.approx(1.05, abs=0.06)


def test_generated_traffic_repeats_by_seed_and_goes_on_as_long_as_wanted() -> None:
    assert published_traffic("mooncake", 300, seed=1) == published_traffic("mooncake", 300, seed=1)
    assert published_traffic("mooncake", 300, seed=1) != published_traffic("mooncake", 300, seed=2)
    assert mean_rate(published_traffic("azure", 40_000)) == pytest.approx(5.64, rel=0.05)
    for request in published_traffic("mooncake", 500):
        assert len(request.hash_ids) == -(-request.isl // request.hash_block_tokens)
    with pytest.raises(ConfigError, match="known: mooncake, azure"):
        published_traffic("burst")
