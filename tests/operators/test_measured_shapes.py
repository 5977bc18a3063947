"""Measured shapes: found by m, n and k, refused with invalid arrays, and made from records of
measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.records.screening import UNKNOWN_REPEAT, exact_arrays, with_exact, without_exact
from calibration.records.timing_table import Flag, Records, Source
from simulator.hardware.arrays import check_arrays
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import Provenance
from simulator.hardware.save import save_hardware
from simulator.operators.gemm import EXACT_NAMES as NAMES
from simulator.operators.gemm import MeasuredShapes
from simulator.uncertainty.operators import GemmOptions, gemm_time

pytestmark = pytest.mark.quick

SIZE = st.integers(1, 2**21 - 2)
SHAPES = st.lists(
    st.tuples(st.integers(1, 2**22 - 2), SIZE, SIZE), min_size=1, max_size=40, unique=True
)


def _arrays(shapes: Any, seconds: Any = None, half: Any = None) -> dict[str, Any]:
    m, n, k = np.array(shapes).T
    times = np.arange(1.0, len(m) + 1.0) if seconds is None else np.asarray(seconds)
    return dict(
        zip(
            NAMES,
            (m, n, k, times, np.full(len(m), 0.01) if half is None else np.asarray(half)),
            strict=True,
        )
    )


@given(SHAPES)
def test_every_shape_is_found_and_no_other(shapes: list[tuple[int, int, int]]) -> None:
    measured = MeasuredShapes.of(_arrays(shapes))
    every = measured.at(*np.array(shapes).T)
    assert every.rows.all()
    assert every.seconds.tolist() == _arrays(shapes)["exact_s"].tolist()
    assert (every.log_half == 0.01).all()
    steps = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0))
    near = [(a + da, b + db, c + dc) for a, b, c in shapes for da, db, dc in steps]
    found = measured.at(*np.array(near).T)
    assert found.rows.tolist() == [shape in set(shapes) for shape in near]
    assert len(found.seconds) == len(found.log_half) == found.rows.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exact_s": np.array([1.0])}, "array exact_s: expected the shape"),
        ({"exact_s": np.array([1.0, 0.0])}, "array exact_s: expected values from 1e-12"),
        ({"exact_s": np.array([1.0, np.nan])}, "array exact_s: expected values from 1e-12"),
        ({"exact_log_half": np.array([0.1, -0.1])}, "array exact_log_half: expected values from 0"),
        ({"exact_m": np.array([8.0, 1.5])}, "array exact_m: expected whole numbers"),
        ({"exact_k": np.array([8, 2**21])}, "array exact_k: expected values from 1 to"),
        ({"exact_s": None}, "array exact_m needs array exact_s, which is missing"),
    ],
)
def test_arrays_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    given = _arrays([(8, 64, 64), (16, 64, 64)]) | change
    with pytest.raises(ValueError, match=message):
        check_arrays("gemm", {name: a for name, a in given.items() if a is not None})


def _records(**columns: Any) -> Records:
    columns = {"n": 64, "k": 32, "purpose": "exact", "spread": 0.01, **columns}
    return Records.from_columns([Source("some device")], **columns)


def test_only_clean_cold_exact_rows_of_the_format_are_taken() -> None:
    others: tuple[dict[str, Any], ...] = (
        {"m": 3, "purpose": "fit"},
        {"m": 9, "flags": int(Flag.NOISY)},
    )
    others += (
        {"dtype": "fp16"},
        {"cold": False, "copies": 1},
        {"flags": int(Flag.THROTTLED)},
        {"copies": 6},
    )
    others += (
        {"seconds": float("nan")},
        {"operator": "low_rank", "rank": 4},
        {"weight_dtype": "int8"},
    )
    parts = [
        _records(m=[1, 2], seconds=[1e-6, 2e-6]),
        *(_records(**{"m": 5, "seconds": 3e-6, **o}) for o in others),
    ]
    assert sorted(exact_arrays(Records.concat(parts), "bf16")["exact_m"].tolist()) == [1, 2, 9]
    assert exact_arrays(Records.concat(parts), "fp32") == {}


def test_repeats_give_their_median_and_widen_the_interval() -> None:
    arrays = exact_arrays(_records(m=8, seconds=[1e-6, 1.2e-6, 1.1e-6]), "bf16")
    assert arrays["exact_s"].tolist() == [pytest.approx(1.1e-6)]
    assert arrays["exact_log_half"][0] == pytest.approx(0.5 * np.log(1.2))
    alone = exact_arrays(_records(m=8, seconds=1e-6), "bf16")["exact_log_half"][0]
    assert alone == pytest.approx(1.6449 * np.hypot(0.01 / 1.96, UNKNOWN_REPEAT))
    # an interval without an end counts as the limit of drift
    for spread in (float("nan"), float("inf")):
        half = exact_arrays(_records(m=8, seconds=1e-6, spread=spread), "bf16")["exact_log_half"][0]
        assert half == pytest.approx(1.6449 * np.hypot(UNKNOWN_REPEAT, UNKNOWN_REPEAT))


def test_a_profile_keeps_them_and_a_file_gives_them_back(tmp_path: Any) -> None:
    hw = load_hardware("a100")
    if hw.section("gemm", "bf16").status != "calibrated":
        section = replace(hw.section("gemm", "bf16"), status="calibrated", provenance=_provenance())
        hw = replace(hw, sections={**hw.sections, ("gemm", "bf16"): section})
    flop_s = 2.0 * 64 * 4096 * 4096 / hw.peak_flop_per_s("bf16")
    records = _records(m=[64, 64], n=4096, k=[4096, 4160], seconds=[2.0 * flop_s, 0.5 * flop_s])
    profile = with_exact(hw, records)
    arrays = profile.sections["gemm", "bf16"].arrays
    assert arrays["exact_k"].tolist() == [4096]  # the other would beat the datasheet
    save_hardware(replace(profile, path=None), tmp_path / "mine.yaml")
    again = load_hardware(tmp_path / "mine.yaml").sections["gemm", "bf16"].arrays
    assert again["exact_s"].tolist() == [pytest.approx(2.0 * flop_s)]
    assert "exact_m" not in without_exact(profile).sections["gemm", "bf16"].arrays
    assert set(without_exact(profile).sections["gemm", "bf16"].arrays) == set(
        hw.section("gemm", "bf16").arrays
    )
    assert with_exact(hw, _records(m=1, seconds=1e-6, dtype="fp32")) is hw


def _provenance() -> Provenance:
    return Provenance(
        "a test", "0" * 64, "2026-01-01", software="none", device="none", protocol="none", rows=1
    )


def _profile(shapes: list[tuple[int, int, int]], factor: float = 1.3) -> Any:
    """An A100 that has measured these shapes, each slower than its model by a factor."""
    hw = load_hardware("a100@sglang")
    section = hw.section("gemm", "bf16")
    m, n, k = np.array(shapes).T
    arrays = _arrays(shapes, factor * gemm_time(m, n, k, hw).seconds)
    measured = replace(
        section, status="calibrated", provenance=_provenance(), arrays={**section.arrays, **arrays}
    )
    return hw, replace(hw, sections={**hw.sections, ("gemm", "bf16"): measured})


def test_gemm_time_takes_measured_shapes_and_marks_them() -> None:
    hw, mine = _profile([(1, 4096, 4096), (2048, 14336, 4096)])
    m, n, k = (
        np.array([1, 2, 2048, 2048]),
        np.array([4096, 4096, 14336, 14336]),
        np.array([4096, 4096, 4096, 4097]),
    )
    model, t = gemm_time(m, n, k, hw), gemm_time(m, n, k, mine)
    assert t.details["measured"].tolist() == [True, False, True, False]
    assert model.details["measured"].tolist() == [False] * 4
    assert t.seconds.tolist() == pytest.approx((model.seconds * [1.3, 1.0, 1.3, 1.0]).tolist())
    assert (t.upper / t.seconds)[t.details["measured"]].tolist() == pytest.approx(
        [np.exp(0.01)] * 2
    )
    assert t.lower[1] == model.lower[1]
    wide = gemm_time(m, n, k, mine, options=GemmOptions(level=0.99))
    assert wide.upper[0] > t.upper[0]
    assert (
        gemm_time(m, n, k, mine, options=GemmOptions(detail=True)).details["launch"].tolist()
        == t.seconds.tolist()
    )
    assert gemm_time(2048, 14336, 4096, mine).details["measured"].shape == ()


@pytest.mark.parametrize(
    "other",
    [
        {"kernel": "sparse24"},
        {"kernel": "block_sparse"},
        {"options": GemmOptions(copies=3)},
        {"dtype": "fp16"},
        {"weight_dtype": "int8"},
    ],
)
def test_other_kernels_formats_and_warm_weights_are_predicted(other: dict[str, Any]) -> None:
    hw, mine = _profile([(1, 4096, 4096)])
    t = gemm_time(1, 4096, 4096, mine, **other)
    assert not t.details["measured"]
    if "dtype" not in other:
        assert t.seconds == gemm_time(1, 4096, 4096, hw, **other).seconds
    # the dense kernel computes zeros without structure
    assert gemm_time(1, 4096, 4096, mine, kernel="unstructured").details["measured"]
