"""Constants of kernels that skip: planted ones are found, bounds and what rows cannot tell are
said, defaults stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from operator_times import elementwise_time

from calibration.fit.gemm import misaligned
from calibration.fit.predict import predict
from calibration.fit.profile import ProfileFit, fit_profile, fit_sparse24
from calibration.measurements import published
from calibration.records.timing_table import Records, Source
from calibration.validation.validate import markdown, validate
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import Fitted, HardwareProfile, with_section
from simulator.uncertainty.operators import GemmOptions, gemm_time

HW = load_hardware("h100_sxm@sglang")
SOURCE = Source("planted GPU", {"planted": "1"}, method="planted", origin="test", date="2026-01-01")
OF = {
    "gather_gemm": ("gemm", "block_step"),
    "attention_block_sparse": ("attention_prefill", "sparse_block"),
}
RATIOS = [r for r in published("gemm_ratios") if r["what"] == "2:4" and r["gpu"] == "H100-class"]
FEW = np.array([float(r["m"]) for r in RATIOS]) <= 256


def planted(kind: str, value: float, hw: HardwareProfile = HW) -> HardwareProfile:
    """A profile with another constant of the kernel that one kind of rows times."""
    operator, name = OF[kind]
    section = hw.section(operator, "bf16")
    moved = replace(section, constants={**section.constants, name: Fitted(value)})
    return replace(hw, sections={**hw.sections, (operator, "bf16"): moved})


def rows(kind: str, size: int, seed: int = 0, **changes: Any) -> Records:
    rng = np.random.default_rng(seed)
    tokens, widths = [256, 512, 1024, 4096], [1024, 4096, 8192]
    length = rng.choice([1024, 2048, 4096, 8192], size)
    heads = {
        "batch": 1,
        "q_len": length,
        "kv_len": length,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "cold": False,
    }
    sizes: dict[str, Any] = {
        "gather_gemm": {"m": 8192, "rows": rng.choice(tokens, size), "fused": True}
        | {name: rng.choice(widths, size) for name in "nk"},
        "attention_block_sparse": {
            **heads,
            "block": rng.choice([16, 64, 128], size),
            "density": rng.choice([0.25, 0.5], size),
        },
    }[kind]
    return Records.from_columns(
        [SOURCE], operator=kind, seconds=np.ones(size), **{**sizes, **changes}
    )


def timed(r: Records, hw: HardwareProfile, noise: float = 0.0, seed: int = 0) -> Records:
    """Rows with the times of a profile and log-normal noise."""
    found = predict(r, hw).time.seconds
    return r.replace(
        seconds=found * np.exp(noise * np.random.default_rng(seed).standard_normal(len(r)))
    )


def constant(fit: ProfileFit, kind: str) -> Fitted:
    operator, name = OF[kind]
    return fit.profile.section(operator, "bf16").constants[name]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("gather_gemm", 0.6),
        ("gather_gemm", 1.0),
        ("attention_block_sparse", 4.0),
        ("attention_block_sparse", 24.0),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_planted_constants_are_recovered(kind: str, value: float, seed: int) -> None:
    measured = timed(rows(kind, 40, seed), planted(kind, value), 0.02, seed)
    fit = fit_profile(HW, measured)
    found = constant(fit, kind)
    assert found.status == "fitted"
    assert abs(found.value - value) < 3.0 * found.std_error < 0.2 * value
    # nothing else of the dense kernel's moves
    operator, name = OF[kind]
    before, after = (hw.section(operator, "bf16").constants for hw in (HW, fit.profile))
    assert {n: c for n, c in after.items() if n != name} == {
        n: c for n, c in before.items() if n != name
    }
    assert not fit.parts[0].fixed.keys() & {name}


def test_the_step_of_misaligned_products_is_fitted_apart_from_dense_ones() -> None:
    """Dense constants do not depend on misaligned rows. A CPU has no such kernels."""
    rng = np.random.default_rng(1)
    m, n, k = 2 ** rng.integers(4, 13, 60), *(512 * rng.integers(1, 17, (2, 60)))
    dense = Records.from_columns([SOURCE], m=m, n=n, k=k, seconds=1.0)
    odd = dense.replace(n=dense.n + rng.choice([1, 2, 4], 60))
    section = HW.section("gemm", "bf16")
    planted_step = {**section.constants, "align_step": Fitted(0.9)}
    slow = with_section(HW, "bf16", replace(section, constants=planted_step))
    both = Records.concat([timed(dense, HW, 0.01), timed(odd, slow, 0.02)])
    alone, fitted = (
        fit_profile(HW, r).profile.section("gemm", "bf16") for r in (timed(dense, HW, 0.01), both)
    )
    assert fitted.constants["align_step"].value == pytest.approx(0.9, rel=0.05)
    assert {**fitted.constants, "align_step": None} == {**alone.constants, "align_step": None}
    assert not misaligned(both, load_hardware("cpu")).any()


def test_rows_that_do_not_tell_a_constant_leave_its_default() -> None:
    r = rows("gather_gemm", 20, rows=1)  # one token: memory alone
    fit = fit_profile(HW, timed(r, HW, 0.05))
    assert constant(fit, "gather_gemm") == Fitted(0.85, None, "fixed")
    assert fit.parts[0].fixed["block_step"] == "not identified by these rows"


def test_few_rows_leave_the_default_and_say_so() -> None:
    few = Records.concat([timed(rows(kind, 5), planted(kind, 0.5)) for kind in OF])
    enough = timed(rows("gather_gemm", 20), planted("gather_gemm", 0.7))
    with pytest.raises(InputError, match=r"gathered gemm bf16: 5 rows are too few; a fit needs 6"):
        fit_profile(HW, few)
    fit = fit_profile(HW, Records.concat([enough, few.select(~few.fused)]))
    assert (
        "block-sparse attention bf16: 5 rows are too few; a fit needs 6; measure longer"
        in fit.notes
    )
    assert (
        constant(fit, "attention_block_sparse")
        == HW.section("attention_prefill", "bf16").constants["sparse_block"]
    )


def test_a_gathered_product_is_one_kernel_or_the_sum_of_three() -> None:
    one = rows("gather_gemm", 10)
    three = one.replace(fused=np.zeros(10, dtype=bool))
    product, dense = (
        gemm_time(one.rows, one.n, one.k, HW, kernel=k).seconds for k in ("block_sparse", "dense")
    )
    moved = [2.0 * one.rows * width for width in (one.k, one.n)]
    copies = [
        elementwise_time(size + 4.0 * one.rows, size, HW, role=role, added=True).seconds
        for role, size in zip(("gather", "scatter"), moved, strict=True)
    ]
    assert predict(one, HW).time.seconds == pytest.approx(product)
    assert predict(three, HW).time.seconds == pytest.approx(dense + copies[0] + copies[1])
    # such rows say nothing of a kernel of its own
    plain = timed(three, HW, 0.02)
    fit = fit_profile(HW, Records.concat([plain, timed(one, planted("gather_gemm", 0.7))]))
    assert constant(fit, "gather_gemm").value == pytest.approx(0.7, rel=1e-3)
    known = "10 rows have no separate fit; validation compares them with the sum of their parts"
    assert f"gather_gemm: {known}" in fit.notes


@pytest.mark.parametrize(("role", "kernel"), [("up", "groups_n"), ("down", "groups_k")])
def test_a_grouped_product_is_one_kernel_or_three_for_each_group(role: str, kernel: str) -> None:
    sizes = {
        "m": [64, 4096],
        "n": 4096,
        "k": 2048,
        "block": 128,
        "density": 0.5,
        "role": role,
        "fused": [True, False],
    }
    r = Records.from_columns([SOURCE], operator="grouped_gemm", seconds=1.0, **sizes)  # type: ignore[arg-type]
    one, three = predict(r, HW).time.seconds
    assert one == pytest.approx(
        gemm_time(32, 4096, 2048, HW, kernel=kernel, options=GemmOptions(block=128)).seconds
    )
    n, k, groups = (128, 2048, 32) if role == "up" else (4096, 128, 16)
    moved = {"gather": 2.0 * 2048 * k, "scatter": 2.0 * 2048 * n}
    copies = [
        elementwise_time(b + 8192.0, b, HW, role=name, added=True).seconds
        for name, b in moved.items()
    ]
    assert three == pytest.approx(
        groups * (gemm_time(2048, n, k, HW).seconds + sum(copies)), rel=1e-6
    )
    assert "grouped_gemm bf16" in [part.name for part in validate(HW, r).parts]


def test_held_out_rows_of_every_kind_are_in_the_report() -> None:
    """What was measured of pruned kernels is judged, also where there is nothing to fit."""
    pairs = Records.from_columns(
        [SOURCE], operator="low_rank", m=[16, 512], n=4096, k=4096, rank=512, seconds=1.0
    )
    parts = [gemm_time(pairs.m, n, k, HW).seconds for n, k in ((512, 4096), (4096, 512))]
    pairs = pairs.replace(seconds=(parts[0] + parts[1]) * 1.1)
    gathered = rows("gather_gemm", 4, fused=[True, True, False, False])
    found = validate(
        HW,
        Records.concat([pairs, timed(gathered, HW), timed(rows("attention_block_sparse", 4), HW)]),
    )
    errors = {part.operator: part.error for part in found.parts}
    assert [*errors] == ["low_rank", "gather_gemm", "attention_block_sparse"]
    assert errors["low_rank"] == pytest.approx(1.0 / 1.1 - 1.0)
    assert not np.abs(errors["gather_gemm"]).max() > 1e-6
    for part in found.parts:
        assert (part.lower_s < part.predicted_s).all()
        assert (part.predicted_s < part.upper_s).all()
        assert f"## {part.name}" in markdown(found)


def ratio_errors(hw: HardwareProfile) -> np.ndarray:
    """Return the log errors of the ratios of an H100 in fp8."""
    m, n, k, dense, pruned = (
        np.array([float(r[c]) for r in RATIOS]) for c in ("m", "n", "k", "dense_us", "pruned_us")
    )
    times = [
        gemm_time(m, n, k, hw, dtype="fp8", kernel=name, options=GemmOptions(copies=1)).seconds
        for name in ("dense", "sparse24")
    ]
    return np.asarray(np.log(times[0] / times[1] / (dense / pruned)))


def test_ratios_of_few_tokens_tell_how_compressed_weights_arrive() -> None:
    hw = load_hardware("h100")
    start = {**hw.sections["gemm", "fp8"].constants}
    start |= {
        "sparse_step": Fitted(0.65, status="default"),
        "sparse_load": Fitted(0.66, status="default"),
    }
    unfitted = with_section(hw, "fp8", replace(hw.sections["gemm", "fp8"], constants=start))
    fitted = fit_sparse24(unfitted, "fp8")
    assert (
        fitted.constants["sparse_load"].status == fitted.constants["sparse_step"].status == "fitted"
    )
    before, after = (np.abs(ratio_errors(h)) for h in (unfitted, with_section(hw, "fp8", fitted)))
    assert before[FEW].min() > 0.15
    assert np.median(after[FEW]) <= 0.10
    assert fitted.accuracy["median_2to4"] <= 0.10


@pytest.mark.parametrize(("gpu", "dtype"), [("a100", "bf16"), ("l40s", "bf16")])
def test_without_few_tokens_or_rows_the_load_stays(gpu: str, dtype: str) -> None:
    """Ratios of an A100 start at 2,048 tokens; an L40S has none."""
    hw = load_hardware(gpu)
    fitted = fit_sparse24(hw, dtype)
    assert fitted.constants["sparse_load"] == hw.sections["gemm", dtype].constants["sparse_load"]
    assert fitted.constants["sparse_step"].status == ("fitted" if gpu == "a100" else "default")
