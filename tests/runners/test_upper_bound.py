"""The measured upper bound: which kernels it needs, what it is on a planted device, and shapes
without a time."""

from __future__ import annotations

import csv
import math
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.devices import open_device
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.records.store import read_store
from calibration.runners.cases import Case, cases_of, profile_of
from calibration.runners.runs import RunOptions
from calibration.runners.upper_bound import (
    Bound,
    bounds,
    measure_bounds,
    measured_bounds,
    operator_of,
    plain_kernels,
    shapes_of,
)
from simulator.codes import Kind
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.workload import Workload

MODEL = "smollm2-135m"
HW = load_hardware("a100")


def _cases(model: str = MODEL, **settings: Any) -> list[Case]:
    usual = {"phase": ("prefill", "decode"), "seq": 128, "sparsity": [0.5], "engine": "reference"}
    return cases_of(model, {**usual, **settings})[0]


def _flops(w: Workload, kind: str) -> float:
    found = plain_kernels(w).items()
    return sum(
        count * operator_of(shape, "bf16").flops for shape, count in found if shape[0] == kind
    )


def test_counts_are_those_of_the_workload() -> None:
    kinds = {
        "gemm": Kind.GEMM,
        "attention_prefill": Kind.PREFILL_ATTENTION,
        "attention_decode": Kind.DECODE_ATTENTION,
    }
    for case in _cases():  # work that pruning adds is excluded
        for w in (case.dense, case.pruned):
            for kind, code in kinds.items():
                if kind == "gemm" and case.family in (
                    "semi_structured",
                    "unstructured",
                    "dynamic_width",
                ):
                    continue  # widths are rounded
                flops = float(w.flops[(w.kind == code) & ~w.overhead].sum())
                assert _flops(w, kind) == pytest.approx(
                    flops, rel=1e-2 if "decode" in kind else 1e-9
                ), case.family


@pytest.mark.parametrize(
    ("family", "phase", "change"),
    [
        ("width", "prefill", {3: 16, 4: 4}),  # heads and KV heads
        ("width", "decode", {2: 16, 3: 4}),
        ("token", "prefill", {1: 64, 2: 64}),  # lengths, in the layers after the second
        ("token", "decode", {1: 65}),
        ("kv_cache", "decode", {1: 65}),
        ("sparse_attention", "decode", {1: 64}),  # as many keys as are left
        ("depth", "decode", {}),
    ],
)
def test_attention_is_plain_and_dense_at_the_pruned_shape(
    family: str, phase: str, change: dict[int, int]
) -> None:
    (case,) = _cases("llama-3.2-1b", family=[family], phase=phase)
    dense, pruned = (
        {sizes: n for (kind, sizes), n in plain_kernels(w).items() if kind.startswith("attention")}
        for w in (case.dense, case.pruned)
    )
    ((sizes, count),) = dense.items()
    wanted = tuple(change.get(i, size) for i, size in enumerate(sizes))
    assert pruned[wanted] == {"token": 14, "depth": 8}.get(family, count)
    assert set(pruned) <= {sizes, wanted}


def _measure(
    folder: Path, cases: list[Case], device: ReplayDevice | None = None, budget_s: float = 600.0
) -> Any:
    return measure_bounds(folder / "run", device or ReplayDevice(), cases, RunOptions(budget_s))


def test_the_bound_is_the_ratio_of_planted_times(tmp_path: Path) -> None:
    cases = _cases()
    found = _measure(tmp_path, cases, ReplayDevice(noise=0.001))
    assert found.outcome.counts.ok == len(found.plan.items) == len(shapes_of(cases))
    planted = roofline_timings()

    def total(w: Workload) -> float:
        return sum(n * planted(operator_of(s, "bf16")) for s, n in plain_kernels(w).items())

    for case, b in zip(cases, bounds(cases, found.records, HW), strict=True):
        assert (b.family, b.phase, b.missing) == (case.family, case.phase, 0)
        assert b.measured_bound == pytest.approx(total(case.dense) / total(case.pruned), rel=2e-3)
        assert b.lower < b.measured_bound < b.upper < 1.01 * b.measured_bound
        assert b.dense_kernels_s == pytest.approx(total(case.dense), rel=2e-3)
        assert 0 < b.kernel_share <= 1
    by_name = {(b.family, b.phase): b for b in bounds(cases, found.records, HW)}
    assert by_name["depth", "decode"].measured_bound > 1.5
    for family in ("kv_cache", "sparse_attention"):  # they change no GEMM
        assert by_name[family, "decode"].measured_bound > 1.0
    saved = measured_bounds(tmp_path / "run" / "records.jsonl", cases)
    assert saved == [by_name[c.family, c.phase].measured_bound for c in cases]
    assert np.isnan(measured_bounds(tmp_path / "nothing.jsonl", cases)).all()


