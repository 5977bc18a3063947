"""Local updates: planted effects are found, named, carried to other operators and covered; bad rows
are rejected."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from calibration.cli.fit import load_rows
from calibration.devices.protocol import LAYER_LAUNCHES, Operator
from calibration.fit.local_update import Updated, update_profile
from calibration.fit.predict import LaunchTime, parts_of, predict
from calibration.measure.plan import next_rows
from calibration.records.timing_table import Records, Source
from calibration.runners.runs import operator_of, target_operators, target_workloads
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.models.lower import lower
from simulator.prediction.batch import batch_with
from simulator.uncertainty.factors import Posterior, Uncertainty, correlation, in_order
from simulator.uncertainty.forward import forward_passes
from simulator.uncertainty.intervals import workload_time

pytestmark = pytest.mark.quick

HW = load_hardware("h100_sxm")
SOURCE = Source("planted GPU", {"planted": "1"})
SLOWER, LONGER = 1.0 / 0.92, 1.2


def gemms(rows: int, seed: int = 0) -> Records:
    rng = np.random.default_rng(seed)
    m = 2.0 ** rng.integers(0, 14, rows)
    n, k = 256.0 * rng.integers(2, 48, (2, rows))
    return Records.from_columns([SOURCE], m=m, n=n, k=k, seconds=1.0)


def attention(rows: int, kind: str, seed: int = 0) -> Records:
    rng = np.random.default_rng(seed)
    length = 2 ** rng.integers(9, 14, rows)
    shape = {
        "batch": 2 ** rng.integers(0, 4, rows),
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "kv_len": length,
    }
    q_len = length if kind == "prefill" else 1
    return Records.from_columns(
        [SOURCE], operator=f"attention_{kind}", q_len=q_len, seconds=1.0, **shape
    )


def times(hw: HardwareProfile, r: Records) -> Any:
    """Predicted seconds, lower and upper, of each row."""
    out = np.zeros((3, len(r)))
    for _, _, rows in parts_of(r, hw, {}):
        t = predict(r.select(rows), hw).time
        out[:, rows] = t.seconds, t.lower, t.upper
    return out


def planted(r: Records, noise: float = 0.02, seed: int = 0) -> Records:
    """Rows as a machine measures them whose clocks are 8 % lower and whose launches take 20 %
    longer."""
    slower = {"e_tc": 1 / SLOWER, "tau": SLOWER, "b_e": 1 / SLOWER, "t0": LONGER, "t0_s": LONGER}
    sections = {}
    for key, section in HW.sections.items():
        changed = {
            n: replace(c, value=c.value * slower.get(n, 1.0)) for n, c in section.constants.items()
        }
        sections[key] = replace(section, constants=MappingProxyType(changed))
    seconds = times(replace(HW, sections=MappingProxyType(sections)), r)[0]
    return r.replace(
        seconds=seconds * np.exp(noise * np.random.default_rng(seed).normal(size=len(r)))
    )


def error(hw: HardwareProfile, r: Records) -> float:
    return float(np.abs(times(hw, r)[0] / r.seconds - 1.0).mean())


@pytest.fixture(scope="module")
def updated() -> Updated:
    return update_profile(HW, planted(gemms(40)))


def test_lower_clocks_and_longer_launches_are_found_and_said(updated: Updated) -> None:
    found = {e.name: e for e in updated.effects}
    assert found["gemm compute"].mean == pytest.approx(np.log(SLOWER), abs=0.03)
    assert found["gemm launch"].mean == pytest.approx(np.log(LONGER), abs=0.06)
    for name in ("gemm compute", "gemm launch"):
        assert found[name].sd < 0.5 * found[name].prior_sd
    assert found["machine compute"].mean > 0.02
    assert found["machine compute"].meaning.startswith("this machine's clocks are")
    assert found["machine compute"].meaning.endswith("% lower")
    (fit,) = updated.fits
    assert fit.error_after < 0.6 * fit.error_before
    assert fit.half_after < 0.6 * fit.half_before


def test_what_gemms_say_of_the_machine_carries_over(updated: Updated) -> None:
    for other in (planted(gemms(300, 1), seed=1), planted(attention(100, "prefill"), seed=2)):
        assert error(updated.profile, other) < 0.8 * error(HW, other)
    both = update_profile(
        HW, Records.concat([planted(gemms(40)), planted(attention(20, "prefill", 5), seed=5)])
    )
    assert [f.name for f in both.fits] == ["gemm bf16", "attention_prefill bf16", "all"]
    other = planted(attention(100, "prefill"), seed=2)
    assert error(both.profile, other) < 0.5 * error(HW, other)


def test_a_local_update_is_written_and_read(updated: Updated, tmp_path: Any) -> None:
    save_hardware(updated.profile, tmp_path / "mine.yaml")
    again, r = load_hardware(str(tmp_path / "mine.yaml")), gemms(50, 3)
    np.testing.assert_allclose(times(again, r), times(updated.profile, r), rtol=1e-5)
    once = update_profile(again, planted(gemms(40)))
    assert any("earlier local update is replaced" in note for note in once.notes)
    np.testing.assert_allclose(times(once.profile, r), times(updated.profile, r), rtol=1e-5)


@pytest.mark.parametrize("size", [20, 100])
def test_intervals_after_a_local_update_cover(size: int) -> None:
    """Errors drawn from the model itself: nine in ten rows that were not measured lie in the
    interval."""
    r = Records.concat([gemms(300), attention(150, "prefill"), attention(150, "decode")])
    parts = [predict(r.select(rows), HW).uncertainty for _, _, rows in parts_of(r, HW, {})]
    assert all(part is not None for part in parts)
    kind = np.concatenate([np.full(len(part.correlated), part.kind) for part in parts])
    every = Uncertainty.joined(parts)
    systematic, coordinates = every.wide(), every.coordinates
    similar = correlation(coordinates, coordinates) * (kind[:, None] == kind)
    root = np.linalg.cholesky(
        similar * np.outer(every.correlated, every.correlated) + 1e-9 * np.eye(len(r))
    )
    inside = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        normal = rng.normal(size=(3, max(len(r), systematic.shape[1])))
        y = systematic @ normal[0, : systematic.shape[1]] + root @ normal[1, : len(r)]
        y = y + np.sqrt(every.independent) * normal[2, : len(r)]
        seen, others = np.split(rng.permutation(len(r)), [size])
        some = every.take(seen)
        p = Posterior.of(
            some.wide(), some.correlated, some.independent, some.coordinates, kind[seen], y[seen]
        )
        for code in np.unique(kind):
            rows = others[kind[others] == code]
            mean, variance = p.at(replace(every.take(rows), kind=int(code)))
            inside.append(np.abs(y[rows] - mean) <= p.coverage_factor * np.sqrt(variance))
    assert 0.85 <= np.mean(np.concatenate(inside)) <= 0.96


def host_rows(launch_s: float, rows: int = 6, source: Source = SOURCE) -> Records:
    """Eager layers of a host that takes so long for a launch."""
    kv_len, noise = (
        16 * np.arange(1, rows + 1),
        np.exp(0.02 * np.random.default_rng(0).normal(size=rows)),
    )
    seconds = LAYER_LAUNCHES * launch_s * noise
    return Records.from_columns(
        [source], operator="layer_eager", kv_len=kv_len, cold=False, seconds=seconds
    )


def test_eager_layers_move_the_host_and_leave_kernels_as_they_are() -> None:
    done, before = update_profile(HW, host_rows(22e-6)), LaunchTime.of(HW)
    now = LaunchTime.of(done.profile)
    assert now.launch_s == pytest.approx(22e-6, rel=0.08)
    assert now.half < 0.4 * before.half
    assert math.log(22e-6 / now.launch_s) < now.half
    (effect,) = done.effects
    assert (effect.name, effect.meaning.split(" by ")[0]) == ("host", effect.meaning)
    assert effect.meaning.startswith("the host launches ")
    r = Records.concat([gemms(40), attention(20, "prefill"), attention(20, "decode")])
    np.testing.assert_allclose(times(done.profile, r), times(HW, r), rtol=1e-6)
    # a pass in eager mode has it
    w = lower("qwen2.5-0.5b", phase="decode", seq=128, engine="hf")
    eager, was = workload_time(w, done.profile), workload_time(w, HW)
    each_pass = load_engine("hf").each_pass.value  # the engine's, not the machine's launches
    assert (eager.host_s - each_pass) / (was.host_s - each_pass) == pytest.approx(
        now.launch_s / before.launch_s
    )
    assert eager.total_upper_s / eager.total_lower_s < 0.5 * was.total_upper_s / was.total_lower_s


def test_a_cpus_host_is_taken_for_a_gpu_with_less_weight_and_its_kernels_are_not() -> None:
    cpu = Source("Some CPU (4 threads)", {"torch": "2.9", "threads": "4"})
    here, there = (update_profile(HW, host_rows(4e-6, source=source)) for source in (SOURCE, cpu))
    close, far = LaunchTime.of(here.profile), LaunchTime.of(there.profile)
    assert 4e-6 < close.launch_s < far.launch_s < 10e-6
    assert close.half < far.half < LaunchTime.of(HW).half
    assert any("timed without a GPU" in note for note in there.notes)
    assert not any("without a GPU" in note for note in here.notes)
    mixed = Records.concat([host_rows(4e-6, source=cpu), gemms(3).replace(sources=(cpu,))])
    with pytest.raises(
        InputError, match=r"measured on Some CPU .4 threads., but the profile is of NVIDIA H100"
    ):
        update_profile(HW, mixed)


def bad(change: str) -> Records:
    r = planted(gemms(40))
    if change == "nothing":
        return r.replace(seconds=np.where(np.arange(40) % 3, np.nan, -1.0))
    if change == "another GPU":
        return r.replace(sources=(Source("NVIDIA A100-SXM4-80GB"),))
    if change == "two rows":
        return r.select(np.arange(2))
    return r.replace(seconds=r.seconds * float(change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("nothing", "expected at least 3 usable rows, repeats counted once, got 0"),
        ("two rows", "expected at least 3 usable rows, repeats counted once, got 2"),
        (
            "another GPU",
            "were measured on NVIDIA A100-SXM4-80GB, but the profile is of NVIDIA H100",
        ),
        ("1000", "check the unit: they look 1000 times too large"),
        ("0.001", "check the unit: they look 1000 times too small"),
        ("3", "check that they are from this GPU and not launched one by one"),
        ("0.6", "rows are faster than NVIDIA H100 80GB SXM5 can be"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(change: str, reason: str) -> None:
    with pytest.raises(InputError) as raised:
        update_profile(HW, bad(change))
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_odd_is_said() -> None:
    some = planted(gemms(40))
    some = some.replace(
        seconds=np.where(np.arange(40) < 7, [np.nan, 0.0, -1.0, np.inf] * 10, some.seconds)
    )
    assert (
        update_profile(HW, some).notes[0] == "7 rows excluded: the time is not positive and finite"
    )
    one = planted(gemms(1).select(np.zeros(5, dtype=int)))
    assert any(note.startswith("one shape: only") for note in update_profile(HW, one).notes)
    assert any(
        note.startswith("only 5 rows, so intervals stay wide; measure 20 to 400")
        for note in update_profile(HW, planted(gemms(5))).notes
    )
    many = update_profile(HW, planted(gemms(900)))
    assert (many.rows, len(many.profile.local_update.arrays["independent"])) == (400, 400)  # type: ignore[union-attr]
    slow = planted(gemms(60))
    # less memory bandwidth than it has
    slow = slow.replace(seconds=slow.seconds * np.where(slow.m <= 32, 1.6, 1.0))
    assert any(
        "times the usual difference between stacks" in note
        for note in update_profile(HW, slow).notes
    )


def csv_of(path: Path, factors: dict[int, float], rows: int = 30) -> Records:
    """Planted GEMMs as they are read from a CSV file in which some rows take longer by a factor."""
    r = planted(gemms(rows))
    seconds = r.seconds * [factors.get(i, 1.0) for i in range(rows)]
    lines = [f"{m},{n},{k},{s!r}" for m, n, k, s in zip(r.m, r.n, r.k, seconds.tolist())]
    path.write_text("m,n,k,seconds\n\n" + "\n".join(lines) + "\n")
    return load_rows([str(path)], HW, screened=False)[0]


def test_a_row_that_takes_a_thousand_times_as_long_is_rejected_with_its_place(
    tmp_path: Path,
) -> None:
    mine, others = tmp_path / "mine.csv", tmp_path / "others.csv"
    rows = Records.concat([csv_of(others, {}), csv_of(mine, {5: 1000.0})])
    with pytest.raises(InputError) as error:
        update_profile(HW, rows)
    row = f"m={rows.m[35]} n={rows.n[35]} k={rows.k[35]}"
    # 1.05e+03 times
    assert str(error.value).startswith(f"local update: {mine}:8: gemm bf16 {row}: the time is 1")
    assert str(error.value).endswith(
        "e+03 times the predicted one; measure it again, or remove the row"
    )
    one = attention(1, "decode")
    one = one.replace(
        seconds=1000.0 * times(HW, one)[0], line=4, sources=(Source("x", file="a.csv"),)
    )
    with pytest.raises(
        InputError,
        match=r"1e\+03 times .* in the median, as in a\.csv:4: attention_decode bf16 batch=",
    ):
        update_profile(HW, Records.concat([planted(gemms(30)), one]))


def test_rows_far_from_what_the_others_predict_are_flagged_with_their_place(tmp_path: Path) -> None:
    def flagged(factors: dict[int, float]) -> list[str]:
        done = update_profile(HW, csv_of(tmp_path / "t.csv", factors))
        assert done.rows == 30
        return [
            note
            for note in done.notes
            if "predicted from the other rows" in note or "such times" in note
        ]

    (note,) = flagged({5: 10.0})
    assert note.startswith(f"{tmp_path / 't.csv'}:8: gemm bf16 m=")
    assert note.endswith(
        "times that predicted from the other rows; the row counts less; measure it again, or"
        " remove it"
    )
    assert 9.0 < float(note.split("the time is ")[1].split()[0]) < 11.5
    assert flagged({}) == flagged({5: 1.3}) == []
    *named, more = flagged(dict.fromkeys((3, 8, 13, 18, 23), 20.0))
    assert [len(named), more] == [3, "2 more rows have such times"]


def test_rows_chosen_for_a_model_narrow_its_speedup_more_than_random_ones() -> None:
    dense, *pruned = target_workloads(
        "llama-3.1-8b", ("depth", "width", "width_cross", "low_rank"), (0.25, 0.5), {}
    )[0]
    batch = batch_with(dense, pruned)
    p = forward_passes(batch, HW)
    shapes, _ = batch.shapes
    found: dict[Operator, int] = {}
    for i in range(len(shapes)):
        if (op := operator_of(shapes, i)) is not None:
            found.setdefault(op, i)
    at = np.array(list(found.values()))
    rows, kind = in_order(p.errors, len(shapes)).take(at), shapes.kind[at].astype(np.intp)
    systematic, coordinates = rows.wide(), rows.coordinates
    covariance = p.uncertainty.covariance(systematic, rows.correlated, coordinates, kind)
    targets = (covariance[batch.dense] - covariance)[1:]
    similar = correlation(coordinates, coordinates) * np.outer(rows.correlated, rows.correlated)
    common = (
        systematic @ systematic.T + similar * (kind[:, None] == kind) + np.diag(rows.independent)
    )

    def told(chosen: Any) -> float:
        """Variance of the speedups that a measurement of some rows removes."""
        of = targets[:, chosen]
        return float(np.einsum("ti,ij,tj->", of, np.linalg.inv(common[np.ix_(chosen, chosen)]), of))

    chosen = next_rows(rows, kind, targets, 20)
    assert len(set(chosen)) == 20
    every = told(np.arange(len(at)))
    random = [
        told(np.random.default_rng(seed).choice(len(at), 20, replace=False)) for seed in range(20)
    ]
    assert every - told(chosen) < 0.5 * (every - np.mean(random))
    assert told(chosen) > max(random)
    assert [list(found)[i] for i in chosen] == target_operators([[dense, *pruned]], HW)[:20]
    assert {op.kind for op in target_operators([[dense, *pruned]], HW, every=False)} == {"gemm"}
