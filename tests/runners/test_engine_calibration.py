"""Calibration of an engine: planted engines come back, by their passes and through vLLM's
interface."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibration.devices.protocol import Description
from calibration.devices.replay import ReplayDevice
from calibration.runners import engine as measuring
from calibration.runners.cases import ModelRun
from calibration.runners.engine import (
    Pass,
    calibrated,
    depths,
    engine_times,
    operator_of,
    settings_of,
    workload_of,
)
from calibration.runners.vllm.worker import steps_of
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import Correction, EngineTimes, HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.models.library import load_model
from simulator.operators import BY_CODE
from simulator.prediction.table import predict
from simulator.uncertainty.forward import forward_passes
from simulator.workload import WorkloadBatch

OTHER: dict[str, Any] = {"engine": "vllm", "batch": 4, "seq": 128, "dtype": "fp32"}
MODEL = ModelRun(load_model("smollm2-135m"), "fp32", "vllm")
VERSIONS = {"vllm": "0.32.0", "hf": "5.24.0"}
SETTINGS = settings_of(("prefill", "decode"), (), ())
TOKENS = (1, 4, 16, 128, 512)
PLANTED = EngineTimes(
    version="0.32.0",
    source="planted",
    each_pass=2e-3,
    each_layer=6e-5,
    each_sequence=1e-4,
    host_log_sd=0.1,
    tokens=TOKENS,
    operators={
        "gemm": Correction((0.5, 0.55, 0.7, 0.9, 1.1), 0.02),
        "prefill_attention": Correction((0.6,) * 5, 0.02),
        "decode_attention": Correction((1.3,) * 5, 0.02),
        "elementwise": Correction((1.5, 1.4, 1.2, 0.8, 0.8), 0.02),
    },
)


def _hw(**engines: EngineTimes) -> HardwareProfile:
    return replace(load_hardware("cpu"), engines=engines)


def _passes(hw: HardwareProfile, model: ModelRun = MODEL) -> list[Pass]:
    """Return passes of the copies on a machine that runs as a profile predicts."""
    out = []
    for layers in depths(len(model.config.layers)):
        for setting in SETTINGS:
            w = workload_of(model, layers, *setting)
            p, operators = forward_passes(WorkloadBatch.of([w]), hw), dict[str, float]()
            for kind, seconds in zip(w.kind.tolist(), p.row_s.tolist()):
                name = BY_CODE[kind].name
                name = "attention" if name.endswith("attention") else name
                operators[name] = operators.get(name, 0.0) + seconds
            out.append(
                Pass(layers, *setting, float(p.total_s[0]), 0.0, operators, VERSIONS[model.engine])
            )
    return out


@pytest.mark.quick
def test_a_planted_engine_comes_back() -> None:
    found = engine_times(_passes(_hw(vllm=PLANTED)), MODEL, _hw(), "test")
    for name, one in PLANTED.operators.items():
        same = found.operators[name]
        at = [TOKENS.index(t) for t in ((128, 512) if name.startswith("prefill") else (1, 4, 16))]
        assert np.array(same.factors)[at] == pytest.approx(np.array(one.factors)[at], rel=0.03)
        assert same.log_sd < 0.15
    for name in ("each_pass", "each_layer", "each_sequence"):
        assert getattr(found, name) == pytest.approx(getattr(PLANTED, name), rel=0.02)


def test_a_calibration_corrects_dense_times_and_keeps_the_width_of_speedups() -> None:
    hw = _hw()
    found = calibrated(_passes(_hw(vllm=PLANTED)), MODEL, hw)
    after = np.array([one.after_s / one.seconds for one in found.compared])
    before = np.array([one.before_s / one.seconds for one in found.compared])
    assert np.abs(after - 1.0).max() < 0.05 < np.abs(before - 1.0).max()
    # part of a measured host's time may fall with the work, which the interval includes
    assert found.half_after < 1.05 * found.half_before
    given: dict[str, Any] = {"phase": "decode", "batch": 4, "seq": 128, "dtype": "fp32"}
    true, best, plain = (
        predict("smollm2-135m", "width mlp=0.5", one, engine="vllm", **given)
        for one in (_hw(vllm=PLANTED), found.profile, hw)
    )
    assert best.speedup == pytest.approx(true.speedup, rel=0.01)
    assert abs(math.log(best.speedup / true.speedup)) < abs(math.log(plain.speedup / true.speedup))
    same = predict("smollm2-135m", "width mlp=0.5", found.profile, engine="vllm@0.30", **given)
    # a release of the same generation
    assert (same.speedup, same.dense_s) == (best.speedup, best.dense_s)
    # another generation, another engine: as before
    for other in ("vllm@0.10", "hf"):
        one, two = (
            predict("smollm2-135m", "depth 0.25", h, engine=other, **given)
            for h in (found.profile, hw)
        )
        assert (one.dense_s, one.lower) == (two.dense_s, two.lower)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("gemm", "attention", "each_pass"),
    [
        (0.75, 1.0, 6.3e-4),
        (1.35, 1.0, 6.3e-4),
        (1.0, 1.0, 4e-3),
        (1.0, 1.6, 6.3e-4),
        (0.75, 1.3, 2e-3),
    ],
    ids=["faster products", "slower products", "slower host", "slower attention", "all"],
)
def test_a_dense_time_finds_a_common_cause_or_widens(
    phase: str, gemm: float, attention: float, each_pass: float
) -> None:
    """The measured time of a planted machine never makes the speedups of its pruned models worse
    than noise does."""
    kernels = {"gemm": gemm, "prefill_attention": attention, "decode_attention": attention}
    operators = {name: Correction((factor,), 0.02) for name, factor in kernels.items()}
    machine = replace(
        PLANTED,
        tokens=(1,),
        operators=operators,
        each_pass=each_pass,
        each_layer=0.0,
        each_sequence=0.0,
    )
    given: dict[str, Any] = {
        "phase": phase,
        "batch": 4,
        "seq": 128,
        "dtype": "fp32",
        "engine": "vllm",
    }
    without, knowing, inside = [], [], []
    for text in (
        "depth 0.25",
        "depth 0.5",
        "width mlp=0.5",
        "width hidden=0.34",
        "width attention=0.34",
    ):
        true = predict("smollm2-135m", text, _hw(vllm=machine), **given)
        plain = predict("smollm2-135m", text, _hw(), **given)
        told = predict("smollm2-135m", text, _hw(), **given, dense_s=true.dense_s)
        without.append(abs(math.log(plain.speedup / true.speedup)))
        knowing.append(abs(math.log(told.speedup / true.speedup)))
        inside.append(told.lower <= true.speedup <= told.upper)
    assert np.mean(knowing) < np.mean(without) + 0.005
    assert all(inside)


def test_the_section_is_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    save_hardware(replace(_hw(vllm=PLANTED), name="mine", aliases=(), path=None), file)
    assert load_hardware(file).engines == {"vllm": PLANTED}
    text = file.read_text()
    for old, new, reason in (
        (
            "tokens: [1, 4, 16, 128, 512]",
            "tokens: [1, 4]",
            "expected 2 numbers, one per number of tokens",
        ),
        ("tokens: [1, 4, 16, 128, 512]", "tokens: [4, 1, 16, 128, 512]", "expected rising numbers"),
        ("each_pass: 2 ms", "each_pass: -2 ms", "each_pass"),
        ("decode_attention:", "attention:", "operator"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=reason):
            load_hardware(file)


def test_the_launches_of_an_eager_host_are_not_counted_twice() -> None:
    """The planted machine is the profile itself, whose host launches more slowly than the kernels
    run."""
    hw, model = load_hardware("h100"), ModelRun(load_model("smollm2-135m"), "bf16", "hf")
    found = calibrated(_passes(hw, model), model, hw)
    assert found.times.each_pass == pytest.approx(1e-3, rel=0.02)
    assert found.times.each_layer < 1e-6
    for one in found.compared:
        assert one.after_s == pytest.approx(one.seconds, rel=0.03)


def test_an_interrupt_ends_with_the_passes_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Asked:
        requested = True

        def __enter__(self) -> Asked:
            return self

        def __exit__(self, *error: object) -> None: ...

    runner = SimpleNamespace(check=lambda case: None, close=lambda: None, least_s=0.0)
    monkeypatch.setattr(measuring, "Interrupt", Asked)
    monkeypatch.setattr(measuring, "runner_of", lambda device, model: runner)
    device = ReplayDevice(description=Description("cpu", "some CPU"))
    with pytest.raises(KeyboardInterrupt):
        measuring.observe(tmp_path / "run", device, MODEL, SETTINGS, 60.0)
    assert (tmp_path / "run" / "engine.vllm.jsonl").is_file()


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
def test_a_calibrated_engine_is_never_worse_than_none(noise: float) -> None:
    """Whatever the planted engine and the drift of its machine are, a calibration that is to be used
    predicts another model's dense times better than the profile alone."""
    rng = np.random.default_rng(round(100 * noise))
    used = 0
    for seed in range(6):
        planted = _hw(vllm=PLANTED) if seed % 2 else _hw()
        passes = [
            replace(one, seconds=one.seconds * scale, operators=kernels)
            for one, scale in zip(_passes(planted), np.exp(noise * rng.normal(size=10)))
            for kernels in ({name: s * scale for name, s in one.operators.items()},)
        ]
        found = calibrated(passes, MODEL, _hw())
        if found.judged("mine.yaml").status:
            continue
        used += 1
        errors = []
        for hw in (found.profile, _hw()):
            given = [
                predict("qwen3-0.6b", "depth 0.25", one, phase=phase, **OTHER).dense_s
                for phase in ("prefill", "decode")
                for one in (hw, planted)
            ]
            errors.append(np.abs(np.log(np.array(given[::2]) / np.array(given[1::2]))).mean())
        assert errors[0] < errors[1]
    assert used >= 3 - (noise > 0.0)


