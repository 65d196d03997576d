"""The picture of what `benchmarks.disaggregation` measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from splitserve.benchmarks import disaggregation_plot
from splitserve.benchmarks.disaggregation_plot import main, rows_of
from typer.testing import CliRunner

RUNS = sorted((Path(disaggregation_plot.__file__).parent / "data").glob("*.json"))


def _invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_the_runs_that_are_kept_become_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    code, said = _invoke(*map(str, RUNS), "--out", str(out))
    assert code == 0, said
    assert len(RUNS) == 4
    assert out.read_bytes().startswith(b"\x89PNG")


def test_loads_that_a_run_lacks_are_left_out(tmp_path: Path) -> None:
    split, replicas = (rows_of(path) for path in (RUNS[0], RUNS[-1]))
    assert (8192, 128, 3.0) in split
    assert (8192, 128, 3.0) not in replicas


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}]}'])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.json"
    other.write_text(text, encoding="utf-8")
    code, said = _invoke(str(other), "--out", str(tmp_path / "picture.png"))
    assert code == 2
    assert "other.json" in re.sub(r"[\s│]", "", said)  # whatever the width of the box around it breaks
    assert not (tmp_path / "picture.png").exists()
