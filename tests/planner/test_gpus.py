"""Device sheets and links."""

from __future__ import annotations

from pathlib import Path

import pytest
from splitserve.core.errors import ConfigError
from splitserve.planner.gpus import link_bandwidth, load_gpu


def test_all_promised_devices_are_built_in() -> None:
    wanted = {"a10", "l4", "l40s", "a100-40", "a100-80", "h100", "h200", "b200", "mi300x", "cpu"}
    for name in wanted:
        gpu = load_gpu(name.upper())
        assert gpu.name == name
        assert gpu.memory_bytes > 1e9
        assert all(gpu.flops_for(dtype) > 0 for dtype in ("float32", "bfloat16", "fp8", "int8", "int4", "fp4"))


def test_weights_run_in_the_best_arithmetic_that_the_device_has() -> None:
    a100, h100 = load_gpu("a100-80"), load_gpu("h100")
    assert a100.flops_for("fp8") == a100.flops["bf16"]  # it has no fp8
    assert h100.flops_for("fp8") == h100.flops["fp8"]
    assert h100.flops_for("int4") == h100.flops["bf16"]  # weights are widened


def test_a_yaml_file_brings_its_own_device(tmp_path: Path) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text("h20: {memory_gb: 96, bandwidth_gb_s: 4000, tflops: {bf16: 148}, link_gb_s: 450, price: 2}\n")
    gpu = load_gpu(str(file))
    assert (gpu.name, gpu.price_per_hour, gpu.max_tp) == ("h20", 2, 8)
    file.write_text("h20: {memory_gb: 96}\n")
    with pytest.raises(ConfigError, match="h20: bandwidth_gb_s: Field required"):
        load_gpu(f"{file}:h20")
    for tflops, message in (("0", "greater than 0"), (".inf", "finite number")):
        file.write_text(f"h20: {{memory_gb: 96, bandwidth_gb_s: 4000, tflops: {{bf16: {tflops}}}, link_gb_s: 450}}\n")
        with pytest.raises(ConfigError, match=f"h20: tflops.bf16: .*{message}"):
            load_gpu(str(file))
    file.write_bytes(b"h20: \xff\n")
    with pytest.raises(ConfigError, match=f"cannot read {file}: it is not UTF-8 text"):
        load_gpu(str(file))
    file.write_text("h20: {memory_gb: 96}\n")
    with pytest.raises(ConfigError, match="holds h20; name one"):
        load_gpu(f"{file}:h21")


def test_unknown_devices_and_links_are_refused_with_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"did you mean h200\?"):
        load_gpu("h300")
    with pytest.raises(ConfigError, match="neither nvlink, ib400"):
        link_bandwidth("wire")
    with pytest.raises(ConfigError, match="must be above 0"):
        link_bandwidth("-1")
    assert link_bandwidth("12.5")[0] == 12.5e9
