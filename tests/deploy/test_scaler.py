"""Signals from what members, workers and routers say; decisions that are the same again when they are replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from splitserve.cli.main import app
from splitserve.core.config import ClusterConfig, load_config
from splitserve.core.errors import ConfigError
from splitserve.deploy.load_signals import LoadSignals, RouterCounts
from splitserve.deploy.members import Member, Phase
from splitserve.deploy.process import Endpoint
from splitserve.deploy.scaler import Scaling, check_scaling, replay_log
from splitserve.planner.calibration import Calibration, KindFit, write_calibration
from splitserve.planner.latency import StepLatency
from splitserve.proto import inference_pb2, worker_pb2
from typer.testing import CliRunner


def config(**overrides: object) -> ClusterConfig:
    base = {"scaling.enabled": True, "prefill.max": 4, "decode.max": 4, "scaling.cold_start_s": 0.0}
    return load_config(None, base | {key.replace("__", "."): value for key, value in overrides.items()})


def member(name: str, phase: Phase = Phase.READY) -> Member:
    role = "prefill" if name.startswith("prefill") else "decode"
    return Member(
        name=name,
        role=role,  # type: ignore[arg-type]
        phase=phase,
        endpoint=Endpoint(address=name, metrics_address="", boot_id="b", pid=1) if phase is Phase.READY else None,
    )


def status(**values: object) -> worker_pb2.GetWorkerStatusResponse:
    known = {"num_blocks": 100, "num_free_blocks": 50, "num_cached_blocks": 25, "prefill_tokens_per_s": 1000.0}
    return worker_pb2.GetWorkerStatusResponse(
        info=worker_pb2.WorkerInfo(block_size=16),
        status=worker_pb2.WorkerStatus(**{**known, **values}),  # type: ignore[arg-type]
    )


def counts(boot_id: str = "r", **values: object) -> dict[str, RouterCounts]:
    traffic = inference_pb2.TrafficCounts(**values)  # type: ignore[arg-type]
    return {"router-0": RouterCounts(boot_id=boot_id, counts=traffic, num_queued=3)}


def test_signals_are_differences_of_counts_and_the_workers_own_words() -> None:
    signals = LoadSignals(90.0)
    members = [
        member("prefill-0"),
        member("decode-0"),
        member("decode-1", Phase.PLACING),
        member("decode-2", Phase.FAILED),
    ]
    signals.gather(10.0, members, {}, counts(num_arrived=100, prompt_tokens=9_000))
    ttft = [0] * 140
    ttft[30] = 5  # 17 ms
    found = signals.gather(
        12.0,
        members,
        {"decode-0": status(num_running=4, num_held=1)},
        counts(num_arrived=110, prompt_tokens=9_500, cached_tokens=200, queued_prompt_tokens=70, ttft_counts=ttft),
    )
    traffic = found.traffic
    assert (traffic.interval_s, traffic.num_arrived, traffic.prefill_tokens, traffic.cached_tokens) == (
        2.0,
        10,
        300,
        200,
    )
    assert (traffic.num_queued, traffic.queued_prefill_tokens) == (3, 70)
    assert traffic.ttft_s == pytest.approx(0.017, rel=0.1)
    assert traffic.tpot_s is None
    assert [(w.worker, w.state, w.state_s) for w in found.decode] == [
        ("decode-0", "ready", 2.0),
        ("decode-1", "starting", 2.0),
    ]
    worker = found.decode[0]
    assert (worker.num_sequences, worker.kv_used, worker.kv_tokens) == (5, 0.25, 1600)

    # A router that was restarted counts from 0.
    again = signals.gather(13.0, members, {}, counts(boot_id="other", num_arrived=2, prompt_tokens=30))
    assert (again.traffic.num_arrived, again.traffic.prefill_tokens) == (2, 30)


def test_a_worker_that_is_restarted_is_on_its_way_and_one_that_leaves_is_not(tmp_path: Path) -> None:
    scaling = Scaling(config(), tmp_path)
    signals = scaling.signals.gather(1.0, [member("prefill-0"), member("decode-0")], {}, {})
    assert not scaling.decide(signals).actions
    members = [member("prefill-0", Phase.DRAINING), member("decode-0")]
    restarted = scaling.signals.gather(2.0, members, {}, {})
    assert [worker.state for worker in restarted.prefill] == ["starting"]
    assert not scaling.decide(restarted).actions
    leaves = scaling.signals.gather(3.0, members, {}, {}, leaving={"prefill-0"})
    assert [worker.state for worker in leaves.prefill] == ["draining"]
    assert [(action.kind, action.pool) for action in scaling.decide(leaves).actions] == [("start", "prefill")]


def overload(log_dir: Path, cluster: ClusterConfig) -> Path:
    """A log in which prompts come faster than one worker computes them."""
    scaling = Scaling(cluster, log_dir)
    members = [member("prefill-0"), member("decode-0")]
    statuses = {"prefill-0": status(), "decode-0": status(decode_step_s=0.01, num_running=1)}
    decisions = [
        scaling.decide(
            scaling.signals.gather(
                float(second), members, statuses, counts(num_arrived=10 * second, prompt_tokens=5_000 * second)
            )
        )
        for second in range(12)
    ]
    assert [d for d in decisions if any(a.kind == "start" and a.pool == "prefill" for a in d.actions)]
    return scaling.log_path


def test_decisions_are_logged_with_reasons_and_are_the_same_when_replayed(tmp_path: Path) -> None:
    log = overload(tmp_path, config())
    assert replay_log(log, config()) == (12, [])
    count, differing = replay_log(log, config(prefill__max=1))
    assert (count, len(differing) > 0) == (12, True)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("prefill 1 -> " in reason for row in rows for reason in row["decision"]["reasons"])


def test_the_command_shows_and_replays_a_log(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("scaling: {enabled: true, cold_start_s: 0}\nprefill: {max: 4}\ndecode: {max: 4}\n")
    log = overload(tmp_path, load_config(file, {}))
    shown = CliRunner().invoke(app, ["scaling", "show", str(log)])
    assert "start prefill" in shown.stdout
    again = CliRunner().invoke(app, ["scaling", "replay", str(log), str(file)])
    assert (again.exit_code, again.stdout) == (0, "12 decisions, all of them the same again\n")
    file.write_text("scaling: {enabled: true}\nprefill: {max: 1}\ndecode: {max: 4}\n")
    other = CliRunner().invoke(app, ["scaling", "replay", str(log), str(file)])
    assert (other.exit_code, "decisions differ" in other.stderr) == (1, True)


def test_another_policy_begins_another_log(tmp_path: Path) -> None:
    scaling = Scaling(config(), tmp_path)
    assert not scaling.outdated(config(prefill__replicas=3))
    assert scaling.outdated(config(slo__ttft_s=9.0))
    assert scaling.outdated(config(decode__max=5))


def test_a_decision_that_cannot_be_written_down_is_made_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scaling = Scaling(config(), tmp_path / "logs")
    (tmp_path / "logs").write_text("a file where the directory should be")
    signals = scaling.signals.gather(0.0, [member("prefill-0"), member("decode-0")], {}, {})
    assert scaling.decide(signals).reasons
    assert "a decision is not written down: " in caplog.text
    (tmp_path / "logs").unlink()
    scaling.decide(signals)
    assert len(scaling.log_path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("max_gpus: 1", "the GPU budget is 1 and the fewest workers of both pools hold 2"),
        ("percentile: 100", "the percentile is 100; wanted above 0 and below 100"),
        ("calibration: none.json", f"cannot read {Path.cwd() / 'none.json'}"),
    ],
)
def test_settings_that_cannot_decide_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaling: str, message: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    file = tmp_path / "cluster.yaml"
    file.write_text(f"scaling: {{enabled: true, {scaling}}}\nprefill: {{max: 4}}\ndecode: {{max: 4}}\n")
    for words in (["config", "check"], ["up", "--dry-run"], ["up"]):
        refused = CliRunner().invoke(app, [*words, str(file)])
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert message in refused.stderr
    check_scaling(load_config(file, {"scaling.enabled": False}))


@pytest.mark.parametrize(("held", "missing"), [("prefill", "decode"), ("decode", "prefill")])
def test_a_calibration_of_one_pool_alone_is_refused(tmp_path: Path, held: str, missing: str) -> None:
    costs = {f"{kind}_{cost}_s": 0.0 for kind in ("prefill", "decode") for cost in ("base", "sequence")}
    costs |= {"prefill_token_s": 0.0, "prefill_pair_s": 0.0, "decode_context_s": 0.0, f"{held}_base_s": 0.01}
    fit = KindFit(num_records=100, error=0.1, in_sample_error=0.1, low={}, high={})
    both = {"prefill": fit, "decode": fit}
    file = tmp_path / "calibration.json"
    found = Calibration(latency=StepLatency(**costs), source="made up", **both | {missing: None})
    write_calibration(file, found, {})
    with pytest.raises(ConfigError, match=f"calibration.json holds no {missing} steps"):
        check_scaling(config(scaling__calibration=file))
    write_calibration(file, Calibration(latency=StepLatency(**costs), source="made up", **both), {})
    check_scaling(config(scaling__calibration=file))


def test_scaling_needs_bounds() -> None:
    with pytest.raises(ConfigError, match=r"scaling\.enabled needs prefill\.max"):
        load_config(None, {"scaling.enabled": True})
