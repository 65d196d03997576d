"""A prediction is held against a measurement, percentile by percentile, and the history remembers."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from splitserve.core.errors import ConfigError
from splitserve.planner.verification import read_history, read_prediction, render, verify


def figures(p50: float, p90: float, p99: float) -> dict[str, float]:
    return {"p50": p50, "p90": p90, "p99": p99, "mean": p50, "max": p99, "n": 10}


def write(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(json.dumps(document))
    return path


def bench(path: Path, *, rate: float = 2.0, num_failed: int = 0, lag_s: float = 0.0, **summary: Any) -> Path:
    rows = [{"scheduled_s": index / rate} for index in range(11)]
    latencies = {
        "ttft_s": figures(0.100, 0.200, 0.400),
        "tpot_s": figures(0.020, 0.030, 0.040),
        "itl_s": figures(0.019, 0.029, 0.060),
    }
    document = {
        "ended_at": "2026-01-01T00:00:00+00:00",
        "summary": {"num_finished": len(rows) - num_failed, "max_send_lag_s": lag_s, **latencies, **summary},
        "requests": rows,
    }
    return write(path, document)


def simulation(path: Path, ttft: tuple[float, float, float], tpot: tuple[float, float, float]) -> Path:
    return write(path, {"rate": 2.0, "ttft_s": figures(*ttft), "tpot_s": figures(*tpot)})


def test_each_percentile_is_judged_by_its_tolerance(tmp_path: Path) -> None:
    predicted = simulation(tmp_path / "p.json", (0.114, 0.260, 0.9), (0.0175, 0.024, 0.04))
    found = verify(bench(tmp_path / "b.json"), predicted)
    verdicts = {(row.quantity, row.percentile): row.verdict for row in found.comparisons}
    assert verdicts == {
        ("ttft", "p50"): "held",  # +14 %
        ("ttft", "p90"): "missed",  # +30 %
        ("ttft", "p99"): "shown",
        ("tpot", "p50"): "held",  # -12.5 %
        ("tpot", "p90"): "held",  # -20 %
        ("tpot", "p99"): "shown",
    }
    assert not found.held
    assert found.notes == ()
    assert found.comparisons[0].error == pytest.approx(0.14)


def test_tolerances_can_be_tighter(tmp_path: Path) -> None:
    predicted = simulation(tmp_path / "p.json", (0.108, 0.2, 0.4), (0.02, 0.03, 0.04))
    result = bench(tmp_path / "b.json")
    assert verify(result, predicted).held
    assert not verify(result, predicted, tolerance={"p50": 0.05}).held


def test_the_chosen_cluster_of_a_plan_is_the_prediction(tmp_path: Path) -> None:
    answers = {
        "disaggregated": {"rate": 2.0, "ttft_s": figures(0.1, 0.2, 0.4), "tpot_s": figures(0.02, 0.03, 0.04)},
        "colocated": {"rate": 2.0, "ttft_s": figures(9, 9, 9), "tpot_s": figures(9, 9, 9)},
    }
    path = write(tmp_path / "plan.json", {"verdict": "disaggregate", **answers})
    assert read_prediction(path).values["ttft", "p90"] == 0.2
    write(path, {"verdict": "colocate", **answers})
    assert read_prediction(path).values["ttft", "p90"] == 9
    write(path, {"verdict": "infeasible", "disaggregated": None, "colocated": None})
    with pytest.raises(ConfigError, match="verdict is 'infeasible'; there is nothing to verify"):
        read_prediction(path)


def test_what_makes_the_two_incomparable_is_said(tmp_path: Path) -> None:
    predicted = simulation(tmp_path / "p.json", (0.1, 0.2, 0.4), (0.02, 0.03, 0.04))
    found = verify(bench(tmp_path / "b.json", rate=3.0, num_failed=2, lag_s=0.05), predicted)
    assert [note.split(":")[0] for note in found.notes] == [
        "the run sent 3 requests/s, the prediction is for 2",
        "2 of 11 requests failed in the run",
        "the client itself sent up to 50.0 ms late, which the run counts as TTFT",
    ]


def test_the_history_remembers_every_verification(tmp_path: Path) -> None:
    predicted = simulation(tmp_path / "p.json", (0.1, 0.2, 0.4), (0.02, 0.03, 0.04))
    history = tmp_path / "history.jsonl"
    verify(bench(tmp_path / "b.json"), predicted, history=history)
    slower = bench(tmp_path / "c.json", ttft_s=figures(0.3, 0.4, 0.5))
    found = verify(slower, predicted, history=history)
    rows = read_history(history)
    assert [row["held"] for row in rows] == [True, False]
    assert rows[1]["rows"][0] == {
        "quantity": "ttft",
        "percentile": "p50",
        "predicted_s": 0.1,
        "measured_s": 0.3,
        "error": pytest.approx(-2 / 3),
        "verdict": "missed",
    }
    console = Console(width=100, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(render(found, rows))
    text = console.export_text()
    assert "-66.7%" in text
    assert "of 2 verifications so far 1 held" in text


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ("{", "is not JSON"),
        ("[]", "holds list; wanted an object"),
        ('{"summary": {}}', "is not a result of `splitserve bench --json`"),
        ('{"summary": {"num_finished": 0}, "requests": []}', "share no percentile"),
    ],
)
def test_a_wrong_result_is_named(tmp_path: Path, document: str, what: str) -> None:
    predicted = simulation(tmp_path / "p.json", (0.1, 0.2, 0.4), (0.02, 0.03, 0.04))
    path = tmp_path / "b.json"
    path.write_text(document)
    with pytest.raises(ConfigError, match=what):
        verify(path, predicted)


def test_a_prediction_of_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="predicts nothing"):
        read_prediction(write(tmp_path / "p.json", {"rate": 1.0}))
    with pytest.raises(ConfigError, match="cannot read"):
        read_prediction(tmp_path / "missing.json")
