"""Experts: their use, tiles of drawn tokens, the busiest of several devices, parts, physics, formats, pruning, fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from operator_times import errors_of, experts_time

from calibration.fit.experts import ExpertsFit, experts_part, layers_of
from calibration.fit.predict import predict
from calibration.fit.section import fit_section
from calibration.fit.solver import ABSENT
from calibration.measurements import load_measurements
from calibration.measurements.wheel import datasheet
from calibration.records.importers import finish
from calibration.records.readers import GROUPED_SHAPE, Draft, read_grouped, too_slow
from calibration.records.timing_table import Source
from simulator.cost import experts as experts_model
from simulator.cost.base import Machine
from simulator.cost.experts import PARTS, TILES, Layers, dealt_load, drawn_load
from simulator.errors import InputError
from simulator.hardware.constants import EXPERTS_CONSTANTS as CONSTANTS
from simulator.hardware.library import list_hardware, load_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.routing import EXPERT_RANGE, EXPERT_SKEW, experts_chance, experts_touched
from simulator.uncertainty.forward import ratio_half
from simulator.workload import Kind

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
        ratio.append([tiles[0] / (experts * np.ceil(counts / rows).mean()) for rows, tiles in zip(TILES, load.tiles)])
    # chance smooths the steps of whole tiles less than the form does, which is right on average
    assert np.abs(np.log(ratio)).max() < 0.35
    assert np.exp(np.log(ratio).mean(axis=0)).tolist() == pytest.approx([1.0] * len(TILES), abs=0.08)


@pytest.mark.quick
def test_touched_by_hand() -> None:
    assert experts_touched([1, 2], 8, 2).tolist() == pytest.approx([2.0, 8 * (1 - 0.75**2)])
    assert experts_touched(1, 8, 2, 1.0) == pytest.approx(2.0)  # a token uses two, however they are liked
    many = experts_touched(TOKENS[:, None], 128, 8, [0.0, 0.5, 1.0])
    assert (np.diff(many, axis=0) > -1e-9).all()
    assert (np.diff(many[1:5], axis=1) < 0).all()  # skew leaves some idle
    assert many[-1] == pytest.approx(128, rel=1e-3)


@pytest.mark.parametrize(("m", "devices", "skew"), [(1, 8, 0.0), (16, 8, 0.0), (16, 4, 0.8), (512, 8, 0.8)])
def test_the_highest_load_of_devices_is_that_of_a_simulation(m: int, devices: int, skew: float) -> None:
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
    load = drawn_load(*(np.array([v], dtype=F8) for v in (m, 128 / devices, 8 / devices, skew, devices)))
    assert load.touched[0] == pytest.approx(np.mean(touched), rel=0.1)
    assert load.rows[0] == pytest.approx(np.mean(rows), rel=0.1)


@pytest.mark.quick
def test_more_devices_wait_for_one_with_more_than_its_share() -> None:
    hw, share = load_hardware("h100@trtllm"), 16
    m = np.arange(1, 2000, dtype=F8)
    mean, highest = (
        experts_model.experts(m, 1536, 4096, share, 1, hw, dtype="fp8", weight_dtype="fp8_block", devices=d)
        for d in (1, 8)
    )
    assert (highest.time >= mean.time).all()
    assert 1.1 < highest.time[15] / mean.time[15] < 1.26  # at most as many more experts as tokens use
    assert (np.diff(highest.time) > -1e-3 * highest.time[:-1]).all()
    touched = drawn_load(m, np.full_like(m, share), np.ones_like(m), 0.0, np.full_like(m, 8.0)).touched
    assert touched.max() == share
    routed = lower(load_model("qwen3-235b-a22b"), phase="decode", batch=16, devices=8, parallel="expert")
    assert set(routed.batch[routed.kind == Kind.EXPERTS].tolist()) == {8}
    whole = lower(load_model("qwen3-235b-a22b"), phase="decode", batch=16, devices=8, parallel="tensor")
    assert set(whole.batch[whole.kind == Kind.EXPERTS].tolist()) == {0}


@pytest.mark.quick
def test_two_products_and_the_rest_are_the_layer() -> None:
    hw = load_hardware("h20")
    layer, up, down = (experts_model.experts(TOKENS, *QWEN, hw, part=part).time for part in PARTS)
    assert (up > down).all()
    assert (layer > up + down).all()
    # with much work in the products they are nearly all of it
    wide = [float(experts_model.experts(4096, 14336, 4096, 8, 2, hw, part=part).time) for part in PARTS]
    assert 0.9 < (wide[1] + wide[2]) / wide[0] < 1.0
    assert wide[1] == pytest.approx(2.0 * wide[2], rel=0.02)
    with pytest.raises(InputError, match="part 'middle' is unknown"):
        experts_model.experts(1, *QWEN, hw, part="middle")


@pytest.mark.quick
def test_an_sm_with_a_quarter_of_the_tensor_rate_comes_closer_to_it() -> None:
    """The H20's SMs load weights as fast as the H100's and compute a quarter of it."""
    share = {}
    for name in ("h100", "h20"):
        hw = replace(load_hardware(name), sections={}, stacks={})
        time = float(experts_model.experts(65536, 1536, 4096, 128, 8, hw, part="gate_up").time)
        share[name] = 4.0 * 65536 * 8 * 1536 * 4096 / time / hw.peak_flop_per_s("bf16")
    assert 1.15 < share["h20"] / share["h100"] < 1.5


@pytest.mark.quick
def test_the_load_of_a_measured_model_is_that_of_its_skew() -> None:
    """Qwen3-30B-A3B: 65 of 128 experts take 90 % of the tokens, entropy 0.111 short; of code alone 58 and 0.154."""
    for skew, most, short in ((EXPERT_SKEW, 65, 0.111), (0.97, 58, 0.154)):
        load = np.sort(np.exp(np.log(EXPERT_RANGE) * skew * (np.arange(128) + 0.5) / 128))[::-1]
        load /= load.sum()
        assert np.searchsorted(np.cumsum(load), 0.9) == pytest.approx(most, abs=3)
        assert 1 + (load * np.log(load)).sum() / np.log(128) == pytest.approx(short, abs=0.02)
        chance = experts_chance(128, 8, skew)
        few = load.reshape(len(chance), -1).mean(axis=1)[::-1]
        np.testing.assert_allclose(chance / chance.sum(), few / few.sum(), rtol=0.02)


@pytest.mark.quick
def test_a_benchmark_deals_tokens_out() -> None:
    m, experts, active = (np.array(v, dtype=F8) for v in ([2, 16, 2048], [128] * 3, [8] * 3))
    even = dealt_load(m, experts, active, 0.0)
    assert even.touched.tolist() == [16, 128, 128]
    assert even.tiles[TILES.index(128.0)].tolist() == [16, 128, 128]  # 128 tokens each: no row is padded
    law = dealt_load(m, experts, active, 1.01)
    assert law.touched[0] == pytest.approx(16, rel=0.05)  # all are rounded to none, and 16 are dealt out again
    assert 55 < law.touched[1] < 80
    assert law.tiles[-1][2] > 1.2 * even.tiles[-1][2]  # of 128 tokens on average some have 1200
    near = dealt_load(m, experts, active, -0.3)
    assert (near.touched / experts).tolist() == pytest.approx([0.0, 0.5, 1.0])  # 0.7 to 1.3 tokens are none or one
    assert near.tiles[TILES.index(128.0)][2] == pytest.approx(1.5 * 128)  # 90 to 166 tokens are one tile or two


@pytest.mark.quick
@pytest.mark.parametrize("name", list_hardware())
def test_never_faster_than_physics(name: str) -> None:
    hw = load_hardware(name)
    dtype = "bf16" if "bf16" in hw.rates else "fp16" if "fp16" in hw.rates else "fp32"
    for skew in (0.0, 1.0):
        t = experts_time(TOKENS, *QWEN, hw, skew=skew, dtype=dtype, level=0.99)
        flops = 6.0 * TOKENS * 8 * 768 * 2048 / (hw.peak_flop_per_s(dtype) * hw.clock_headroom)
        element = 4.0 if dtype == "fp32" else 2.0
        moved = 3 * 768 * 2048 * element * experts_touched(TOKENS, 128, 8, skew) / hw.bandwidth_bytes_per_s
        assert (t.lower >= np.maximum(flops, moved) * (1 - 1e-12)).all()
        assert (t.lower <= t.seconds).all()
        assert (t.seconds <= t.upper).all()
        assert (t.seconds[1:] > 0.98 * t.seconds[:-1]).all()  # where a kernel steps up it is flat afterwards


@pytest.mark.quick
def test_arrays_broadcast_and_bad_formats_are_named() -> None:
    hw = load_hardware("h100@vllm")
    t = experts_time(TOKENS[:, None], 768, 2048, [128, 96], 8, hw)
    assert t.seconds.shape == (7, 2)
    assert t.seconds[2, 1] == experts_time(16, 768, 2048, 96, 8, hw).seconds
    with pytest.raises(InputError, match="dtype 'int3' is unknown"):
        experts_time(1, *QWEN, hw, weight_dtype="int3")
    with pytest.raises(InputError, match="has no nvfp4 arithmetic"):
        experts_time(1, *QWEN, hw, dtype="nvfp4")


@pytest.mark.quick
def test_narrow_weights_are_read_faster_and_without_a_fit_of_their_own_less_is_known() -> None:
    hw = load_hardware("h100@trtllm")
    bf16, fp8 = (experts_time(64, *QWEN, hw, dtype=dtype).seconds for dtype in ("bf16", "fp8"))
    assert 0.5 < fp8 / bf16 < 0.75
    own, fallback = (
        errors_of(experts_model.experts, 64, *QWEN, load_hardware(name), weight_dtype="mxfp4")
        for name in ("h100@vllm", "a100@vllm")
    )
    assert "experts quantised" not in own.factors
    assert "experts quantised" in fallback.factors
    generic = experts_time(64, *QWEN, load_hardware("t4"), dtype="fp16")
    unknown = errors_of(experts_model.experts, 64, *QWEN, load_hardware("t4"), dtype="fp16")
    assert {"experts default", "experts generic"} <= set(unknown.factors)
    assert generic.upper / generic.seconds > 1.5


@pytest.mark.quick
def test_fewer_experts_save_what_they_no_longer_read() -> None:
    """A quarter of the experts removed: the decode of one sequence reads as many as before, that of 256 reads a quarter
    fewer, a long prefill computes as much; narrower experts save in all three."""
    hw = load_hardware("h100@vllm")
    dense, fewer, narrow = (experts_time(TOKENS, n, 2048, e, 8, hw) for n, e in ((768, 128), (768, 96), (576, 128)))
    ratio = fewer.seconds / dense.seconds
    assert ratio[0] == pytest.approx(1.0, abs=0.05)
    assert ratio[4] == pytest.approx(0.75, abs=0.05)
    assert ratio[-1] == pytest.approx(1.0, abs=0.1)
    assert (narrow.seconds < 0.97 * dense.seconds).all()
    # what both share cancels in their ratio
    errors = [errors_of(experts_model.experts, TOKENS, 768, 2048, number, 8, hw) for number in (96, 128)]
    half = ratio_half(*errors)
    assert (half < np.log(dense.upper / dense.seconds)).all()


@pytest.mark.quick
def test_a_width_off_16_is_slow_and_its_interval_wide() -> None:
    hw = load_hardware("h100@vllm")
    aligned, off = (experts_time(256, n, 2048, 128, 8, hw) for n in (704, 696))
    assert off.seconds > 1.5 * aligned.seconds
    assert off.upper / off.seconds > 1.2 * aligned.upper / aligned.seconds


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
    return ExpertsFit(calls, calls.seconds(known) * np.exp(rng.normal(0, 0.02, len(rows))), "hopper")


def test_planted_constants_are_recovered() -> None:
    known = {"t0_s": 3e-5, "e_tc": 0.6, "e_d": 0.8, "e_io": 1.0, "b_sm": 2e11, "narrow": 60.0}
    part = fit_section(planted(**known))
    for name, value in known.items():
        found = part.section.constants[name]
        assert found.std_error is not None
        assert abs(found.value - value) < 4 * found.std_error + 0.03 * value, name
    assert part.section.accuracy["mape"] < 0.03
    with pytest.raises(ValueError, match="experts: expected at least 300 usable rows, got 10"):
        fit_section(planted().take(np.arange(10)))


def test_products_alone_and_whole_layers_train_one_model() -> None:
    """Layers alone leave the start of a product at its default; products alone leave everything else."""
    layers = planted(product_s=8e-6, t0_s=3e-5, e_tc=0.7)
    assert layers.constants().fixed["product_s"] == ABSENT
    part = np.arange(len(layers)) % 3
    calls = replace(layers.calls, part=part, warm=part == 0)
    mixed = replace(
        layers, calls=calls, seconds=calls.seconds({**DEFAULTS, "product_s": 8e-6, "t0_s": 3e-5, "e_tc": 0.7})
    )
    found = mixed.constants()
    assert found.values["product_s"] == pytest.approx(8e-6, rel=0.1)
    assert found.values["t0_s"] == pytest.approx(3e-5, rel=0.15)
    products = mixed.take(part > 0)
    fixed = products.constants().fixed
    assert {"t0_s", "expert_s", "e_io", "l2_gain", "l2_share"} <= {n for n, why in fixed.items() if why == ABSENT}


def test_grouped_products_are_read_as_parts_and_predicted_cold() -> None:
    """Two lines of InferSim's table of an H20: 32 experts with 16 tokens each, and two with 48."""
    table = dict(
        zip(
            GROUPED_SHAPE,
            np.array([[128, 32, 8, 4096, 1536, 16, 228.694, 117.851], [112, 2, 6, 2560, 1664, 48, 13.987, 9.692]]).T,
        )
    )
    columns, screen = read_grouped(table)
    result = finish(Draft(columns, (Source("NVIDIA H20"),), screen), label="table", hw=datasheet("h20"), dtype="all")
    r = result.records
    assert r.m.tolist() == [256, 256]
    assert result.refusals.rows == {"under 4 experts: their number of tokens was drawn": [2, 4]}
    assert experts_part(r).tolist() == [1, 2]
    assert layers_of(r, Machine.of(datasheet("h20"), "fp8_block"), "hopper").calls.load.touched.tolist() == [32.0, 32.0]
    hw = replace(load_hardware("h20"), sections={}, stacks={})
    time = predict(r, hw).time
    # each of 32 experts fills one tile; by defaults within 15 %
    assert np.abs(np.log(time.seconds / r.seconds)).max() < 0.2
    assert (time.lower < r.seconds).all()
    assert (r.seconds < time.upper).all()


