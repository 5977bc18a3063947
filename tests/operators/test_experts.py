"""Experts: touched experts, tiles of drawn tokens, the highest load of devices, physics, formats,
pruning, fits."""

from __future__ import annotations

import numpy as np
import pytest
from operator_times import errors_of, experts_time, of_experts

import simulator
from calibration.evidence.measurements.wheel import datasheet
from calibration.fit.operators import ExpertsFit
from calibration.fit.section import fit_section
from simulator.codes import Kind
from simulator.hardware.library import list_hardware, load_hardware
from simulator.operators.base import Machine
from simulator.operators.experts import (
    EXPERT_RANGE,
    TILES,
    Layers,
    dealt_load,
    drawn_load,
    experts_chance,
    experts_touched,
)
from simulator.operators.experts import EXPERTS_CONSTANTS as CONSTANTS
from simulator.uncertainty.forward import ratio_half

F8 = np.float64
QWEN = (768, 2048, 128, 8)  # Qwen3-30B-A3B: width, hidden size, experts, experts a token
TOKENS = np.array([1, 4, 16, 64, 256, 1024, 8192])


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize(("experts", "active"), [(128, 8), (8, 2), (16, 0.5)])
def test_touched_experts_and_tiles_are_those_of_tokens_that_choose_by_chance(
    experts: int, active: float, skew: float
) -> None:
    rng, chance = np.random.default_rng(0), experts_chance(experts, active, skew)
    assert chance.mean() * experts == pytest.approx(active, rel=1e-9)
    ratio = []
    for m in (1, 3, 7, 40, 130, 300, 333, 1111):
        counts = rng.binomial(m, np.repeat(chance, 320_000 // len(chance)))
        touched = experts_touched(m, experts, active, skew)
        assert touched == pytest.approx(experts * (counts > 0).mean(), rel=0.03)
        sizes = (np.array([v], dtype=F8) for v in (m, experts, active, skew))
        load = drawn_load(*sizes)
        assert load.touched[0] == pytest.approx(touched)
        ratio.append(
            [
                tiles[0] / (experts * np.ceil(counts / rows).mean())
                for rows, tiles in zip(TILES, load.tiles)
            ]
        )
    # chance smooths the steps of whole tiles less than the form does, which is right on average
    assert np.abs(np.log(ratio)).max() < 0.35
    assert np.exp(np.log(ratio).mean(axis=0)).tolist() == pytest.approx(
        [1.0] * len(TILES), abs=0.08
    )


@pytest.mark.quick
def test_touched_by_hand() -> None:
    assert experts_touched([1, 2], 8, 2).tolist() == pytest.approx([2.0, 8 * (1 - 0.75**2)])
    # a token uses two, however they are liked
    assert experts_touched(1, 8, 2, 1.0) == pytest.approx(2.0)
    many = experts_touched(TOKENS[:, None], 128, 8, [0.0, 0.5, 1.0])
    assert (np.diff(many, axis=0) > -1e-9).all()
    assert (np.diff(many[1:5], axis=1) < 0).all()  # skew leaves some idle
    assert many[-1] == pytest.approx(128, rel=1e-3)


@pytest.mark.parametrize(
    ("m", "devices", "skew"), [(1, 8, 0.0), (16, 8, 0.0), (16, 4, 0.8), (512, 8, 0.8)]
)
def test_the_highest_load_of_devices_is_that_of_a_simulation(
    m: int, devices: int, skew: float
) -> None:
    """128 experts, 8 per token, spread over the devices regardless of their use."""
    rng, few = np.random.default_rng(0), experts_chance(128, 8, skew)
    chance = np.repeat(few, 128 // len(few))
    touched, rows = [], []
    for _ in range(300):
        order = np.log(chance) + rng.gumbel(size=(m, 128))  # eight different experts per token
        chosen = np.argpartition(order, -8, axis=1)[:, -8:]
        counts = rng.permutation(np.bincount(chosen.ravel(), minlength=128)).reshape(devices, -1)
        touched.append((counts > 0).sum(axis=1).max())
        rows.append(counts.sum(axis=1).max())
    load = drawn_load(
        *(np.array([v], dtype=F8) for v in (m, 128 / devices, 8 / devices, skew, devices))
    )
    assert load.touched[0] == pytest.approx(np.mean(touched), rel=0.1)
    assert load.rows[0] == pytest.approx(np.mean(rows), rel=0.1)


@pytest.mark.quick
def test_the_load_of_a_measured_model_is_that_of_its_skew() -> None:
    """In Qwen3-30B-A3B 65 of 128 experts take 90 % of the tokens, and the entropy is 0.111 below
    its maximum; on code alone the numbers are 58 and 0.154."""
    for skew, most, short in ((0.8, 65, 0.111), (0.97, 58, 0.154)):
        load = np.sort(np.exp(np.log(EXPERT_RANGE) * skew * (np.arange(128) + 0.5) / 128))[::-1]
        load /= load.sum()
        assert np.searchsorted(np.cumsum(load), 0.9) == pytest.approx(most, abs=3)
        assert 1 + (load * np.log(load)).sum() / np.log(128) == pytest.approx(short, abs=0.02)
        chance = experts_chance(128, 8, skew)
        few = load.reshape(len(chance), -1).mean(axis=1)[::-1]
        np.testing.assert_allclose(chance / chance.sum(), few / few.sum(), rtol=0.02)


@pytest.mark.quick
def test_touched_experts_of_real_routers() -> None:
    """Qwen3-30B-A3B at batch 1 to 128, and without half of its experts (AndrewDeng1/vllm-inco,
    README, 3d)."""
    batch = 2.0 ** np.arange(8)
    measured = (
        [8, 14.5, 24.8, 40.7, 59.7, 78.1, 94.0, 104.7],
        [8, 14.0, 22.7, 34.7, 46.3, 54.7, 59.7, 61.6],
    )
    dense = simulator.lower("qwen3-30b-a3b", phase="decode")
    for w, touched in zip((dense, simulator.prune(dense, "experts", 0.5)), measured, strict=True):
        at = np.flatnonzero(w.kind == Kind.EXPERTS)[0]
        found = experts_touched(batch, w.experts[at], w.active[at], w.skew[at])
        np.testing.assert_allclose(found, touched, rtol=0.05)


@pytest.mark.quick
def test_a_benchmark_deals_tokens_out() -> None:
    m, experts, active = (np.array(v, dtype=F8) for v in ([2, 16, 2048], [128] * 3, [8] * 3))
    even = dealt_load(m, experts, active, 0.0)
    assert even.touched.tolist() == [16, 128, 128]
    # 128 tokens each: no row is padded
    assert even.tiles[TILES.index(128.0)].tolist() == [16, 128, 128]
    law = dealt_load(m, experts, active, 1.01)
    # all are rounded to none, and 16 are dealt out again
    assert law.touched[0] == pytest.approx(16, rel=0.05)
    assert 55 < law.touched[1] < 80
    # the mean is 128 tokens, and some experts have 1200
    assert law.tiles[-1][2] > 1.2 * even.tiles[-1][2]
    near = dealt_load(m, experts, active, -0.3)
    # 0.7 to 1.3 tokens are none or one
    assert (near.touched / experts).tolist() == pytest.approx([0.0, 0.5, 1.0])
    # 90 to 166 tokens are one tile or two
    assert near.tiles[TILES.index(128.0)][2] == pytest.approx(1.5 * 128)


@pytest.mark.quick
@pytest.mark.parametrize("name", list_hardware())
def test_more_tokens_take_no_less_time(name: str) -> None:
    hw = load_hardware(name)
    dtype = "bf16" if "bf16" in hw.rates else "fp16" if "fp16" in hw.rates else "fp32"
    for skew in (0.0, 1.0):
        seconds = experts_time(TOKENS, *QWEN, hw, skew=skew, dtype=dtype).seconds
        # where a kernel steps up, time is flat afterwards
        assert (seconds[1:] > 0.98 * seconds[:-1]).all()


@pytest.mark.quick
def test_narrow_weights_are_read_faster_and_without_a_fit_of_their_own_less_is_known() -> None:
    hw = load_hardware("h100@trtllm")
    bf16, fp8 = (experts_time(64, *QWEN, hw, dtype=dtype).seconds for dtype in ("bf16", "fp8"))
    assert 0.5 < fp8 / bf16 < 0.75
    own, fallback = (
        errors_of(of_experts, 64, *QWEN, load_hardware(name), weight_dtype="mxfp4")
        for name in ("h100@vllm", "a100@vllm")
    )
    assert "experts quantised" not in own.factors
    assert "experts quantised" in fallback.factors
    generic = experts_time(64, *QWEN, load_hardware("t4"), dtype="fp16")
    unknown = errors_of(of_experts, 64, *QWEN, load_hardware("t4"), dtype="fp16")
    assert {"experts default", "experts generic"} <= set(unknown.factors)
    assert generic.upper / generic.seconds > 1.5


@pytest.mark.quick
def test_fewer_experts_save_what_they_no_longer_read() -> None:
    """A quarter of the experts is removed. A decode of one sequence reads as many experts as
    before, a decode of 256 a quarter fewer, and a long prefill computes as much. Narrower experts
    save time in all three."""
    hw = load_hardware("h100@vllm")
    dense, fewer, narrow = (
        experts_time(TOKENS, n, 2048, e, 8, hw) for n, e in ((768, 128), (768, 96), (576, 128))
    )
    ratio = fewer.seconds / dense.seconds
    assert ratio[0] == pytest.approx(1.0, abs=0.05)
    assert ratio[4] == pytest.approx(0.75, abs=0.05)
    assert ratio[-1] == pytest.approx(1.0, abs=0.1)
    assert (narrow.seconds < 0.97 * dense.seconds).all()
    # what both share cancels in their ratio
    errors = [errors_of(of_experts, TOKENS, 768, 2048, number, 8, hw) for number in (96, 128)]
    half = ratio_half(*errors)
    assert (half < np.log(dense.upper / dense.seconds)).all()


@pytest.mark.quick
@pytest.mark.parametrize("name", list_hardware())
def test_equal_experts_in_use_take_equal_times(name: str) -> None:
    """One token uses eight experts, of however many; both errors are the same error."""
    hw = load_hardware(name)
    dtype = "bf16" if "bf16" in hw.rates else "fp16" if "fp16" in hw.rates else "fp32"
    few, many = (
        experts_time(1, 768, 2048, number, 8, hw, skew=skew, dtype=dtype)
        for number, skew in ((16, 0.2), (128, 0.8))
    )
    assert few.seconds == pytest.approx(many.seconds, rel=1e-9)
    errors = [errors_of(of_experts, 1, 768, 2048, e, 8, hw, dtype=dtype) for e in (16, 128)]
    a, b = (error.wide() for error in errors)
    np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(errors[0].coordinates, errors[1].coordinates, atol=1e-9)


@pytest.mark.quick
def test_pruned_experts_save_no_more_than_their_bytes() -> None:
    """Half of the experts: nothing at batch 1, more with every batch, and no more than the bound.
    Kernels that visit every expert are the named exception."""
    settings = {"phase": "decode", "batch": [1, 4, 16, 64]}
    for name in ("a100", "h100", "h100@trtllm", "b200", "l40s", "rtx_4090", "mi300x"):
        same, half = (
            simulator.table(["qwen3-30b-a3b"], [name], prune=[f"experts {s}"], **settings)
            for s in (0.0, 0.5)
        )
        assert [(r.speedup, r.lower, r.upper) for r in same] == [(1.0, 1.0, 1.0)] * 4
        assert half[0].speedup == pytest.approx(1.0, abs=0.01)
        assert half[0].upper < 1.03
        assert np.all(np.diff([r.speedup for r in half]) > 0.0)
        assert all(r.speedup < 1.01 * r.roofline_bound for r in half)


DEFAULTS = {name: c.default("hopper") for name, c in CONSTANTS.items()}


def planted(**values: float) -> ExpertsFit:
    """Times of five models by known constants, 2 % of noise."""
    machine, rng = Machine.of(datasheet("h100_sxm")), np.random.default_rng(0)
    models = [
        (768, 2048, 128, 8),
        (2048, 4096, 256, 8),
        (14336, 4096, 8, 2),
        (8192, 5120, 16, 1),
        (1024, 4096, 512, 10),
    ]
    rows = [
        (m, n // tp, k, e, a, s)
        for n, k, e, a in models
        for tp in (1, 2, 4, 8)
        for m in 2 ** np.arange(0, 15)
        for s in (0, 1.01)
    ]
    calls = Layers(machine, *np.array(rows, dtype=F8).T)
    known = DEFAULTS | values
    return ExpertsFit(
        calls, calls.seconds(known) * np.exp(rng.normal(0, 0.02, len(rows))), "hopper"
    )


def test_planted_constants_are_recovered() -> None:
    known = {"t0_s": 3e-5, "e_tc": 0.6, "e_d": 0.8, "e_io": 1.0, "b_sm": 2e11, "narrow": 60.0}
    part = fit_section(planted(**known))
    for name, value in known.items():
        found = part.section.constants[name]
        assert abs(found.value - value) < 4 * found.std_error + 0.03 * value, name
    assert part.section.accuracy["mape"] < 0.03
    with pytest.raises(ValueError, match="experts: expected at least 300 usable rows, got 10"):
        fit_section(planted().take(np.arange(10)))
