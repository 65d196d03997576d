"""The latency model: its terms, its layers, and that what is shipped is what the script fits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from splitserve.benchmarks import latency_fit
from splitserve.planner.gpus import load_gpu
from splitserve.planner.latency import StepLatency, engine_names, latency_for
from splitserve.planner.models import WeightDtype, load_model
from splitserve.planner.terms import Deployment, step_terms


def deployment(
    model: str = "llama-3.1-8b", gpu: str = "h200", tp: int = 1, dtype: WeightDtype = "bfloat16"
) -> Deployment:
    return Deployment(model=load_model(model), gpu=load_gpu(gpu), tp=tp, dtype=dtype, kv_dtype="bfloat16")


def test_terms_follow_bytes_and_operations() -> None:
    terms = step_terms(deployment())
    assert terms.weights_s == pytest.approx((8.03e9 - 0.525e9) * 2 / 4.8e12, rel=0.01)  # all but the embeddings
    assert terms.context_s == pytest.approx(131_072 / 4.8e12)
    assert terms.token_s == pytest.approx(2 * 6.98e9 / 989e12, rel=0.01)
    assert terms.collective_s == terms.collective_token_s == 0


def test_tensor_parallelism_divides_work_and_adds_collectives() -> None:
    one, four = step_terms(deployment()), step_terms(deployment(tp=4))
    assert four.weights_s == pytest.approx(one.weights_s / 4)
    assert four.context_s == pytest.approx(one.context_s / 4)
    assert four.collective_s > 0
    assert four.collective_token_s > 0
    wide = step_terms(deployment("qwen3-30b-a3b", tp=8))  # 4 KV heads on 8 ranks: each head is read twice
    assert wide.context_s == pytest.approx(step_terms(deployment("qwen3-30b-a3b", tp=4)).context_s)


def test_quantised_weights_are_read_faster_and_multiplied_faster_where_the_device_can() -> None:
    wide, narrow = step_terms(deployment()), step_terms(deployment(dtype="fp8"))
    assert 0.5 < narrow.weights_s / wide.weights_s < 0.58  # the head stays in 16 bits
    assert narrow.token_s < wide.token_s * 0.51
    assert step_terms(deployment(dtype="int4")).token_s == wide.token_s


def test_a_step_reads_the_experts_that_its_tokens_chose() -> None:
    terms = step_terms(deployment("qwen3-30b-a3b"))
    assert terms.expert_fraction(1) == pytest.approx(8 / 128)
    assert terms.expert_fraction(64) == pytest.approx(1 - (1 - 8 / 128) ** 64)
    latency, _ = latency_for(deployment("qwen3-30b-a3b"), "splitserve")
    small, large = latency.decode_step_s(1, 100), latency.decode_step_s(64, 6400)
    assert large > small * 3  # nearly all experts instead of 8 of 128


def test_a_window_bounds_what_decode_reads() -> None:
    latency, _ = latency_for(deployment("gemma-3-27b"), "splitserve")
    short, long = latency.decode_step_s(1, 1_000), latency.decode_step_s(1, 100_000)
    full = replace(latency, window=1e9)
    assert full.decode_step_s(1, 100_000) - full.decode_step_s(1, 1_000) > 5 * (long - short)


@pytest.mark.parametrize("engine", ["splitserve", "vllm", "trtllm", "sglang", "roofline"])
def test_steps_grow_with_work_and_a_mixed_step_costs_less_than_two(engine: str) -> None:
    latency, provenance = latency_for(deployment(), engine)
    assert (
        latency.prefill_step_s([(512, 0)])
        < latency.prefill_step_s([(1024, 0)])
        < latency.prefill_step_s([(1024, 8192)])
    )
    assert latency.decode_step_s(1, 100) < latency.decode_step_s(64, 6400) < latency.decode_step_s(64, 64_000)
    mixed = latency.mixed_step_s([(512, 0)], 32, 32_000)
    apart = latency.prefill_step_s([(512, 0)]) + latency.decode_step_s(32, 32_000)
    assert max(latency.prefill_step_s([(512, 0)]), latency.decode_step_s(32, 32_000)) < mixed < apart
    assert latency.mixed_step_s([], 32, 32_000) == latency.decode_step_s(32, 32_000)
    assert 0 < provenance.tpot_error < 1


def test_a_prompt_in_chunks_costs_what_its_steps_cost() -> None:
    latency, _ = latency_for(deployment(), "vllm")
    steps = [latency.prefill_step_s([(2048, 2048 * step)]) for step in range(4)]
    assert latency.prompt_s(8192, 2048) == pytest.approx(sum(steps))


def test_the_model_is_near_what_engines_measured_on_an_h200() -> None:
    """vLLM 0.24 and our engine, Llama-3.1-8B shape: single steps, which no fit but ours saw."""
    for engine, decode_64, prefill_2048 in (("vllm", 7.74e-3, 49.5e-3), ("splitserve", 6.84e-3, 48.1e-3)):
        latency, _ = latency_for(deployment(), engine)
        assert latency.decode_step_s(64, 64 * 1100) == pytest.approx(decode_64, rel=0.12)
        assert latency.prefill_step_s([(2048, 0)]) == pytest.approx(prefill_2048, rel=0.2)


def test_error_bands_widen_outside_what_was_measured() -> None:
    _, inside = latency_for(deployment(), "vllm")
    _, other_gpu = latency_for(deployment(gpu="mi300x"), "vllm")
    _, experts = latency_for(deployment("mixtral-8x7b"), "vllm")
    assert inside.layer == "shipped"
    assert other_gpu.tpot_error > inside.tpot_error
    assert "mi300x not among them" in other_gpu.source
    assert "mixture of experts" in experts.source
    assert latency_for(deployment(gpu="cpu"), "splitserve")[1].layer == "roofline"


def test_knees_make_later_tokens_dearer() -> None:
    plain = StepLatency(
        prefill_base_s=1.0,
        prefill_token_s=0.001,
        prefill_pair_s=0.0,
        prefill_sequence_s=0.0,
        decode_base_s=1.0,
        decode_sequence_s=0.0,
        decode_context_s=0.0,
    )
    bent = replace(plain, prefill_knees=((256.0, 0.002),))
    assert bent.prefill_step_s([(256, 0)]) == plain.prefill_step_s([(256, 0)])
    assert bent.prefill_step_s([(300, 0), (56, 0)]) == pytest.approx(plain.prefill_step_s([(356, 0)]) + 0.2)
    assert bent.prompt_s(512, 256) == plain.prompt_s(512, 256)


def test_shipped_coefficients_are_what_the_script_fits_and_meet_the_goals() -> None:
    """A third of the points, so that a changed script or changed terms are noticed within seconds."""
    points = latency_fit.read_points(latency_fit._DATA / "silicon_points.csv")
    assert len(points) == 469
    shipped = json.loads(latency_fit._COEFFICIENTS.read_text())
    mine = [point for point in points if point.engine == "trtllm"]
    fit = latency_fit.ClosedLoopFit(mine)
    named = latency_fit._named(fit.coefficients)
    for part in ("decode", "prefill"):
        assert named[part] == pytest.approx(shipped["engines"]["trtllm"][part], rel=1e-2, abs=1e-3)
    errors = shipped["errors"]["five_fold"]
    assert errors["tpot"] <= 0.12
    assert errors["ttft"] <= 0.36
    assert set(shipped["engines"]) == set(engine_names()) - {"roofline"}


@pytest.mark.verify
def test_accuracy_on_public_measurements() -> None:
    points = latency_fit.read_points(latency_fit._DATA / "silicon_points.csv")
    tpot, ttft = latency_fit.held_out(points, latency_fit.folds(len(points), 5, 7), [point.engine for point in points])
    assert tpot.mean() <= 0.12
    assert ttft.mean() <= 0.36


def test_a_prompt_size_that_was_left_out_is_predicted() -> None:
    errors = latency_fit.splitwise_errors()
    if errors is None:
        pytest.skip("splitwise_perf_model.csv is not in SPLITSERVE_DATA (docs/planner.md says where to get it)")
    assert errors["prompt time"] <= 0.08
    assert errors["token time"] <= 0.08