def test_too_little_time_leaves_cases_without_a_bound_and_a_rerun_goes_on(tmp_path: Path) -> None:
    cases = _cases()
    slow = {"setup_s": 1.0, "noise": 0.05}
    first = _measure(tmp_path, cases, ReplayDevice(**slow), budget_s=40.0)
    assert 0 < first.outcome.counts.timed < len(first.plan.items)
    assert first.outcome.stopped == "budget"
    rows = bounds(cases, first.records, HW)
    assert any(b.missing and math.isnan(b.measured_bound) for b in rows)
    assert any(not b.missing for b in rows)  # shapes are measured case after case
    assert all(math.isnan(b.measured_bound) == bool(b.missing) for b in rows)
    again = _measure(tmp_path, cases, ReplayDevice(**slow), budget_s=4000.0)
    assert again.outcome.counts.resumed == first.outcome.counts.timed
    assert not any(b.missing for b in bounds(cases, again.records, HW))


def test_a_short_budget_on_a_gpu_times_fewer_shapes_with_enough_samples(tmp_path: Path) -> None:
    """A sample on a GPU is a whole graph, and large GEMMs take milliseconds."""
    pytest.importorskip("torch")
    from fakes.gpu import Troubles
    from fakes.torch_cuda import installed

    cases = _cases("llama-3.1-8b", seq=2048, family=["width", "depth", "token"])
    with installed("RTX 4090", Troubles(noise=0.01)), closing(open_device("cuda")) as device:
        found = measure_bounds(tmp_path / "run", device, cases, RunOptions(6.0))
    rows = read_store(tmp_path / "run" / "records.jsonl").rows
    assert {row["status"] for row in rows if row["purpose"] != "sustained"} == {"ok"}
    assert 0 < found.outcome.counts.timed < len(found.plan.items)
    assert any(not b.missing for b in bounds(cases, found.records, HW))


def test_the_profile_is_the_named_one_else_the_folder_s_else_measured_facts(tmp_path: Path) -> None:
    device = ReplayDevice()
    assert profile_of(tmp_path / "run", device, "bf16", "h100").name == "h100_sxm"
    measured = profile_of(tmp_path / "run", device, "bf16")
    assert measured.title == "planted device"
    assert measured.peak_flop_per_s("bf16") == pytest.approx(1.05 * 100e12, rel=0.05)
    before = len(device.prepared)
    assert profile_of(tmp_path / "run", device, "bf16").title == "planted device"
    assert len(device.prepared) == before  # the folder kept it
    save_hardware(HW, tmp_path / "run" / "profile.yaml")
    assert profile_of(tmp_path / "run", device, "bf16").name == HW.name
    with pytest.raises(InputError, match="int4"):
        profile_of(tmp_path / "run", device, "int4")


def test_the_command_prints_a_table_or_json_and_writes_a_file(tmp_path: Path, cli: Any) -> None:
    line = (
        f"upper-bound {MODEL} --device replay:planted -o {tmp_path / 'run'} --hardware a100"
        " --seq 128"
    )
    out = cli.out(f"{line} --sparsity 0.5 --family depth,width --budget 1min")
    table = out.partition("\n\n")[2]
    assert re.findall(r"^(depth|width) 50 %  (prefill|decode) ", table, re.MULTILINE) == [
        (family, phase) for phase in ("prefill", "decode") for family in ("depth", "width")
    ]
    assert re.search(r"FLOP +byte +roofline +measured +predicted +bound as", table)
    first = " ".join(out.partition("\n\n")[0].split())
    assert first.startswith(
        "The largest measured bounds of smollm2-135m on planted device: prefill "
    )
    assert "a100_sxm_80gb predicts the bounds with a median error of " in first
    with open(tmp_path / "run" / "upper_bound.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(Bound.__dataclass_fields__)] * 4
    assert all(float(row["measured_bound"]) > 1.0 for row in rows)
    assert len(read_store(tmp_path / "run" / "records.jsonl").rows) > 10
    (row,) = cli.json(f"{line} --sparsity 0.5 --family width --phase decode")
    assert row["measured_bound"] == pytest.approx(row["dense_kernels_s"] / row["pruned_kernels_s"])
    assert row["missing"] == 0
