"""A user's calibration measures PyTorch's kernels: engines with other kernels get the spread
between stacks."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from calibration.fit.profile import fit_profile
from calibration.records.timing_table import Records, Source
from simulator import load_hardware, predict
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.operators.base import OTHER_STACK, SAME_STACK

TORCH, VLLM = Source("GPU", {"torch": "2.13"}), Source("GPU", {"vLLM": "0.19"})


def rows(*sources: Source, gemms: bool = True) -> Records:
    """GEMMs (if wanted) and decode attention of an H100, slower than its roofline."""
    rng = np.random.default_rng(2)
    m, n, k = (rng.choice([64, 256, 1024, 4096], 40) for _ in range(3))
    products = {
        "m": m,
        "n": n,
        "k": k,
        "seconds": 5e-6 + 2.0 * m * n * k / 5e14 + 2.0 * n * k / 2e12,
    }
    batch, kv = (
        np.repeat([1, 4, 16, 64], 8),
        np.tile([128, 256, 512, 1024, 2048, 4096, 8192, 16384], 4),
    )
    calls = {"batch": batch, "q_len": 1, "kv_len": kv, "heads": 32, "kv_heads": 8, "head_dim": 128}
    seconds = 8e-6 + 4096.0 * batch * kv / 2e12
    parts = [
        Records.from_columns([source], **columns)
        for source in sources
        for columns in (products, {"operator": "attention_decode", **calls, "seconds": seconds})
        if gemms or "operator" in columns
    ]
    return Records.concat(parts)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, three_folds: None) -> HardwareProfile:
    """The profile that a calibration writes, read again."""
    base = replace(
        load_hardware("h100"), sections=MappingProxyType({}), stacks=MappingProxyType({}), stack=""
    )
    path = tmp_path_factory.mktemp("own") / "profile.yaml"
    save_hardware(fit_profile(base, rows(TORCH)).profile, path)
    return load_hardware(path)


def test_sections_that_a_device_measured_are_of_torch(calibrated: HardwareProfile) -> None:
    assert (calibrated.own_stack, calibrated.stack, list(calibrated.stacks)) == ("torch", "", [""])
    for key in (("gemm", "bf16"), ("attention_decode", "bf16")):
        assert (calibrated.sections[key].stack, calibrated.sections[key].status) == (
            "torch",
            "calibrated",
        )


@pytest.mark.quick
@pytest.mark.parametrize("sources", [(VLLM,), (TORCH, VLLM), (Source("GPU"),)])
def test_tables_of_other_or_unknown_software_count_for_every_engine_as_before(
    sources: tuple[Source, ...],
) -> None:
    base = replace(load_hardware("h100"), sections=MappingProxyType({}))
    fitted = fit_profile(base, rows(*sources, gemms=False)).profile
    section = fitted.sections["attention_decode", "bf16"]
    assert (fitted.own_stack, section.stack) == ("", "")
    assert fitted.serving(("vllm", "torch")).error_scales(section)[0] == SAME_STACK


def test_only_engines_that_run_its_kernels_get_the_narrow_interval(
    calibrated: HardwareProfile,
) -> None:
    section = calibrated.sections["attention_decode", "bf16"]
    scales = {
        engine: calibrated.serving(stacks).error_scales(section)[0]
        for engine, stacks in (("hf", ("torch", "vllm")), ("vllm", ("vllm", "torch")), ("own", ()))
    }
    assert scales == {"hf": SAME_STACK, "vllm": OTHER_STACK, "own": SAME_STACK}

    def half_width(engine: str, hw: HardwareProfile = calibrated) -> float:
        found = predict(
            "llama-3.1-8b", "width 0.25", hw, phase="decode", batch=64, seq=8192, engine=engine
        )
        return float(found.dense_upper / found.dense_lower)

    widths = {engine: half_width(engine) for engine in ("reference", "vllm")}
    assert widths["vllm"] > 1.2 * widths["reference"]
    declared = replace(calibrated, same_stack=True)  # the user says that the kernels are the same
    assert half_width("vllm", declared) < widths["vllm"]
