"""Arrivals, random prompts, prompt files and traces."""

from __future__ import annotations

from itertools import islice, pairwise, repeat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.client import ConfigError, Model
from splitserve.client.workload import (
    poisson_arrivals,
    prompts_workload,
    random_workload,
    read_trace,
    trace_workload,
)
from splitserve.planner.traces import read_trace as read_planned_trace

TINY = Model(name="tiny", max_model_len=2_000, vocab_size=1_000)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,374,44
2023-11-16 18:17:04.4799600,5000,109
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 1030, "output_length": 5, "hash_ids": [1, 2, 3]}
{"timestamp": 3000, "input_length": 1024, "output_length": 900, "hash_ids": [1, 2]}
{"timestamp": 4000, "input_length": 600, "output_length": 1, "hash_ids": [1, 9]}
"""


@given(st.floats(min_value=0.1, max_value=1e3), st.integers())
def test_poisson_arrivals_rise_and_repeat_with_their_seed(rate: float, seed: int) -> None:
    times_s = list(islice(poisson_arrivals(rate, seed), 50))
    assert all(earlier <= later for earlier, later in pairwise([0.0, *times_s]))
    assert times_s == list(islice(poisson_arrivals(rate, seed), 50))


def test_poisson_arrivals_have_their_rate() -> None:
    *_, last_s = islice(poisson_arrivals(20.0, seed=3), 20_000)
    assert last_s == pytest.approx(1_000, rel=0.03)  # 4 standard deviations


@given(st.integers(1, 64), st.integers(1, 8), st.integers())
def test_random_prompts_have_their_length_and_vocabulary(input_len: int, num_requests: int, seed: int) -> None:
    workload = random_workload(repeat(0.0), num_requests=num_requests, input_len=input_len, output_len=3, seed=seed)
    requests = list(workload.make(TINY))
    assert [len(request.prompt) for request in requests] == [input_len] * num_requests
    assert all(0 <= token < TINY.vocab_size for request in requests for token in request.prompt)
    assert all(request.ignore_eos and request.max_tokens == 3 for request in requests)


def test_a_prompt_file_gives_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  \ntwo ✓\nthree\n", encoding="utf-8")
    workload = prompts_workload(repeat(0.0), path, num_requests=2, output_len=9)
    requests = list(workload.make(TINY))
    assert [request.prompt for request in requests] == ["one", "two ✓"]
    assert {(request.max_tokens, request.ignore_eos) for request in requests} == {(9, False)}
    assert workload.num_requests == 2


def test_an_azure_trace_is_scaled_and_clipped(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    workload = trace_workload(path, num_requests=None, time_scale=2.0, max_input_len=1_950, seed=0)
    first, second = workload.make(TINY)
    assert (first.at_s, len(first.prompt), first.max_tokens) == (0.0, 374, 44)
    assert (second.at_s, len(second.prompt), second.max_tokens) == (pytest.approx(1.0), 1_950, 50)


def test_a_plain_trace_has_seconds_or_dates(tmp_path: Path) -> None:
    path = tmp_path / "plain.csv"
    path.write_text("timestamp,isl,osl\n7.5,9,2\n7,8,3\n")
    first, second = trace_workload(path, num_requests=None, time_scale=2.0, max_input_len=None, seed=0).make(TINY)
    assert (first.at_s, len(first.prompt), first.max_tokens) == (0.0, 8, 3)
    assert (second.at_s, len(second.prompt), second.max_tokens) == (1.0, 9, 2)
    path.write_text("timestamp,isl,osl\n2023-11-16 18:17:03,9,2\n2023-11-16 18:17:04,8,3\n")
    workload = trace_workload(path, num_requests=None, time_scale=1.0, max_input_len=None, seed=0)
    assert [request.at_s for request in workload.make(TINY)] == [0.0, 1.0]


def test_rounded_times_are_sent_as_a_plan_simulates_them(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [f'{{"timestamp": {3000 * (i // 9)}, "input_length": {i + 1}, "output_length": 9}}\n' for i in range(90)]
    path.write_text("".join(rows))
    workload = trace_workload(path, num_requests=None, time_scale=1.0, max_input_len=None, seed=4)
    planned = read_planned_trace(path, seed=4)
    sent = [(request.at_s, len(request.prompt)) for request in workload.make(TINY)]
    assert sent == [(request.arrival_s, request.isl) for request in planned.requests]
    assert len({at_s for at_s, _ in sent}) == 90
    assert workload.notes == planned.notes
    assert "rounded to 3 s" in workload.notes[0]


def test_a_mooncake_trace_shares_the_prefixes_it_recorded(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    path.write_text(MOONCAKE)
    workload = trace_workload(path, num_requests=None, time_scale=0.5, max_input_len=None, seed=0)
    first, second, third = workload.make(TINY)
    assert [request.at_s for request in (first, second, third)] == [0.0, 1.0, 1.5]
    assert [len(request.prompt) for request in (first, second, third)] == [1_030, 1_024, 600]
    assert first.prompt[:1_024] == second.prompt
    assert third.prompt[:512] == first.prompt[:512]
    assert third.prompt[512:] != first.prompt[512:600]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n2023-11-16,3\n", "line 2: KeyError"),
        ("a.csv", AZURE + "yesterday,1,1\n", "line 4: ValueError"),
        ("a.csv", "timestamp,isl,osl\nnan,1,1\n", "line 2: .*the time is nan"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("a.jsonl", "{\n", "line 1: JSONDecodeError"),
        ("a.jsonl", "[]\n", "line 1: TypeError"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 0, "output_length": 1}', "both must be at least 1"),
        (
            "a.jsonl",
            '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
            "1 hash ids are too few",
        ),
    ],
)
def test_a_damaged_trace_names_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        trace_workload(path, num_requests=None, time_scale=1.0, max_input_len=None, seed=0)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nope\.csv"):
        list(read_trace(tmp_path / "nope.csv"))
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match=r"cannot read .*utf-8"):
        prompts_workload(repeat(0.0), path, num_requests=None, output_len=1)
