"""Elementwise times: floor, bandwidth, L2, classes, and the fit recovering planted constants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from operator_times import elementwise_time

from calibration.evidence.measurements.rtx4090 import rtx_tables
from calibration.evidence.sets import MeasuredRows
from calibration.fit.operators import ElementwiseFit
from calibration.fit.section import fit_section
from calibration.validation.scoring import ScoredRows, score
from simulator.codes import ROLES, role_code
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.operators.elementwise import CLASSES, Moves, class_code
from simulator.operators.elementwise import ELEMENTWISE_CONSTANTS as CONSTANTS


@pytest.mark.quick
def test_every_role_has_a_class_by_code_and_by_name() -> None:
    codes = class_code(np.arange(len(ROLES)))
    assert class_code(ROLES).tolist() == codes.tolist()
    assert {CLASSES[code] for code in codes} == set(CLASSES)
    names = ["mlp_norm", "gather", "rotary", "residual", "select"]
    assert [CLASSES[i] for i in class_code(role_code(*names))] == [
        "norm",
        "embedding",
        "rotary",
        "copy",
        "select",
    ]
    with pytest.raises(InputError, match="mlp_nrm"):
        class_code("mlp_nrm")


@pytest.mark.quick
@pytest.mark.parametrize("name", ["a100_sxm_80gb", "h100_sxm", "rtx_4090"])
def test_small_ones_cost_the_floor_and_large_ones_their_bytes(name: str) -> None:
    hw = replace(load_hardware(name), sections={})
    sizes = np.geomspace(1e2, 1e11, 200)
    t = elementwise_time(sizes / 2, sizes / 2, hw, role="mlp_norm")
    assert t.bottlenecks[0] == "launch"
    assert t.bottlenecks[-1] == "memory"
    assert t.seconds[0] == pytest.approx(CONSTANTS["t0_norm_s"].default(hw.architecture), rel=1e-3)
    rate = CONSTANTS["e_norm"].default(hw.architecture) * hw.bandwidth_bytes_per_s
    assert t.seconds[-1] == pytest.approx(sizes[-1] / rate, rel=1e-3)
    assert np.all(np.diff(t.seconds) > 0)
    assert np.all(t.lower <= t.seconds)
    assert np.all(t.seconds <= t.upper)
    large = sizes > 20 * hw.l2_bytes
    assert np.all(t.seconds[large] >= t.roofline_s[large])


@pytest.mark.quick
def test_halving_the_bandwidth_doubles_a_large_operator() -> None:
    hw = replace(load_hardware("h100_sxm"), sections={})
    half = replace(hw, bandwidth_bytes_per_s=hw.bandwidth_bytes_per_s / 2)
    a, b = (
        float(elementwise_time(1e9, 1e9, device, role="rotary").seconds) for device in (hw, half)
    )
    assert b / a == pytest.approx(2.0, rel=1e-3)


def planted(seed: int, noise: float) -> tuple[ElementwiseFit, dict[str, float]]:
    rng = np.random.default_rng(seed)
    truth = {n: k.default("ada") for n, k in CONSTANTS.items()} | {"l2_share": 1.1}
    truth |= {
        "t0_norm_s": 3e-6,
        "e_norm": 0.8,
        "l2_norm": 2.0,
        "t0_rotary_s": 2e-6,
        "e_rotary": 0.6,
        "l2_rotary": 3.0,
    }
    size = np.exp(rng.uniform(np.log(1e4), np.log(1e10), 400))
    code = rng.choice([CLASSES.index("norm"), CLASSES.index("rotary")], 400)
    calls = Moves(size, code, 72e6, 1.0e12, "ada")
    return ElementwiseFit(calls, calls.seconds(truth) * np.exp(noise * rng.normal(size=400))), truth


@pytest.mark.quick
def test_fit_recovers_planted_constants() -> None:
    measured, truth = planted(3, 0.01)
    fit = fit_section(measured)
    for name in (
        "t0_norm_s",
        "e_norm",
        "l2_norm",
        "t0_rotary_s",
        "e_rotary",
        "l2_rotary",
        "l2_share",
    ):
        constant = fit.section.constants[name]
        assert abs(constant.value - truth[name]) < 4 * constant.std_error
    assert fit.fixed["e_select"] == "no rows of its class"
    assert fit.section.constants["e_select"].status == "default"
    assert fit.section.accuracy["mape"] < 0.02


@pytest.mark.quick
def test_fit_refuses_too_few_and_skips_unusable_rows() -> None:
    measured, _ = planted(3, 0.01)
    with pytest.raises(ValueError, match="at least 20"):
        fit_section(measured.take(slice(0, 10)))
    measured.seconds[:3] = [np.nan, -1.0, 0.0]
    assert fit_section(measured).rows == 397


def test_accuracy_on_the_rtx_4090(shared_data) -> None:  # type: ignore[no-untyped-def]
    hw = load_hardware("rtx_4090")
    r = rtx_tables(shared_data, hw)
    r = r.select(r.is_operator("elementwise"))
    moves = Moves(
        r.read_bytes + r.write_bytes,
        class_code(r.role),
        hw.l2_bytes,
        hw.bandwidth_bytes_per_s,
        "ada",
    )
    codes = class_code(ROLES).tolist()
    roles = np.array([codes.index(i) for i in range(len(CLASSES))])  # one of each class
    scores = []
    for seed in (0, 1, 2):
        train, test = (
            part.data
            for part in MeasuredRows(ElementwiseFit(moves, r.seconds), hw).train_test(400, seed)
        )
        own = hw.calibrated({("elementwise", "bf16"): fit_section(train, seed=seed).section})
        t = elementwise_time(test.calls.bytes_, 0.0, own, role=roles[test.calls.code])
        long = test.seconds > 1e-5
        over_10us = score(ScoredRows(test.seconds[long], t.seconds[long]))["mape"]
        scores.append(
            score(ScoredRows(test.seconds, t.seconds, t.lower, t.upper))
            | {"mape over 10us": over_10us}
        )
    # measured: 5.1 %, and 6.7 % over 10 us, where rotary alternates between 10 and 22 us from one
    # size to the next
    assert np.mean([s["mape"] for s in scores]) < 0.06
    assert np.mean([s["mape over 10us"] for s in scores]) < 0.075
    assert 0.87 <= np.mean([s["coverage"] for s in scores]) <= 0.95
