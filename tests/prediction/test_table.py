"""The product of settings: order, agreement with single predictions, excluded and refused
combinations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import simulator
from simulator import load_hardware, lower, prune, speedup
from simulator.codes import PHASES
from simulator.errors import InputError
from simulator.prediction.batch import batch_of
from simulator.prediction.explain import explanations
from simulator.prediction.gemms import gemm_table
from simulator.prediction.prunings import Pruning, families
from simulator.prediction.result import Results
from simulator.prediction.speedup_sentences import of_speedups
from simulator.pruning import general_families
from simulator.request import Request
from simulator.units import ratio
from simulator.workload import Workload

MODEL = ["llama-3.1-8b"]


def table(**asked: Any) -> Results:
    """A table of one point, except for what is asked."""
    usual = {
        "models": MODEL,
        "hardware": ["h100"],
        "family": ["depth"],
        "sparsity": [0.25],
        "phase": ["decode"],
    }
    return simulator.table(**{**usual, **asked})


@pytest.mark.quick
def test_records_are_the_single_predictions_in_order() -> None:
    found = table(
        hardware=["h100", "a100"],
        family=["width", "depth"],
        sparsity=[0.5, 0.25],
        phase=["decode", "prefill"],
        batch=[1, 4],
        seq=[512],
        engine=["hf", "reference", "transformers", "HF"],  # one by three of its names
    )
    assert [r.engine for r in found] == ["hf"] * 32 + ["reference"] * 32
    assert [(r.phase, r.batch, r.family, r.sparsity, r.hardware) for r in found][:5] == [
        ("decode", 1, "width", 0.5, "h100_sxm"),
        ("decode", 1, "width", 0.5, "a100_sxm_80gb"),
        ("decode", 1, "width", 0.25, "h100_sxm"),
        ("decode", 1, "width", 0.25, "a100_sxm_80gb"),
        ("decode", 1, "depth", 0.5, "h100_sxm"),
    ]
    for r in found.rows[::5]:
        dense = lower(MODEL[0], phase=r.phase, batch=r.batch, seq=r.seq, engine=r.engine)
        single = speedup(dense, prune(dense, r.family, r.sparsity), load_hardware(r.hardware))
        assert r.speedup == pytest.approx(single.speedup, rel=1e-12)
        assert r.speedup_lower == pytest.approx(single.lower, rel=1e-12)
        assert r.roofline_bound == pytest.approx(single.roofline_bound, rel=1e-12)
        assert r.efficiency == pytest.approx(single.efficiency, rel=1e-12)
        assert (r.realised_sparsity, r.bottleneck) == (single.realised_sparsity, single.bottleneck)
        assert r.measured_bound is None


@pytest.mark.quick
def test_names_that_mean_the_same_count_once() -> None:
    twice = table(
        hardware=["h100", "h100_sxm"],
        family=["depth"] * 2,
        sparsity=[0.25] * 2,
        phase=["decode"] * 2,
        batch=[1, 1],
    )
    assert len(twice) == 1
    assert families(["width", "all"]) == (
        "width",
        *(name for name in general_families() if name != "width"),
    )


@pytest.mark.quick
def test_an_unsupported_combination_is_a_note_among_several_families_and_an_error_alone() -> None:
    reference = {"engine": ["reference"]}
    found = table(family=["depth", "semi_structured"], sparsity=[0.25, 0.5], **reference)
    assert [(r.family, r.sparsity) for r in found] == [
        ("depth", 0.25),
        ("depth", 0.5),
        ("semi_structured", 0.5),
    ]
    (note,) = [note for note in found.notes if "excluded" in note]
    assert note.startswith("semi_structured")
    assert note.endswith("excluded at sparsity 0.25")
    with pytest.raises(InputError, match="semi_structured"):
        table(family=["semi_structured"], sparsity=[0.25, 0.5], **reference)
    with pytest.raises(InputError, match="sparsity: expected at least one"):
        table(sparsity=[])
    # not even the dense model runs on an A100
    two = {"family": ["depth", "width"], "dtype": "nvfp4"}
    able = table(hardware=["b200", "a100"], **two)
    assert {r.hardware for r in able} == {"b200_sxm"}
    assert any(
        note.startswith("a100_sxm_80gb is excluded: a100_sxm_80gb has no nvfp4")
        for note in able.notes
    )
    with pytest.raises(InputError, match="a100_sxm_80gb has no nvfp4"):
        table(hardware=["a100"], **two)
    one: dict[str, Any] = {"prune": ["depth 0.25"], "dtype": "nvfp4"}
    excluded: dict[str, InputError] = {}
    assert [
        e.hardware.name for e in explanations("llama-3.1-8b", ["b200", "a100"], excluded, **one)
    ] == ["b200_sxm"]
    assert [note.partition(":")[0] for note in excluded] == ["a100_sxm_80gb in vllm is excluded"]
    for notes in (None, excluded):
        with pytest.raises(InputError, match="a100_sxm_80gb has no nvfp4"):
            explanations("llama-3.1-8b", ["a100"], notes, **one)


@pytest.mark.quick
def test_memory_says_what_does_not_fit_and_pruning_may_help() -> None:
    found = table(models=["llama-2-70b"], hardware=["h200", "4090"], sparsity=[0.1, 0.5])
    at = {(r.hardware, r.sparsity): r for r in found}
    assert at["h200_sxm", 0.5].pruned_fits
    assert not at["rtx_4090", 0.5].pruned_fits
    assert at["h200_sxm", 0.5].pruned_memory_bytes < 0.55 * at["h200_sxm", 0.5].dense_memory_bytes
    assert any("rtx_4090" in note and "devices" in note for note in found.notes)
    assert [r.dense_fits for r in found] == [
        r.dense_memory_bytes <= r.capacity_bytes for r in found
    ]


@pytest.mark.quick
def test_more_positions_than_a_model_has_are_noted() -> None:
    assert table(models=["opt-13b"], phase=["prefill"], seq=[2048]).notes == ()
    (note,) = table(models=["opt-13b"], phase=["prefill", "decode"], seq=[2049]).notes
    assert "opt-13b supports 2048 positions" in note
    (note,) = table(models=["opt-13b"], phase=["generate"], seq=[2040], new_tokens=16).notes
    assert "2056" in note


@pytest.mark.parametrize("family", list(general_families()))
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("llama-3.2-1b", Request(new_tokens=5, engine="")),
        ("gemma-2-9b", Request(new_tokens=5, devices=2, engine="reference")),
        (
            "mistral-7b-v0.1",
            Request(new_tokens=3, devices=4, parallel="pipeline", engine="compile"),
        ),
    ],
    ids=["plain", "windows-tensor-logits", "window-pipeline-fused"],
)
def test_pruning_together_equals_one_by_one(
    family: str, phase: str, model: str, setting: Request
) -> None:
    """Whatever a family says of the requests that a call may prune together."""
    shapes = ((1, 7), (3, 7), (3, 300), (64, 300), (64, 8192))
    requests = [
        replace(setting, model=model, phase=phase, batch=batch, seq=seq) for batch, seq in shapes
    ]
    for sparsity in (0.0, 0.3, 0.5, 0.9):
        refused: list[str] = []

        def reject(
            _pruning: int | None, reason: str, _device: str, refused: list[str] = refused
        ) -> None:
            refused.append(reason)

        batch = batch_of(requests, [Pruning.of(family, sparsity)], reject)
        together = {int(i): j for j, i in enumerate(batch.dense) if batch.pruning[j] == 0}
        for i, dense in enumerate(map(lower, requests)):
            try:
                one = prune(dense, family, sparsity)
            except InputError:
                assert i not in together
                assert refused
                continue
            j = together[i]
            at = batch.starts[j] + np.arange(batch.lengths[j])
            assert len(one) == len(at)
            for name in Workload.SCHEMA:
                got, wanted = getattr(batch.rows, name)[at], getattr(one, name)
                np.testing.assert_allclose(got, wanted, rtol=1e-12, err_msg=name)
            applied = one.meta.applied[-1]
            assert batch.sparsity[j] == applied.sparsity
            assert batch.realised[j] == pytest.approx(applied.realised, abs=1e-12)


@pytest.mark.quick
def test_gemm_table_is_the_product() -> None:
    rows = gemm_table([1, 64], [4096], [4096, 1024], ["h100", "4090"])
    assert [(r.hardware, r.m, r.k) for r in rows] == [
        (h, m, k) for h in ("h100_sxm", "rtx_4090") for m in (1, 64) for k in (4096, 1024)
    ]
    for r in rows:
        assert r.flop_per_s == pytest.approx(2.0 * r.m * r.n * r.k / r.seconds)
        assert r.seconds >= r.roofline_s * 0.99
        assert r.steps_s["launch"] == r.seconds
    (sparse,) = gemm_table([2048], [4096], [4096], ["h100"], semi_structured=True)
    (dense,) = gemm_table([2048], [4096], [4096], ["h100"])
    assert sparse.seconds < dense.seconds


@pytest.mark.parametrize("weight_dtype", ["fp8", "fp8_block"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b"])
def test_fp8_without_its_arithmetic_runs_as_weights_alone(name: str, weight_dtype: str) -> None:
    model, usual = simulator.load_model(name), {"hardware": ["a100"]}
    stated = replace(model, weight_dtype=weight_dtype, dtype="fp8")
    alone = table(models=[model], weight_dtype=weight_dtype, **usual)
    formats = {"dtype": "fp8", "weight_dtype": weight_dtype}
    for one in (table(models=[stated], **usual), table(models=[model], **formats, **usual)):
        assert one[0].dense_s == alone[0].dense_s
        assert "a100_sxm_80gb has no fp8 arithmetic: vllm computes in bf16" in str(one.notes)
    assert "has no fp8 arithmetic" not in str(alone.notes)
    existing = simulator.table(model, "a100", pruned=[replace(stated, name="narrow")])
    assert existing[0].pruned_s == alone[0].dense_s
    with pytest.raises(InputError, match="a100_sxm_80gb has no fp8 arithmetic"):
        table(models=[stated], engine="hf", **usual)  # has no such kernels


def test_one_table_of_every_kind_of_pruning() -> None:
    kinds: dict[str, Any] = {
        "pruned": ["llama-3.2-3b"],
        "prune": ["depth 0.5"],
        "method": ["shortgpt"],
    }
    found = simulator.table(["llama-3.1-8b"], ["h100"], **kinds)
    assert [r.pruned or r.prune for r in found][:2] == ["llama-3.2-3b", "depth 0.5"]
    assert {r.method for r in found} == {"", "shortgpt"}
    for kind in ("pruned", "prune", "method"):
        alone = simulator.table(["llama-3.1-8b"], ["h100"], **{kind: kinds[kind]})
        assert [r for r in found if r in alone.rows] == list(alone)


def test_speedups_of_several_formats_are_against_the_first() -> None:
    formats = ["bf16", "fp8", "int4"]
    found = simulator.table(
        ["llama-2-7b"], ["h100"], prune=["depth 0.25"], weight_dtype=formats, devices=[1, 2]
    )
    for count in (1, 2):
        some = [r for r in found if r.devices == count]
        rows = [
            "dense with fp8 weights",
            "dense with int4 weights",
            "depth at 25 %",
            "depth at 25 % with fp8 weights",
            "depth at 25 % with int4 weights",
        ]
        assert [r.pruning for r in some] == rows
        assert len({r.dense_s for r in some}) == 1
        alone = [
            simulator.table(
                ["llama-2-7b"], ["h100"], prune=["depth 0.25"], weight_dtype=one, devices=count
            )[0]
            for one in formats
        ]
        dense = [some[0].dense_s, some[0].pruned_s, some[1].pruned_s]
        assert dense == pytest.approx([r.dense_s for r in alone])
        assert [r.pruned_s for r in some[2:]] == pytest.approx([r.pruned_s for r in alone])
        assert some[2].speedup_lower == pytest.approx(alone[0].speedup_lower)
        gains = ", ".join(
            f"{r.pruning} {ratio(one.speedup)}x" for r, one in zip(some[3:], alone[1:])
        )
        assert of_speedups(some)[-1] == f"Over the dense model in the same formats: {gains}."


def test_a_device_without_fp8_computes_a_row_in_fp8_with_narrow_weights() -> None:
    found = simulator.table(
        ["llama-2-7b"], ["a100", "h100"], ["depth"], 0.25, dtype=["bf16", "fp8"]
    )
    rows = {(r.hardware, r.pruning): r.formats for r in found if r.family == "none"}
    assert rows == {
        ("a100_sxm_80gb", "dense with fp8 weights"): "bf16 with fp8 weights against bf16",
        ("h100_sxm", "dense in fp8"): "fp8 against bf16",
    }
    assert any("has no fp8 arithmetic: vllm computes in bf16" in note for note in found.notes)


def test_predict_takes_a_list_of_prunings() -> None:
    prunings = ["depth 0.25", "width mlp=0.3"]
    found = simulator.predict("llama-3.1-8b", prunings, "h100")
    assert list(found) == [simulator.predict("llama-3.1-8b", one, "h100") for one in prunings]
