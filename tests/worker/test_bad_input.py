"""What a worker cannot be started with is one line that says what to do, and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from splitserve.cli.main import app
from splitserve.core.errors import ConfigError
from splitserve.engine.loading import check_dtype
from splitserve.engine.testing import make_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

Damage = Callable[[Path], None]


def nothing(path: Path) -> None:
    pass


def lose_a_shard(path: Path) -> None:
    (path / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama", path.parent / "whole"))
    model.save_pretrained(path, max_shard_size="100KB")
    sorted(path.glob("model-*.safetensors"))[1].unlink()


def spoil_the_index(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weights": 1}))


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (lose_a_shard, [], "weight files (model-00002-of-"),
        (spoil_the_index, [], "model.safetensors.index.json is damaged; download the model again"),
        (nothing, ["--dtype", "float8"], "--dtype: got 'float8', wanted: 'float32', 'bfloat16' or 'float16'"),
        (nothing, ["--tensor-parallel", "3"], "--tensor-parallel is 3, which does not divide the model's 4 attention"),
        (nothing, ["--tensor-parallel", "0"], "--tensor-parallel: got '0', wanted: greater than or equal to 1"),
        (
            nothing,
            ["--num-kv-blocks", "8", "--max-model-len", "512"],
            "has room for 128 tokens, one request may have 512",
        ),
        (nothing, ["--device", "cuda:99", "--tensor-parallel", "2"], "device 'cuda:99' is not here"),
    ],
)
def test_a_worker_that_cannot_start_says_why(damage: Damage, flags: list[str], message: str, tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "model")
    damage(path)
    words = ["decode-worker", "--role", "colocated", "--model", str(path), "--no-self-check", *flags]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_gpu_without_bfloat16_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    check_dtype("float16", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"Tesla T4 \(compute capability 7\.5\) has no bfloat16 .* --dtype float16"):
        check_dtype("bfloat16", torch.device("cuda"))


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_refused(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    words = [
        "decode-worker",
        "--role",
        "colocated",
        "--model",
        str(path),
        "--device",
        "cuda",
        "--tensor-parallel",
        "64",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "--tensor-parallel 64 takes as many GPUs from cuda:0 on" in result.stderr
