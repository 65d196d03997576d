"""The configuration: defaults, merging, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.config import ClusterConfig, fields, load_config, parse_size
from splitserve.core.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def test_nothing_said_is_one_prefill_and_one_decode_worker() -> None:
    config = load_config(None, {})
    assert config == ClusterConfig()
    assert [config.replicas(role) for role in ("prefill", "decode", "colocated")] == [1, 1, 0]


def test_colocated_workers_replace_the_default_pools() -> None:
    config = load_config(None, {"colocated.replicas": 2})
    assert [config.replicas(role) for role in ("prefill", "decode", "colocated")] == [0, 0, 2]


def test_flags_go_over_the_file_and_unset_ones_leave_it(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\nengine: {max_running: 8, kv_memory: 512MiB}\ndecode: {labels: {zone: b}}\n")
    config = load_config(path, {"engine.max_running": "9", "model": None, "prefill.replicas": 2})
    assert (config.model, config.engine.max_running, config.engine.kv_memory) == ("a", 9, 512 << 20)
    assert (config.replicas("prefill"), config.decode.labels) == (2, {"zone": "b"})


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n"), {}) == ClusterConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: {max_runing: 3}", r"engine\.max_runing: unknown key; did you mean engine\.max_running\?"),
        ("engine: {max_running: many}", r"engine\.max_running: got 'many', wanted: a valid integer"),
        ("engine: {max_running: 0}", r"engine\.max_running: got 0, wanted: greater than or equal to 1"),
        ("engine: {kv_memory: 12 parsecs}", r"engine\.kv_memory: got '12 parsecs', wanted: a size"),
        (
            "transport: pigeon",
            r"transport: got 'pigeon', wanted: 'auto', 'grpc', 'shared-memory', 'cuda-ipc', 'gloo' or 'nccl'",
        ),
        ("prefill: {min: 3, max: 2}", r"prefill: .*min is 3 and max is 2, wanted: min <= replicas <= max"),
        ("decode: {gpus: 1, tensor_parallel: 2}", r"decode\.gpus: got 1, wanted: at least its tensor_parallel, 2"),
        ("prefil: {min: 3}", r"prefil: unknown key; did you mean prefill\?"),
        ("model: a\nmodel: b", r"model stands there twice"),
        ("prefill:\n  min: 1\n  min: 2", r"min stands there twice"),
        ("decode: {replicas: 0}", r"1 prefill, 0 decode and 0 colocated workers cannot serve"),
        ("prefill: {replicas: 0}", r"0 prefill, 1 decode and 0 colocated workers cannot serve"),
        ("[1, 2]", r"got list, wanted keys and values"),
        ("a: {b", r"is not YAML"),
        (f"engine: {{kv_memory: {'9' * 400}GiB}}", r"engine\.kv_memory.*a size is bytes or a number with KiB"),
    ],
)
def test_a_wrong_file_is_told_by_name_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path, {})
    assert str(path) in error.value.message


def test_a_flag_below_a_section_that_is_no_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine: got 5, wanted keys and values"):
        load_config(write(tmp_path, "engine: 5"), {"engine.max_running": 1})


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml", {})


@given(st.integers(0, 10**6), st.sampled_from([("KiB", 10), ("MiB", 20), ("GiB", 30), ("gi", 30), ("", 0)]))
def test_sizes_have_binary_units(amount: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{amount}{unit[0]}") == amount << unit[1]


def test_every_key_has_a_default_and_says_what_it_means() -> None:
    for key, field in fields():
        assert not field.is_required(), key
        assert field.description, key


def test_pools_scale_within_their_bounds() -> None:
    config = load_config(None, {"prefill.min": 2, "prefill.max": 4})
    assert [config.replicas("prefill"), *config.bounds("prefill")] == [2, 2, 4]
    assert config.scaled({"prefill": 4, "decode": 9}).replicas("decode") == 9
    with pytest.raises(ConfigError, match=r"prefill: got 5 workers, wanted: 2 to 4; change prefill\.min or"):
        config.scaled({"prefill": 5})
    with pytest.raises(ConfigError, match="decode: got 0 workers, wanted: 1 to"):
        config.scaled({"decode": 0})


@pytest.mark.parametrize("key", ["log_dir", "trace_dir", "router.api_key_file", "scaling.calibration", "security.ca"])
def test_a_path_means_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    """Processes start in other directories than the command that read the file."""
    monkeypatch.chdir(tmp_path)
    others = {"security.cert": "own.pem", "security.key": "own.key"} if key == "security.ca" else {}
    value: object = load_config(None, {key: "here", **others})
    for name in key.split("."):
        value = getattr(value, name)
    assert value == tmp_path / "here"
