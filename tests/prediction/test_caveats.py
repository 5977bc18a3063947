"""Notes name weak evidence: gains above the bound, sizes that were not measured, kernels of another
stack."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import simulator
from simulator.codes import Kind
from simulator.prediction.explain import explanations
from simulator.prediction.explain_sentences import conclusion
from simulator.prediction.notes import better_than_bound, beyond_measured, fallback, uncalibrated
from simulator.prediction.table import table
from simulator.uncertainty.forward import forward_passes
from simulator.workload import WorkloadBatch

pytestmark = pytest.mark.quick


def test_waves_are_named_where_they_explain_a_speedup() -> None:
    """22 heads of 16 sequences are 3.26 waves on the 108 SMs of an A100, 32 heads 4.74."""
    found = explanations(
        "llama-2-7b", ["a100"], family="width", sparsity=0.3, phase="decode", batch=[8, 16, 32]
    )
    texts = [conclusion(e) for e in found]
    assert ["attention fills 81.5 % of 4 waves (dense: 94.8 % of 5" in t for t in texts] == [
        False,
        True,
        False,
    ]
    assert ["Waves" in t for t in texts] == [False, True, False]


def test_a_gain_above_the_bound_has_a_reason_and_others_have_none() -> None:
    """SGLang's decode attention on the A100 is slower for the same bytes at 16 x 16384 than at
    fewer KV heads."""
    (e,) = explanations(
        "llama-3.1-8b", ["a100@sglang"], family="width", sparsity=0.25, batch=16, seq=16384
    )
    assert e.result.speedup > 1.1 * e.result.roofline_bound
    found = re.search(
        r"sglang's kernels run decode attention at (\d+) % dense and (\d+) % pruned of the"
        r" roofline",
        e.reason,
    )
    assert found
    assert int(found[1]) < int(found[2])
    notes = table(
        "llama-3.1-8b", "a100@sglang", ["depth", "width"], 0.25, batch=16, seq=16384
    ).notes
    assert sum(e.reason in note for note in notes) == 1
    (plain,) = explanations("llama-3.1-8b", ["h100"], family="width", sparsity=0.25)
    assert plain.reason == ""
    assert better_than_bound(plain.dense, plain.pruned, plain.hardware, 1.2, 1.3) == ""


def test_a_gain_of_no_kernel_is_not_put_down_to_one() -> None:
    """The head stays, and its one GEMM is near its roofline; layers are not, nor are their
    launches."""
    (e,) = explanations("llama-3.1-8b", ["a100"], family="depth", sparsity=0.9, engine="hf")
    assert e.result.speedup > 1.03 * e.result.roofline_bound
    assert e.reason.endswith("is farther from its roofline than the rest")


def test_whose_kernels_stand_in_is_said_and_what_nobody_measured_is_not() -> None:
    def said(gpu: str, engine: str, phase: str = "decode") -> str:
        w = simulator.lower("llama-3.2-1b", phase=phase, engine=engine)
        return fallback(simulator.load_hardware(gpu), w)

    assert (
        said("h100", "vllm")
        == said("h100", "trtllm")
        == said("rtx_3090", "vllm")
        == said("h100", "")
        == ""
    )
    assert (
        said("rtx_4090", "trtllm")
        == "rtx_4090: trtllm kernels are not calibrated; vllm kernels are used instead"
    )
    assert said("h100@trtllm", "vllm") == "", "asked for by name"
    part = "trtllm kernels are not calibrated for decode attention; vllm kernels are used instead"
    assert said("a100", "trtllm") == f"a100_sxm_80gb: {part}"
    assert said("a100", "trtllm", "prefill") == ""
    # a fit of a kernel that the engine does not run by default is named, not used
    other = (
        "flashinfer's decode attention is not the default of sglang; if it is enabled, use"
        " h20@flashinfer"
    )
    assert said("h20", "sglang@0.5.9") == f"h20: {other}"
    assert said("h20", "sglang@0.5.9", "prefill") == said("h20@flashinfer", "sglang@0.5.9") == ""
    assert (
        said("h20", "sglang")
        == "h20: sglang kernels are not calibrated; flashinfer kernels are used instead"
    )


def test_gemms_far_outside_the_measured_sizes_are_named_where_they_take_time() -> None:
    hw = simulator.load_hardware("h100")
    section = hw.section("gemm", "bf16")
    few = replace(
        section,
        arrays={**section.arrays, "measured": np.array([[0.0, 7.0, 7.0], [6.0, 12.0, 12.0]])},
    )
    narrow = hw.calibrated({**hw.sections, ("gemm", "bf16"): few})
    dense = simulator.lower("llama-3.1-8b", phase="prefill", batch=1, seq=2048)
    assert beyond_measured(dense, hw) == ""
    assert "octaves outside the measured sizes (2048 x 28672 x 4096)" in beyond_measured(
        dense, narrow
    )
    wide, usual = (
        simulator.gemm_time(2048, 14336, 4096, h) for h in (narrow, hw.calibrated(hw.sections))
    )
    assert wide.upper / wide.seconds > 1.1 * usual.upper / usual.seconds


def test_small_shares_of_default_constants_are_calibrated_and_large_ones_are_named_with_their_share() -> (
    None
):
    """A planted profile without elementwise section: GEMMs grow with the batch, elementwise
    operators hardly."""
    fitted = simulator.load_hardware("rtx_4090")
    sections = {key: s for key, s in fitted.sections.items() if key[0] != "elementwise"}
    planted = replace(fitted.calibrated(sections), name="planted")
    model, seen = simulator.load_model("llama-3.2-1b"), {}
    for batch in (1, 2048):
        dense = simulator.lower(model, phase="decode", batch=batch, seq=16, engine="vllm@v1")
        pruned = simulator.prune(dense, "width", 0.25)
        r = simulator.speedup(dense, pruned, planted)
        shares = []
        for w in (dense, pruned):
            p = forward_passes(WorkloadBatch.of([w]), planted)
            spent = p.row_s[w.kind == int(Kind.ELEMENTWISE)].sum()
            shares.append(float(spent / p.device_s[0] * p.device_share[0]))
        assert r.uncalibrated_share == pytest.approx(max(shares))
        assert r.calibrated == (max(shares) < 0.05)
        assert r.uncalibrated == "elementwise"
        notes = uncalibrated([r, r])
        assert len(notes) == (not r.calibrated)
        assert all(
            f"elementwise operators on planted ({100 * max(shares):.0f} % of the time)" in n
            for n in notes
        )
        seen[r.calibrated] = max(shares)
    assert seen[True] < 0.05 < seen[False]
    whole = simulator.speedup(dense, pruned, fitted)
    assert (whole.calibrated, whole.uncalibrated, whole.uncalibrated_share) == (True, "", 0.0)


def test_one_note_names_what_is_not_calibrated_on_all_devices() -> None:
    gpus = ["h100", "t4", "v100", "rtx_4090"]
    found = table("llama-3.1-8b", gpus, "depth", 0.25, phase="prefill", dtype="fp16")
    (note,) = uncalibrated(found)
    assert (
        "elementwise operators on t4 and v100 (up to 100 % of the time), elementwise operators on"
        " h100_sxm (" in note
    )
    assert "rtx_4090" not in note
    assert "prunesim calibrate" in note, "what to do"