def test_copies_of_one_depth_do_not_separate_layers() -> None:
    passes = [one for one in _passes(_hw()) if one.layers == depths(30)[0]]
    with pytest.raises(InputError, match="two numbers of layers"):
        engine_times(passes, MODEL, _hw(), "test")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        ("_C::onednn_mm", "gemm"),
        ("aten::addmm", "gemm"),
        ("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "gemm"),
        ("_C::cpu_attention_with_kv_cache", "attention"),
        ("void flash::flash_fwd_splitkv_kernel<...>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_C::cpu_attn_reshape_and_cache", "elementwise"),
        ("## Call CompiledFxGraph None ##", "elementwise"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "elementwise"),
        ("aten::mul", "elementwise"),
        ("fused_moe_kernel", "experts"),
        ("aten::_grouped_mm", "experts"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("Memset (Device)", "elementwise"),
        ("Memcpy HtoD (Pageable -> Device)", ""),
        ("Memcpy DtoH (Device -> Pinned)", ""),
        ("vllm::unified_attention_with_output", ""),
        ("aten::linear", ""),
        ("aten::view", ""),
    ],
)
def test_kernels_are_named_by_their_operator(kernel: str, operator: str) -> None:
    assert operator_of(kernel) == operator


def _event(name: str, kind: str, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": duration, "tid": 1}


@pytest.mark.quick
def test_a_trace_is_read_by_steps_with_the_own_time_of_each_kernel() -> None:
    step = "execute_context_0(0)_generation_8(8)"
    cpu = [
        _event(step, "user_annotation", 100.0, 50.0),
        _event("aten::linear", "cpu_op", 105.0, 20.0),
        _event("aten::mm", "cpu_op", 106.0, 18.0),
        _event("aten::mm", "cpu_op", 130.0, 10.0),
        _event("aten::mm", "cpu_op", 160.0, 10.0),  # after the step
        {**_event("aten::mm", "cpu_op", 131.0, 10.0), "tid": 2},  # another thread
    ]
    (found,) = steps_of(cpu)
    assert found["name"] == step
    assert found["seconds"] == pytest.approx(50e-6)
    assert found["kernels"] == pytest.approx({"aten::linear": 2e-6, "aten::mm": 28e-6})
    gpu = [
        _event(step, "gpu_user_annotation", 200.0, 40.0),
        {**_event("nvjet_tst", "kernel", 210.0, 15.0), "tid": 7},
        {**_event("flash_fwd", "kernel", 226.0, 5.0), "tid": 7},
        {**_event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 232.0, 2.0), "tid": 7},
    ]
    (found,) = steps_of([*cpu, *gpu])
    copied = {"Memcpy DtoD (Device -> Device)": 2e-6}
    assert found["kernels"] == pytest.approx({"nvjet_tst": 15e-6, "flash_fwd": 5e-6, **copied})
