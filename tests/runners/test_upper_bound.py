"""The measured upper bound: which kernels it needs, what it is on a planted device, and shapes without a time."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.devices.protocol import Description, Operator
from calibration.devices.replay import Faults, ReplayDevice, roofline_timings
from calibration.records.store import read_store
from calibration.records.timing_table import Records, Source
from calibration.runners.cases import Case, profile_of, settings_of
from calibration.runners.upper_bound import (
    Bound,
    bound_errors,
    bounds,
    kernel_seconds,
    measure_bounds,
    measured_bounds,
    operator_of,
    plain_kernels,
    shapes_of,
)
from simulator.cli import run
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.prediction.scenario import Scenario
from simulator.workload import Kernel, Kind, Workload

MODEL = "smollm2-135m"
HW = load_hardware("a100")


def _cases(family: str = "all", sparsity: float = 0.5, **settings: Any) -> list[Case]:
    how = {"seq": [128], "scenario": Scenario(engine="reference"), **settings}
    return settings_of(MODEL, families=[family], sparsities=[sparsity], **how)[0]


def test_depth_needs_no_shape_of_its_own() -> None:
    (case,) = _cases("depth", phases=["decode"])
    dense = plain_kernels(case.dense)
    # lm_head is not in the layers
    assert plain_kernels(case.pruned) == {s: count if s[1][1] == 49152 else count / 2 for s, count in dense.items()}


def _flops(w: Workload, kind: str) -> float:
    found = plain_kernels(w).items()
    return sum(count * operator_of(shape, "bf16").flops for shape, count in found if shape[0] == kind)


def test_counts_are_those_of_the_workload() -> None:
    kinds = {"gemm": Kind.GEMM, "attention_prefill": Kind.PREFILL_ATTENTION, "attention_decode": Kind.DECODE_ATTENTION}
    for case in _cases():  # what pruning adds is left out
        for w in (case.dense, case.pruned):
            for kind, code in kinds.items():
                if kind == "gemm" and case.family in ("semi_structured", "unstructured", "dynamic_width"):
                    continue  # of rounded widths
                flops = float(w.flops[(w.kind == code) & ~w.overhead].sum())
                assert _flops(w, kind) == pytest.approx(flops, rel=1e-2 if "decode" in kind else 1e-9), case.family


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
def test_attention_is_plain_and_dense_at_the_pruned_shape(family: str, phase: str, change: dict[int, int]) -> None:
    how: Any = {"seq": [128], "scenario": Scenario(engine="reference"), "phases": [phase], "sparsities": [0.5]}
    (case,) = settings_of("llama-3.2-1b", families=[family], **how)[0]
    dense, pruned = (
        {sizes: n for (kind, sizes), n in plain_kernels(w).items() if kind.startswith("attention")}
        for w in (case.dense, case.pruned)
    )
    ((sizes, count),) = dense.items()
    wanted = tuple(change.get(i, size) for i, size in enumerate(sizes))
    assert pruned[wanted] == {"token": 14, "depth": 8}.get(family, count)
    assert set(pruned) <= {sizes, wanted}


def test_blocks_and_windows_of_a_prompt_are_a_share_of_dense_attention() -> None:
    (case,) = _cases("sparse_attention", 0.75, phases=["prefill"])
    (dense, pruned) = (plain_kernels(w) for w in (case.dense, case.pruned))
    shares = {shape: pruned[shape] / count for shape, count in dense.items()}
    assert set(dense) == set(pruned)
    assert {shape[0]: share for shape, share in shares.items()} == {"gemm": 1.0, "attention_prefill": 0.25}
    row = {"kind": int(Kind.PREFILL_ATTENTION), "role": "attention", "batch": 1, "q_len": 4, "kv_len": 4}
    heads = {"heads": 2, "kv_heads": 1, "head_dim": 8, "window": 2}
    # of ten pairs under the mask a window of two leaves seven
    assert plain_kernels(Workload.from_rows([{**row, **heads}])) == {("attention_prefill", (1, 4, 4, 2, 1, 8)): 0.7}


def test_latent_attention_counts_in_neither_model() -> None:
    (case,) = settings_of("deepseek-v2-lite", phases=["decode"], families=["depth"], sparsities=[0.5], seq=[128])[0]
    assert {kind for w in (case.dense, case.pruned) for kind, _ in plain_kernels(w)} == {"gemm"}


@pytest.mark.parametrize(
    ("family", "sparsity"), [("semi_structured", 0.5), ("unstructured", 0.5), ("unstructured", 0.25)]
)
def test_zeros_become_a_shorter_dense_gemm(family: str, sparsity: float) -> None:
    (case,) = _cases(family, sparsity, phases=["decode"])
    rows = np.flatnonzero(case.pruned.kernel != Kernel.DENSE)
    n, k = case.pruned.n[rows].tolist(), case.pruned.k[rows].tolist()
    wanted = {("gemm", (1, n, round((1 - sparsity) * k / 16) * 16)) for n, k in zip(n, k, strict=True)}
    assert wanted <= set(plain_kernels(case.pruned))
    # fewer features than a tile stay what they are
    row = {"role": "q", "m": 2, "n": 64, "k": 10, "density": 0.9, "kernel": int(Kernel.UNSTRUCTURED)}
    assert set(plain_kernels(Workload.from_rows([row]))) == {("gemm", (2, 64, 10))}


def _measure(folder: Path, cases: list[Case], device: ReplayDevice | None = None, **options: Any) -> Any:
    return measure_bounds(folder / "run", device or ReplayDevice(), cases, **{"budget_s": 600.0, **options})


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


def test_a_budget_is_shared_among_the_shapes(tmp_path: Path) -> None:
    cases = _cases()
    device = ReplayDevice(noise=0.3)  # so noisy that every shape takes all the time it is given
    found = _measure(tmp_path, cases, device, budget_s=120.0)
    assert found.outcome.counts.left == 0
    assert device.clock() <= 125.0


def test_a_shape_that_does_not_fit_is_counted(tmp_path: Path) -> None:
    cases = settings_of("llama-3.2-1b", phases=["decode"], families=["width"], sparsities=[0.5], seq=[128])[0]
    device = ReplayDevice(faults=Faults(out_of_memory_bytes=150e6))  # lm_head has 525 MB
    found = _measure(tmp_path, cases, device)
    assert found.outcome.counts.skipped == 1
    (b,) = bounds(cases, found.records, HW)
    assert b.missing == 2  # it is in both
    assert math.isnan(b.measured_bound)
    assert math.isfinite(b.predicted)


def test_errors_of_predicted_bounds_by_hand(tmp_path: Path) -> None:
    cases = _cases("depth")
    rows = bounds(cases, _measure(tmp_path, cases).records, HW)
    first, second = (replace(r, measured_bound=2.0, model_bound=1.0) for r in rows)
    changed = [replace(first, predicted_bound=2.2), replace(second, predicted_bound=2.1)]
    assert bound_errors(changed) == {"predicted": pytest.approx(0.075), "model": 0.5}
    assert bound_errors([replace(changed[0], measured_bound=math.nan)]) == {}
    assert all(r.model_bound == r.predicted_bound for r in rows)  # this profile has no exact shapes


def test_repeated_shapes_have_their_median() -> None:
    records = Records.from_columns([Source("some device")], m=8, n=64, k=32, seconds=[1e-6, 9e-6, 2e-6])
    assert kernel_seconds(records, "bf16") == {("gemm", (8, 64, 32)): (2e-6, 0.0)}


def test_times_of_other_temperatures_formats_and_windows_are_left_out() -> None:
    sizes = {"batch": 1, "q_len": [8, 8, 8, 8], "kv_len": 8, "heads": 2, "kv_heads": 1, "head_dim": 16}
    kinds = {"cold": [False, True, False, False], "window": [0, 0, 4, 0], "dtype": ["bf16", "bf16", "bf16", "fp16"]}
    one = Records.from_columns(
        [Source("device")], operator="attention_prefill", seconds=[1.0, 2, 3, 4], **sizes, **kinds
    )
    assert kernel_seconds(one, "bf16") == {("attention_prefill", (1, 8, 8, 2, 1, 16)): (1.0, 0.0)}


def test_without_sparse_tensor_cores_2to4_has_bounds_but_no_prediction(tmp_path: Path) -> None:
    cases = _cases("semi_structured", phases=["prefill"])
    found = _measure(tmp_path, cases)
    rates = {**HW.rates, "bf16": replace(HW.rates["bf16"], sparse_factor=1.0)}
    (without,), (b,) = (bounds(cases, found.records, hw) for hw in (replace(HW, rates=rates), HW))
    assert without.measured_bound == b.measured_bound > 1.0
    assert (without.flop_bound, without.byte_bound) == (b.flop_bound, b.byte_bound)
    assert b.roofline_bound > 1.0
    # dense kernels gain nothing, or the profile refuses
    assert without.predicted == 1.0 or math.isnan(without.predicted)


def test_nothing_is_written_before_a_refusal(tmp_path: Path) -> None:
    cases = _cases("width")
    for options, message in (({"budget_s": 0.0}, "budget"), ({"dtype": "fp8"}, "bf16, fp16")):
        with pytest.raises(InputError, match=message):
            _measure(tmp_path, cases, **options)
    assert not (tmp_path / "run").exists()
    _measure(tmp_path, cases)
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    other = ReplayDevice(description=Description("replay", "another device", {"replay": "1"}))
    with pytest.raises(InputError, match="another device"):
        _measure(tmp_path, cases, other)
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before


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


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Times of everything the command asks of a device for one small model."""
    planted = roofline_timings()
    squares = [(s, s, s) for s in (256, 512, 1024, 2048, 4096)]
    anchors = [(s // 2, s, s) for s in (4096, 2048, 1024, 512)]
    ops = [Operator("gemm", m=m, n=n, k=k) for m, n, k in dict.fromkeys([*squares, *anchors])]
    ops += [operator_of(shape, "bf16") for shape in shapes_of(_cases())]
    file = tmp_path_factory.mktemp("recording") / "device.jsonl"
    file.write_text("".join(json.dumps({"operator": vars(op), "median_s": planted(op)}) + "\n" for op in ops))
    return file


def _command(recording: Path, folder: Path, *more: str) -> list[str]:
    where = f"--device replay:{recording} -o {folder} --hardware a100 --seq 128 --sparsity 0.5".split()
    return ["upper-bound", MODEL, *where, *more]


def test_the_command_prints_a_table_or_json_and_writes_a_file(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(_command(recording, tmp_path / "run", "--family", "depth,width", "--budget", "1min")) == 0
    out, err = capsys.readouterr()
    table = out.partition("\n\n")[2].splitlines()
    assert [line.split()[:4] for line in table if line.startswith(("depth", "width"))] == [
        [family, "50", "%", phase] for phase in ("prefill", "decode") for family in ("depth", "width")
    ]
    assert all(len(line) <= 120 for line in out.splitlines() if str(tmp_path) not in line)
    header = next(line for line in out.splitlines() if line.startswith("pruning")).split()
    assert header[2:8] == ["bound", "bound", "bound", "bound", "speedup", "predicted"]
    above = next(line for line in out.splitlines() if "roofline" in line).split()
    assert above[:5] == ["FLOP", "byte", "roofline", "measured", "predicted"]
    first = " ".join(out.partition("\n\n")[0].split())
    assert first.startswith("The largest measured bounds of smollm2-135m on planted device: prefill ")
    assert "a100_sxm_80gb predicts the bounds with a median error of " in first
    assert "Traceback" not in err
    with open(tmp_path / "run" / "upper_bound.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(Bound.__dataclass_fields__)] * 4
    assert all(float(row["measured_bound"]) > 1.0 for row in rows)
    assert len(read_store(tmp_path / "run" / "records.jsonl").rows) > 10
    assert run(_command(recording, tmp_path / "run", "--family", "width", "--phase", "decode", "--json")) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["measured_bound"] == pytest.approx(row["dense_kernels_s"] / row["pruned_kernels_s"])
    assert row["missing"] == 0


def test_texts_of_prune_are_bounded_beside_families(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("layers:\n  0-14: depth\n")
    texts = ["--prune", "width mlp=0.5 attention=0.5", "--prune", "depth 0.5", "--prune", str(plan)]
    command = _command(recording, tmp_path / "run", *texts, "--family", "depth,width", "--phase", "decode", "--json")
    assert run(command) == 0
    rows = {row["prune"]: row for row in json.loads(capsys.readouterr().out)}
    # a family at a fraction that is also a text is one case; a plan is stored as its steps
    assert list(rows) == ["width mlp=0.5 attention=0.5", "depth 0.5", "depth layers=0-14", "width 0.5"]
    assert rows["width mlp=0.5 attention=0.5"]["measured_bound"] == rows["width 0.5"]["measured_bound"]
    assert rows["depth layers=0-14"]["measured_bound"] == rows["depth 0.5"]["measured_bound"] > 1.5
    assert all(row["missing"] == 0 for row in rows.values())


def test_heads_that_no_kernel_runs_are_refused_before_any_measurement(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"--device replay:{recording} -o {tmp_path / 'run'} --hardware a100 --seq 128 --phase decode".split()
    assert run(["upper-bound", MODEL, *where, "--prune", "width heads=0.2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("7 query heads on 3 KV heads cannot run here; expected a multiple of 3, such as 6")
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_one_line(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["upper-bound", "smollm2-135", *_command(recording, tmp_path / "run")[2:]]) == 2
    assert "smollm2-135m" in capsys.readouterr().err
