"""Stack files: every device and stack has a recipe, sections are round, and shipped files follow
from their tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from operator_times import prefill_time

import calibration.evidence.build_profiles as shipped
from calibration.evidence.build_profiles import RECIPES, build, main, make, tables_of
from calibration.evidence.measurements.wheel import SOURCES, datasheet
from calibration.fit.profile import ProfileFit
from simulator import gemm_time
from simulator.codes import STACKS
from simulator.errors import InputError
from simulator.hardware.library import list_hardware, load_hardware, profiles_folder
from simulator.hardware.profile import HardwareProfile, Provenance, Section

NAME = "a100_sxm_80gb.trtllm"


B200 = datasheet("b200_sxm")


def test_recipes_take_every_measurement_once_and_the_library_of_collectives_with_each_stack() -> (
    None
):
    for name, recipe in RECIPES.items():
        assert name == f"{recipe.hardware}.{recipe.stack}"
        assert recipe.hardware in list_hardware()
        assert recipe.stack in STACKS
        assert recipe.prior in ("", *RECIPES)
        assert {SOURCES[table].hardware for table in recipe.tables} <= {recipe.hardware}
        assert {SOURCES[table].stack for table in recipe.tables} in (
            set(),
            {recipe.stack},
            {recipe.stack, "nccl"},
        )
    own = [
        table
        for recipe in RECIPES.values()
        for table in recipe.tables
        if SOURCES[table].stack != "nccl"
    ]
    assert sorted(own) == sorted(name for name, choice in SOURCES.items() if choice.stack != "nccl")


@pytest.mark.quick
def test_without_the_wheel_vllm_is_left() -> None:
    left = {name for name, recipe in RECIPES.items() if not recipe.available(None)}
    assert left == {name for name in RECIPES if name.endswith(".vllm")}
    with pytest.raises(InputError, match=r"h100_sxm\.vllm: its tables do not ship; name the wheel"):
        build("h100_sxm.vllm")
    with pytest.raises(InputError, match="stack file 'h100_sxm' is unknown"):
        build("h100_sxm")
    rows = tables_of(RECIPES[NAME])
    formats = {"bf16", "int8_wo", "int4_wo", "fp16", "int8"}  # the last two are NCCL's
    assert set(rows.labels()) == formats | {"fp8_wo"}  # caches of latent attention


def planted(operator: str, scale: float) -> Section:
    """A calibrated section with the constants that are assumed."""
    constants = {
        n: replace(c, status="fitted") for n, c in B200.section(operator, "bf16").constants.items()
    }
    about = Provenance(operator, "0" * 64, "2026-11-25", "SGLang", "NVIDIA B200", "graph", 100)
    return Section(
        constants,
        section_scale=scale,
        provenance=about,
        accuracy={"mape": 1 / 30},
        status="calibrated",
    )


@pytest.mark.quick
def test_what_needs_the_wheel_is_kept_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = ("attention_prefill", "bf16"), ("attention_decode", "bf16")
    before = {key: planted(key[0], 0.9) for key in (prefill, decode)}
    fit = ProfileFit(B200.calibrated({prefill: planted(prefill[0], 1.23)}), (), ("a note",))
    monkeypatch.setattr(shipped, "build", lambda *_: fit)
    monkeypatch.setattr(
        shipped, "load_hardware", lambda _: replace(B200, stacks={"sglang": before})
    )
    lines = make("b200_sxm.sglang", tmp_path)
    assert "b200_sxm.sglang attention_decode bf16: kept, its rows are not in these tables" in lines
    assert "b200_sxm.sglang: a note" in lines
    copy = tmp_path / "b200_sxm.yaml"
    copy.write_bytes((profiles_folder() / copy.name).read_bytes())
    again = load_hardware(copy).stacks["sglang"]
    assert (again[prefill].section_scale, again[decode].section_scale) == (1.23, 0.9)
    assert again[decode].provenance == before[decode].provenance
    monkeypatch.setattr(shipped, "load_hardware", lambda _: load_hardware(tmp_path / "gone.yaml"))
    lines = make("b200_sxm.sglang", tmp_path)
    assert any("no section kept, because the earlier file cannot be read" in line for line in lines)
    assert set(load_hardware(copy).stacks["sglang"]) == {prefill}


@pytest.mark.quick
def test_an_unknown_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a100.trtllm"]) == 2
    assert "stack file 'a100.trtllm' is unknown" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", sorted({"rtx_4090", *(recipe.hardware for recipe in RECIPES.values())})
)
def test_shipped_profiles_say_what_they_rest_on(name: str) -> None:
    hw = load_hardware(name)
    recipes = {recipe.stack for recipe in RECIPES.values() if recipe.hardware == name}
    assert set(hw.stacks) <= recipes or name == "rtx_4090"
    for stack, sections in hw.stacks.items():
        for key, section in sections.items():
            about = section.provenance
            assert about is not None, (stack, key)
            assert section.status == ("inherited" if about.inherited_from else "calibrated"), (
                stack,
                key,
            )
            assert "/work" not in about.source
            if section.status == "calibrated" and key[0] != "runtime":
                assert 0.0 < section.accuracy["mape"] < 0.25, (stack, key)
                assert about.rows >= 25
                assert len(about.digest) == 64


def same_times(made: HardwareProfile, shipped: HardwareProfile) -> None:
    """Two fits to the same rows give the same times. Their constants may differ along a ridge of
    the error: between two kernels of OpenBLAS, exp_per_s of latent prefill differs by 3.7 %, b_hit
    of int8_wo by 0.15 %."""
    batch, seq, heads, groups = (
        a.ravel()
        for a in np.meshgrid(
            [1, 4, 32], [64, 500, 2048, 16384], [8, 32, 64], [1, 4, 8], indexing="ij"
        )
    )
    m, n, k = (
        a.ravel()
        for a in np.meshgrid([1, 16, 300, 4096], [1024, 4096, 14336], [1024, 8192], indexing="ij")
    )
    pairs = [
        [prefill_time(batch, seq, seq, heads, groups, 128, hw) for hw in (made, shipped)],
        [
            prefill_time(batch, seq, seq, heads, heads, 192, hw, value_dim=128)
            for hw in (made, shipped)
        ],
        *(
            [gemm_time(m, n, k, hw, weight_dtype=name) for hw in (made, shipped)]
            for name in (None, "int8", "int4")
        ),
    ]
    for one, other in pairs:
        np.testing.assert_allclose(one.seconds, other.seconds, rtol=1e-3)


@pytest.mark.slow
def test_the_shipped_profile_is_what_its_tables_give() -> None:
    made, hw = build(NAME).profile, load_hardware("a100@trtllm")
    for key, section in made.sections.items():
        assert hw.stacks["trtllm"][key].provenance == section.provenance
        for name, constant in hw.stacks["trtllm"][key].constants.items():
            tolerance = 5e-2 if name in ("e_tc", "exp_per_s") else 5e-3
            assert section[name] == pytest.approx(constant.value, rel=tolerance), (key, name)
    same_times(made, hw)
