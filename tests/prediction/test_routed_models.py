"""Whole models with routed experts and latent attention: times, bounds, engines, devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tables import tables_of

import simulator
from simulator.codes import Kind
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.operators.experts import experts_touched
from simulator.passes import launches
from simulator.prediction.gemms import gemm_points
from simulator.prediction.table import table
from simulator.uncertainty.forward import forward_passes
from simulator.uncertainty.intervals import workload_time
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

H200 = simulator.load_hardware("h200_sxm")
FP8 = {"dtype": "fp8", "weight_dtype": "fp8_block", "engine": "sglang"}
MODELS: dict[str, dict[str, Any]] = {"mixtral-8x7b": {}, "qwen3-30b-a3b": {}, "deepseek-v3": FP8}


def lowered(name: str, **options: Any) -> Workload:
    usual = {"phase": "decode", "batch": 16, "seq": 2048, "devices": 8, "engine": "vllm"}
    return simulator.lower(name, **{**usual, **MODELS.get(name, {}), **options})


@pytest.mark.parametrize("parallel", ["tensor", "expert"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_are_timed_within_physics(name: str, phase: str, parallel: str) -> None:
    w = lowered(name, phase=phase, parallel=parallel)
    found = workload_time(w, H200)
    assert (found.seconds >= found.roofline_s / H200.clock_headroom * (1 - 1e-9)).all()
    assert (found.lower <= found.seconds).all()
    assert (found.seconds <= found.upper).all()
    assert found.device_s == pytest.approx((found.seconds * w.count).sum() + found.gap_s)
    routed = w.kind == Kind.EXPERTS
    assert 0.02 < (found.seconds * w.count)[routed].sum() / found.device_s < 0.9


@pytest.mark.parametrize("name", MODELS)
def test_every_family_that_suits_is_predicted_and_the_others_say_why(name: str) -> None:
    options = MODELS[name]
    setting = {"devices": 8, **{k: v for k, v in options.items() if k != "engine"}}
    engine = [options.get("engine", "vllm")]
    found = table(
        [name], [H200], sparsity=[0.5], phase=["decode"], batch=[16], engine=engine, **setting
    )
    families = {r.family for r in found}
    # half of the heads and experts of each model can be divided by eight devices
    assert {
        "depth",
        "width",
        "width_cross",
        "experts",
        "kv_cache",
        "token",
        "dynamic_depth",
    } <= families
    assert not families & {"low_rank", "unstructured", "dynamic_width", "semi_structured"}
    assert sum("have no such kernels" in note for note in found.notes) == 4
    for r in found:
        assert r.speedup_lower <= r.speedup <= r.speedup_upper
        assert r.speedup < 1.02 * max(r.roofline_bound, 1.0)


@pytest.mark.parametrize(
    ("parallel", "family", "reason"),
    tables_of("prediction/cases.yaml")["undivided"],
)
def test_what_eight_devices_cannot_divide_is_excluded_with_one_note(
    parallel: str, family: str, reason: str
) -> None:
    setting: dict[str, Any] = {"devices": 8, "parallel": parallel, "batch": [1, 16]}
    found = table(["mixtral-8x7b"], [H200], ["depth", family], [0.25, 0.5], **setting)
    assert {(r.family, r.sparsity) for r in found} == {("depth", 0.25), ("depth", 0.5)} | (
        {("width", 0.5)} if family == "width" else set()
    )
    (note,) = [note for note in found.notes if reason in note]
    assert note.startswith(f"{family}: devices 8: mixtral-8x7b has {reason}; the nearest size")


def test_uneven_loads_read_fewer_weights_and_wait_for_the_busiest() -> None:
    even, usual, uneven = (
        workload_time(lowered("qwen3-30b-a3b", devices=1, skew=s), H200).total_s
        for s in (0, 0.8, 2)
    )
    assert uneven < usual < even  # few tokens: what is read rules
    many = {"phase": "prefill", "batch": 8, "devices": 1}
    flat, steep = (lowered("qwen3-30b-a3b", **many, skew=s) for s in (0, 2))
    assert flat.flops.sum() == steep.flops.sum()
    assert steep.bytes.sum() <= flat.bytes.sum()
    for wrong in (-0.1, 2.5, "much"):
        with pytest.raises(InputError, match=r"^skew: expected a number from 0 .* to 2, got "):
            lowered("qwen3-30b-a3b", skew=wrong)


def test_a_padded_batch_uses_the_experts_of_one_further_token() -> None:
    seven, eight, nine = (
        lowered("qwen3-30b-a3b", devices=1, batch=b, engine="vllm") for b in (7, 8, 9)
    )
    tokens = [w.m[w.kind == Kind.EXPERTS][0] for w in (seven, eight, nine)]
    assert tokens == [8, 8, 10]  # graphs of vLLM have batches of 8 and 16
    assert (nine.m[nine.is_role("router")] == 9).all()
    eager = lowered("qwen3-30b-a3b", devices=1, batch=7, engine="hf")
    assert eager.m[eager.kind == Kind.EXPERTS][0] == 7


def test_fewer_experts_are_worth_what_is_no_longer_read() -> None:
    dense = lowered("qwen3-30b-a3b", devices=1, batch=64, skew=0)
    found = simulator.speedup(dense, simulator.prune(dense, "experts", 0.25), H200)
    read = [experts_touched(64, many, 8) for many in (128, 96)]
    layer = 3 * 768 * 2048 * 2
    whole = dense.bytes.sum()
    router = 48 * 2 * 32 * (2048 + 64)  # 32 outputs fewer, and their weights
    assert found.byte_bound == pytest.approx(
        whole / (whole - 48 * layer * (read[0] - read[1]) - router), rel=1e-9
    )
    assert 1.02 < found.lower < found.speedup < found.byte_bound < found.upper + 0.1
    one = lowered("qwen3-30b-a3b", devices=1, batch=1)
    # eight experts are read in both models
    assert simulator.speedup(one, simulator.prune(one, "experts", 0.25), H200).byte_bound < 1.01
    active = simulator.prune(dense, "experts", 0.25, fewer="active")
    assert simulator.speedup(dense, active, H200).flop_bound > 1.05


def test_transformers_launches_all_experts_those_in_use_or_groups_by_version() -> None:
    looped = {
        "hf@4.51.3": 128.0,
        "hf@4.53": float(experts_touched(4, 128, 8)),
        "hf@5.0.0rc1": 1.0,
        "hf": 1.0,
    }
    seconds = []
    for name, many in looped.items():
        w, engine = (
            lowered("qwen3-30b-a3b", devices=1, batch=4, engine=name, skew=0),
            load_engine(name),
        )
        workloads = WorkloadBatch.of([w])
        row = np.flatnonzero(workloads.groups.kind == Kind.EXPERTS)
        assert launches(workloads, engine)[0, row] == pytest.approx(
            48 * many * engine.launches["experts"]
        )
        assert launches(workloads, load_engine("vllm"))[0, row] == 48
        assert workload_time(w, H200).host_bound
        seconds.append(workload_time(w, H200).total_s)
    assert seconds[0] > 3 * seconds[1] > 6 * seconds[2]
    assert seconds[2] == seconds[3]


def test_a_note_names_the_loop_over_experts_that_was_assumed() -> None:
    for name, way in (
        ("hf", "runs routed experts together"),
        ("hf@all", "loops over all routed experts"),
    ):
        found = simulator.table(
            ["mixtral-8x7b"], ["h200"], ["depth"], [0.25], phase=["decode"], engine=[name]
        )
        assert [way in note for note in found.notes].count(True) == 1, found.notes
    # no experts; one way in all generations
    for model, name in (("llama-3.1-8b", "hf"), ("mixtral-8x7b", "vllm")):
        found = simulator.table(
            [model], ["h200"], ["depth"], [0.25], phase=["decode"], engine=[name]
        )
        assert not any("routed experts" in note for note in found.notes)


def test_latent_and_plain_attention_are_timed_in_one_stack() -> None:
    plain, latent = lowered("qwen3-30b-a3b", devices=1), lowered("deepseek-v2-lite", devices=1)
    both = forward_passes(WorkloadBatch.of([plain, latent]), H200)
    alone = [workload_time(w, H200).device_s for w in (plain, latent)]
    assert both.device_s == pytest.approx(alone)


def test_the_fixed_time_of_experts_is_launch_time() -> None:
    dense = simulator.lower("mixtral-8x7b", phase="decode", batch=1, seq=512)
    pruned, hw = (
        simulator.prune(dense, "width", 0.5),
        simulator.load_hardware("h100").serving(("vllm",)),
    )
    section = hw.section("experts", "bf16")
    kernels, launches_of = [], []
    for scale in (1.0, 2.0):
        constants = {
            **section.constants,
            "t0_s": replace(section.constants["t0_s"], value=scale * section["t0_s"]),
        }
        changed = replace(
            hw, sections={**hw.sections, ("experts", "bf16"): replace(section, constants=constants)}
        )
        steps = {step.name: step for step in simulator.waterfall(dense, pruned, changed)}
        kernels.append(steps["kernel efficiency"].speedup)
        launches_of.append(steps["launch"].factor)
    assert kernels[1] == pytest.approx(kernels[0], rel=0.01)
    assert launches_of[1] < launches_of[0] - 0.01


def test_a_waterfall_tells_experts_that_stay_active_from_parts_that_are_not_pruned() -> None:
    """Half the experts of a model and all its active ones were "parts not pruned (x0.50)"."""
    dense = lowered("qwen3-30b-a3b", devices=1)
    experts = dense.kind == Kind.EXPERTS
    share = float(dense.flops[experts].sum() / dense.flops.sum())
    pruned = simulator.prune(dense, "experts 0.5")
    steps = {step.name: step for step in simulator.waterfall(dense, pruned, H200)}
    # the router shrinks too
    assert steps["parts not pruned"].speedup == pytest.approx(1 / (1 - share / 2), rel=0.01)
    active, bound = (
        steps["active experts not pruned"],
        simulator.speedup(dense, pruned, H200).flop_bound,
    )
    assert active.speedup == pytest.approx(bound)
    assert bound == pytest.approx(1.0, abs=0.01)
    fewer = simulator.waterfall(dense, simulator.prune(dense, "experts 0.5 fewer=active"), H200)
    assert {step.name: step.factor for step in fewer}["active experts not pruned"] == 1.0
    assert "active experts not pruned" not in {s.name for s in simulator.waterfall(*gemma(), H200)}
    assert "experts" in gemm_points(pruned, H200).role


def gemma() -> tuple[Workload, Workload]:
    dense = lowered("gemma-2-9b", devices=1)
    return dense, simulator.prune(dense, "depth 0.25")


def test_gpt_oss_runs_in_the_kernels_of_its_release_and_gpu() -> None:
    def dense(hardware: str, engine: str, phase: str = "prefill", seq: int = 8192) -> float:
        w = simulator.lower("gpt-oss-20b", phase=phase, seq=seq, engine=engine)
        return workload_time(w, simulator.load_hardware(hardware)).total_s

    # Marlin multiplies at half of the rate of Triton's kernels on Hopper, and loads as fast
    assert 1.5 < dense("h100", "vllm@0.11") / dense("h100", "vllm@0.14") < 2.2
    steps = [dense("h100", engine, "decode") for engine in ("vllm@0.11", "vllm@0.14")]
    assert 0.8 < steps[0] / steps[1] < 1.2
    # on Ampere every release has these kernels, and sinks matter more the longer the prompt is
    assert dense("a100", "vllm@0.11") == pytest.approx(dense("a100", "vllm@0.14"), rel=0.02)
    sinks = [dense("a100", "vllm", seq=n) / dense("a100", "sglang", seq=n) for n in (512, 32768)]
    assert sinks[1] > 1.5 * sinks[0]