def test_the_shipped_section_is_what_its_table_gives_and_holds_models_left_out() -> None:
    hw, records = load_hardware("h100@trtllm"), load_measurements("h100_sxm/experts/trtllm")
    measured = layers_of(records, Machine.of(hw), "hopper")
    layers, part, ships = measured.calls, fit_section(measured), hw.section("experts", "bf16")
    for name, constant in ships.constants.items():
        assert part.section[name] == pytest.approx(constant.value, rel=1e-3), name
    assert part.section.accuracy["mape"] < 0.065
    bare = replace(part.section, arrays={})
    error = [
        np.abs(
            np.log(experts_time(*sizes, hw_, skew=layers.skew, dealt=True, warm=True).seconds / measured.seconds)
        ).mean()
        for sizes in [(layers.m, layers.n, layers.k, layers.experts, layers.active)]
        for hw_ in (hw, hw.calibrated({("experts", "bf16"): bare}))
    ]
    assert error[0] < 0.85 * error[1]  # the residual takes up part of what the analytical time leaves


@pytest.mark.quick
def test_untuned_kernels_are_found_by_other_widths() -> None:
    m, n = (a.ravel() for a in np.meshgrid([1.0, 8.0, 64.0], [256.0, 512.0, 1024.0], indexing="ij"))
    seconds = 1e-5 + 1e-8 * n * m**0.1
    shape, skew = np.zeros((9, 1)), np.zeros(9)
    assert not too_slow(shape, m, n, skew, seconds).any()
    slow = np.where(n == 512.0, 4.0, 1.0)
    assert too_slow(shape, m, n, skew, seconds * slow).tolist() == (n == 512.0).tolist()
