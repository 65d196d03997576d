"""Commands, flags and documents that are made from the configuration stay true to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import typer
from splitserve.cli.main import app
from splitserve.core.config import WORKER_ROLES, ClusterConfig, Role, WorkerRole, load_config
from splitserve.core.errors import ConfigError
from splitserve.deploy.config_docs import BEGIN, tables
from splitserve.deploy.options import router_options, worker_options
from splitserve.deploy.roles import default_threads, flag, role_command, role_keys, role_needs
from splitserve.engine.options import EngineOptions
from splitserve.router.server import RouterOptions
from splitserve.worker.options import WorkerOptions
from typer.testing import CliRunner

ROLES: tuple[Role, ...] = ("router", "prefill", "decode", "colocated")


def parse(command: tuple[str, ...]) -> dict[str, object]:
    """What the subcommand's own parser makes of a command line, past the interpreter and the -v."""
    group = typer.main.get_command(app)
    words = list(command[command.index("-v") + 1 :])
    _, subcommand, rest = group.resolve_command(typer.Context(group), words)  # type: ignore[attr-defined]
    return dict(subcommand.make_context("test", rest).params)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_s_command_carries_every_key_that_is_not_a_default(role: Role, tmp_path: Path) -> None:
    changed = {
        "model": "m",
        "trace_dir": str(tmp_path),
        "transport": "grpc",
        "lease_s": 7.0,
        "engine.kv_memory": 1 << 20,
        "engine.dtype": "bfloat16",
        "engine.prefix_cache": False,
        "router.max_queued": 3,
    }
    config = load_config(None, changed)
    words = role_command(config, role, name="x-0", host="127.0.0.1", port=5, num_threads=2)
    given = parse(tuple(words))
    expected = {key: value for key, value in changed.items() if key in role_keys(role)}
    assert {key: given[key.rpartition(".")[2]] for key in expected} == {
        key: value if isinstance(value, bool) else str(value) for key, value in expected.items()
    }
    assert (given["port"], given["host"]) in ((5, "127.0.0.1"), ("5", "127.0.0.1"))


def test_defaults_are_those_of_the_roles_own_options() -> None:
    config = ClusterConfig()
    where = {"host": "127.0.0.1", "metrics_port": 0}
    worker = worker_options(config, "prefill", port=0, worker_id="", num_threads=None, **where)
    defaults = WorkerOptions(
        engine=EngineOptions(model=config.model, shared_pool=True),
        role="prefill",
        drain_timeout_s=config.drain_timeout_s,
        local_prefill=config.engine.local_prefill,
    )
    assert worker == defaults
    router = router_options(config, prefill=(), decode=(), metrics_port=0, router_id="")
    assert router == RouterOptions(model=config.model, http_port=8000, drain_timeout_s=config.drain_timeout_s)


def test_every_option_of_the_engine_and_the_router_can_be_set() -> None:
    keys = {key.rpartition(".")[2] for role in ROLES for key in role_keys(role)}
    # Derived, or a flag of its own.
    own = {"kv_memory_bytes", "num_threads", "shared_pool", "kv_dtype", "model_name", "max_packed_tokens"}
    for options in (EngineOptions, RouterOptions):
        names = {field.name for field in dataclasses.fields(options)} - own
        assert names - keys <= {"prefill", "decode", "metrics_port", "router_id", "controller_key_sha256", "tls"}


def test_threads_are_shared_out_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert default_threads(ClusterConfig()) == 4
    assert default_threads(load_config(None, {"prefill.replicas": 8, "decode.replicas": 8})) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prefill-worker", "--max-running", "x"], "--max-running: got 'x', wanted: a valid integer"),
        (["decode-worker", "--kv-memory", "1 house"], "--kv-memory: got '1 house', wanted: a size"),
        (["router", "--port", "70000"], "--port: got '70000', wanted: less than or equal to 65535"),
        (["prefill-worker", "--block-size", "24"], "block_size is 24; it must be a multiple of 16"),
        (["up", "--decode", "0"], "cannot serve a request"),
    ],
)
def test_wrong_flags_are_one_clear_line_and_exit_2(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_config_docs_are_up_to_date() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
    _, marker, made = path.read_text(encoding="utf-8").partition(BEGIN)
    assert marker
    assert made.strip() == tables().strip(), f"run `python -m splitserve.deploy.config_docs {path}`"


def test_a_flag_is_the_last_part_of_its_key() -> None:
    assert flag("engine.max_running") == "--max-running"


@pytest.mark.parametrize("role", WORKER_ROLES)
def test_a_pool_with_gpus_computes_there(role: WorkerRole) -> None:
    config = load_config(None, {f"{role}.replicas": 1, f"{role}.gpus": 1})
    options = worker_options(config, role, host="127.0.0.1", port=0, metrics_port=0, worker_id="w", num_threads=None)
    assert options.engine.device == "cuda"
    assert options.transports[0] == "cuda_ipc"


def test_a_worker_whose_gpu_is_not_here_says_so() -> None:
    result = CliRunner().invoke(app, ["prefill-worker", "--device", "cuda:63"])
    assert result.exit_code == 2
    assert "device 'cuda:63' is not here" in result.stderr


def test_the_ranks_of_a_worker_are_placed_as_one() -> None:
    split = {"engine.tensor_parallel": 2, "colocated.replicas": 1, "colocated.threads": 3, "colocated.gpus": 2}
    needs = role_needs(load_config(None, split), "colocated")
    assert needs.bundle() == {"CPU": 6.0, "GPU": 2.0}
    assert needs.num_threads == 3
    with pytest.raises(ConfigError, match=r"colocated\.gpus: got 1, wanted: at least its tensor_parallel, 2"):
        load_config(None, {**split, "colocated.gpus": 1})
