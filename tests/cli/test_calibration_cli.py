"""The commands that fit, validate and calibrate: their files, output, and errors of one line."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from tables import rows_of

from calibration.cli.calibrate import seconds
from calibration.devices.protocol import LAYER_LAUNCHES, Description, DeviceLost, Gpu
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.fit.base_profile import MEASURED, base_profile, raised
from calibration.fit.profile import fit_profile
from calibration.measure.run import Interrupted
from calibration.records.screening import work
from calibration.records.store import decode_line, encode_line, read_store
from calibration.records.timing_table import Records, Source, read_records, write_records
from calibration.runners.runs import keep_apart, target_operators, target_workloads
from simulator.codes import ROLES
from simulator.errors import InputError
from simulator.figures.paper import FIGURES
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.uncertainty.operators import gemm_time

H100 = Description(
    "cuda:0", "NVIDIA H100 80GB HBM3 (132 SM)", {"torch": "2.9", "driver": "580"}, 80e9, 50e6
)
CPU = Description("cpu", "Some CPU (4 threads)", {"torch": "2.9", "threads": "4"}, 8e9, 32e6)


def device(
    description: Description = H100,
    launch_s: float = 3e-6,
    made: type[ReplayDevice] = ReplayDevice,
    **options: Any,
) -> ReplayDevice:
    timings = roofline_timings(6e14, 2.6e12, launch_s)
    return made(timings, **{"noise": 0.004, "description": description, "setup_s": 0.02, **options})


pytestmark = pytest.mark.usefixtures("inside", "three_folds")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[ReplayDevice]:
    """Devices that the commands open, one after the other; a planted H100 when the list is
    empty."""
    queue: list[ReplayDevice] = []
    monkeypatch.setattr(
        "calibration.devices.open_device", lambda name, **_: queue.pop(0) if queue else device()
    )
    monkeypatch.setattr("calibration.runners.in_engine.installed_engine", lambda *_: "")
    return queue


def bare() -> Any:
    """An H100 of datasheet facts alone."""
    return replace(load_hardware("h100"), sections=MappingProxyType({}))


def table(file: str, rows: int = 200, factor: float = 1.1, hw: Any = None) -> None:
    """A records table of GEMMs, slower than a profile says (the datasheet's defaults) by a
    factor."""
    rng = np.random.default_rng(1)
    m = rng.choice([1, 8, 64, 256, 1024, 4096], rows)
    n, k = rng.choice([1024, 2048, 4096, 8192], (2, rows))
    time_s = (
        gemm_time(m, n, k, hw or bare()).seconds * factor * np.exp(0.01 * rng.standard_normal(rows))
    )
    source = Source("planted H100", {"planted": "1"}, method="planted")
    Path(file).write_bytes(
        write_records(Records.from_columns([source], m=m, n=n, k=k, seconds=time_s))
    )


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


CSV = "m,n,k,dtype,latency_us\n8,4096,4096,bf16,14.5\n16,4096,4096,bf16,15\n8,1024,4096,bf16,{}\n"


@pytest.mark.quick
def test_fit_maps_the_columns_of_a_csv_and_counts_refused_rows(cli: Any) -> None:
    table("r.parquet", 60, 1.15, load_hardware("h100"))
    r = read_records(Path("r.parquet"))
    times = zip(r.m, r.n, r.k, 1e6 * r.seconds)
    text = "M,n,k,time,remark\n8,64,64,-3,\n" + "".join(
        f"{m},{n},{k},{us},x\n" for m, n, k, us in times
    )
    Path("t.csv").write_text(text)
    out, err = cli(
        "fit t.csv --map m=M --map latency_us=time --device 'an H100' --prior h100 --hardware h100"
        " -o p.yaml"
    )
    assert "1 section of h100_sxm fitted on 42 rows" in " ".join(out.split())
    assert "note: t.csv: 42 rows kept, 1 refused: 1 row: time is negative (row 1)" in err
    assert load_hardware("p.yaml").section("gemm", "bf16").provenance.device == "an H100"
    assert "expected NAME=COLUMN" in cli.refused("fit t.csv --map M --hardware h100 -o q.yaml")
    assert "column 'L' is unknown" in cli.refused("fit t.csv --map m=L --hardware h100 -o q.yaml")
    Path("t.csv").write_text(CSV.format(-3))
    _, err = cli("fit t.csv --hardware h100 -o q.yaml", 2)
    assert "2 rows kept, 1 refused: 1 row: time is negative (row 3)" in err
    assert "too few" in err


def test_fit_then_validate(cli: Any) -> None:
    table("r.parquet")
    (fitted,) = cli.json("fit r.parquet -o q.yaml --hardware h100")
    assert fitted["constants"]["e_tc"]["std_error"] > 0
    assert {"mape", "median", "p95", "bias"} <= set(fitted["accuracy"])
    assert fitted["correlations"]
    out = cli.out("fit r.parquet -o p.yaml --hardware h100")
    assert "unseen MAPE" in out
    fit = r"Use p.yaml as --hardware: 1 section of h100_sxm fitted on \d+ rows; mean error on held-out"
    assert re.match(fit, " ".join(out.split()))
    assert load_hardware("p.yaml").sections["gemm", "bf16"].status == "calibrated"
    assert list(Path().glob("p.*.npz"))
    part = cli.json("validate p.yaml r.parquet")[0]["parts"][0]
    assert part["fitted_on_these_rows"] is True
    assert part["errors"]["mape"] < 0.02
    assert part["roofline"]["mape"] > 0.2
    assert "* the profile was fitted on these rows" in cli.out(
        "validate p.yaml r.parquet --markdown v.md"
    )
    assert Path("v.md").read_text().startswith("# Accuracy of h100_sxm")
    assert Path("v_gemm_bf16_predicted.png").stat().st_size > 5_000


def test_a_csv_is_evaluated_with_its_own_columns(cli: Any) -> None:
    Path("t.csv").write_text("M,n,k,t\n8,4096,4096,14.5\n16,4096,4096,15\n8,1024,4096,-3\n")
    out, err = cli("validate h100 t.csv --map m=M --map latency_us=t")
    assert out.startswith("h100_sxm holds on 2 measurements")
    assert "time is negative (row 3)" in err
    assert "--markdown" in cli.refused("validate . --markdown x.md")


def test_json_has_null_for_what_is_no_number_at_any_depth(
    monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    odd = MappingProxyType(
        {"median": np.float32("nan"), "p95": (float("inf"), np.array([1.0, np.nan]))}
    )
    monkeypatch.setattr("calibration.validation.validate.part_speedups", lambda part: odd)
    table("r.parquet", 30)
    (report,) = cli.json("validate h100 r.parquet")
    assert report["parts"][0]["speedup"] == {"median": None, "p95": [None, [1.0, None]]}


def test_where_pyarrow_is_missing_that_is_what_is_said(
    monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("r.parquet").write_bytes(b"PAR1")
    says = (
        '"tables" (pyarrow is not installed): in the checkout of prunesim, pip install -e'
        ' ".[tables]"'
    )
    figures = "figures llama-3.1-8b -o drawn --format png --hardware a100 --only"
    for line in (
        f"{figures} scatter,roofline",
        "validate a100 a100_sxm/gemm/trtllm",
        "fit r.parquet -o o.yaml --hardware h100",
    ):
        assert says in cli.refused(line)
    few = {name: FIGURES[name] for name in ("taxonomy", "scatter")}
    monkeypatch.setattr("simulator.figures.paper.FIGURES", few)
    out, err = cli(figures.removesuffix(" --only"))
    assert says in err
    assert "drawn/taxonomy.png" in out


BAD = """
fit r.parquet -o p.txt --hardware h100               | ends in .yaml
fit r.parquet -o no/p.yaml --hardware h100           | does not exist
fit r.parquet -o p.yaml --hardware h1000             | did you mean
fit none.parquet -o p.yaml --hardware h100           | cannot be read
fit f.parquet -o p.yaml --hardware h100              | 10 rows are too few
fit r.parquet -o p.yaml --hardware h100 --dtype fp8  | nothing to fit
validate h100                                        | expected a PROFILE and TABLES, such as
validate h100 a100_sxm/gemm/nothing                  | no file, folder or shipped measurement
validate h100 r.parquet --markdown no/x.md           | does not exist
validate h100 r.parquet --map m                      | --map 'm': expected NAME=COLUMN
validate . r.parquet                                 | .: is a folder of result files; expected no TABLE
validate h100 r.parquet --html x.html                | No such option: --html
calibrate gpu -o run                                 | device 'gpu' is unknown
calibrate cpu -o r.parquet                           | is a file
calibrate cpu cuda -o run                            | unexpected extra argument
calibrate engine -o run                              | run/profile.yaml does not exist; expected --hardware, or
calibrate engine -o run --hardware cpu --measure-only | --measure-only: cannot be used to calibrate an engine
calibrate cpu -o run --engine vllm --dtype fp32       | expected at least 480s with --engine vllm, which starts
calibrate engine -o run --hardware cpu --engine trt  | --engine 'trt' is unknown
calibrate cpu -o a/b                                 | does not exist
"""


@pytest.mark.parametrize(("line", "reason"), rows_of(BAD))
def test_bad_input_is_one_line(line: str, reason: str, cli: Any) -> None:
    table("r.parquet", 60)
    table("f.parquet", 10)
    assert reason in cli.refused(line)
    assert files() == {"f.parquet", "r.parquet"}


def test_a_python_of_vllm_that_does_not_exist_is_one_line(
    planted: list[ReplayDevice], cli: Any
) -> None:
    planted.append(device(CPU))
    line = "calibrate engine -o run --hardware cpu --dtype fp32 --vllm-python /no/python"
    assert "cannot be run" in cli.refused(line)
    assert files() == set()


def test_calibrate_writes_a_whole_run(planted: list[Any], cli: Any) -> None:
    out, err = cli("calibrate cuda -o run --budget 40s")
    assert {"datasheet.yaml", "profile.yaml", "records.jsonl", "report.md"} <= {
        p.name for p in Path("run").iterdir()
    }
    assert list(Path("run").glob("report_gemm_bf16_*.png"))
    assert "on held-out shapes" in out
    assert "run/profile.yaml" in out
    assert "NVIDIA H100 80GB HBM3" in err
    profile = load_hardware("run/profile.yaml")
    assert profile.name == "h100_sxm"
    assert profile.peak_flop_per_s("bf16") == load_hardware("h100").peak_flop_per_s("bf16")
    assert profile.sections["gemm", "bf16"].accuracy["mape"] < 0.1


def test_a_profile_carries_the_verdict_of_its_calibration(cli: Any) -> None:
    """A profile that calibrate advised against was loaded without a word."""
    out, _ = cli("calibrate replay:planted -o run --budget 1s --hardware rtx_4090", 1)
    assert "Do not rely on run/profile.yaml yet: no shapes were held out" in out
    assert load_hardware("run/profile.yaml").verdict == "no held-out shapes"
    line = "--hardware run/profile.yaml"
    for command in (
        f"speedup llama-3.1-8b --prune 'depth 0.25' {line}",
        f"gemm 8 4096 4096 {line}",
    ):
        _, err = cli(command)
        assert (
            err.count("rtx_4090: its calibration advised against this profile (no held-out shapes)")
            == 1
        )
    assert "advised against this profile: no held-out shapes" in cli.out(
        "hardware show run/profile.yaml"
    )
    cli("calibrate replay:planted -o run --budget 40s --hardware rtx_4090", 0)
    assert load_hardware("run/profile.yaml").verdict == ""


@pytest.mark.parametrize(
    "wrong", [{"rates": {"flop_per_s": "x"}}, {"rates": {"x": 1.0}}, {"seed": []}, {"rates": 1}]
)
def test_a_run_whose_header_states_no_plan_is_refused(wrong: dict[str, Any], cli: Any) -> None:
    line = "calibrate replay:planted -o run --budget 1s --hardware rtx_4090 --measure-only"
    cli(line)
    first, *others = Path("run/records.jsonl").read_bytes().splitlines(keepends=True)
    header = decode_line(first.rstrip()) or {}
    header["extra"].update(wrong)
    Path("run/records.jsonl").write_bytes(encode_line(header) + b"".join(others))
    assert "run/records.jsonl:1: rates and seed: " in cli.refused(line)
    Path("run/records.jsonl").unlink()
    os.mkfifo("run/records.jsonl")
    assert "run/records.jsonl: cannot be read: the pipe is empty" in cli.refused(line)


def test_clocks_that_fall_under_load_are_measured_and_fitted(
    planted: list[Any], monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    gpu = device(replace(H100, gpu=Gpu(132, (9, 0), 80e9)), noise=0.0)
    play, begun = gpu.play, list[float]()

    def slower(op: Any, loops: int) -> float:
        long = op.m == op.n == op.k == 8192
        begun.extend([gpu.clock()] if long and not begun else [])
        return play(op, loops) * (1.15 if long and gpu.clock() - begun[0] > 1.0 else 1.0)

    monkeypatch.setattr(gpu, "play", slower)
    planted.append(gpu)
    cli("calibrate cuda -o run --budget 40s")
    constant = load_hardware("run/profile.yaml").section("runtime", "*").constants["sustained"]
    assert (constant.value, constant.status) == (pytest.approx(1.15), "fitted")
    # of a device without this fact: nothing is measured again
    cli("calibrate cuda -o run --budget 40s")
    rows = [row for row in read_store(Path("run/records.jsonl")).rows if row["type"] == "sustained"]
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(Interrupted(), 130), (DeviceLost("CUDA error: an illegal memory access"), 1)],
)
def test_what_a_stopped_run_has_measured_is_fitted(
    error: Exception, status: int, planted: list[Any], monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    stopped = device()
    play, calls = stopped.play, iter(range(4000))

    def stops(*arguments: Any) -> float:
        if next(calls, None) is None:
            raise error
        return play(*arguments)

    monkeypatch.setattr(stopped, "play", stops)
    planted.append(stopped)
    out, err = cli("calibrate cuda -o run --budget 60s", status)
    assert "run the command again to resume" in err
    assert "run/profile.yaml" in out
    assert load_hardware("run/profile.yaml").sections["gemm", "bf16"].status == "calibrated"


BAD_RUNS = {
    "--budget 0": "expected a time above zero such as 2min",
    "--budget soon": "expected a time above zero such as 2min",
    "--dtype fp8": "not supported by device cuda:0; supported: bf16, fp16, fp32",
    "--hardware h1000": "did you mean",
    "--for lama": "unknown",
}


@pytest.mark.parametrize(("options", "reason"), BAD_RUNS.items())
def test_calibrate_refuses_before_it_measures(
    options: str, reason: str, planted: list[Any], cli: Any
) -> None:
    assert reason in cli.refused(f"calibrate cuda -o run {options}")
    assert not Path("run/records.jsonl").exists()


def test_folders_of_other_devices_are_refused(planted: list[Any], cli: Any) -> None:
    cli("calibrate cuda -o run --measure-only --budget 20s")
    before = Path("run/records.jsonl").read_bytes()
    planted.append(
        device(Description("cuda:0", "NVIDIA A100-SXM4-80GB (108 SM)", H100.stack, 80e9, 40e6))
    )
    assert "holds records of device" in cli.refused("calibrate cuda -o run --measure-only")
    planted.append(
        device(Description("cuda:0", H100.device, {**H100.stack, "driver": "999"}, 80e9, 50e6))
    )
    assert "driver" in cli.refused("calibrate cuda -o run")
    assert "dtype" in cli.refused("calibrate cuda -o run --measure-only --dtype fp16")
    assert Path("run/records.jsonl").read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_exact_shapes_of_a_model_are_measured_first(planted: list[Any], cli: Any) -> None:
    options = "--for qwen2.5-0.5b --batch 1 --seq 128 --family width --sparsity 0.5 --budget 60s"
    assert "the shapes measured exactly" in cli.out(f"calibrate cuda -o run {options}")
    arrays = load_hardware("run/profile.yaml").sections["gemm", "bf16"].arrays
    targets = target_workloads(
        "qwen2.5-0.5b", ("width",), (0.5,), {"phase": ("prefill", "decode"), "seq": 128}
    )
    wanted = {(op.m, op.n, op.k) for op in target_operators(targets, load_hardware("h100"))}
    assert set(zip(*(arrays[f"exact_{x}"].tolist() for x in "mnk"), strict=True)) == wanted


def test_a_cpu_measures_the_projections_of_its_own_decoder(
    monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    asked: list[set[str]] = []

    def wanted(*args: Any, **options: Any) -> Any:
        asked.append({ROLES[role] for role in target_workloads(*args, **options)[0][0].role})
        raise InputError("enough")

    monkeypatch.setattr("calibration.runners.runs.target_workloads", wanted)
    for name in ("cpu", "cuda"):
        cli(f"calibrate {name} -o run --for qwen2.5-0.5b --seq 128", 2)
    assert {"q", "gate"} < asked[0]
    assert {"qkv", "gate_up"} < asked[1]  # a serving engine fuses projections


def test_host_time_is_fitted_to_layers_where_they_were_measured() -> None:
    rows = {
        "operator": ["launch_eager", "layer_eager", "layer_eager"],
        "kv_len": [0, 32, 128],
        "cold": False,
    }
    r = Records.from_columns([Source("x")], **rows, seconds=[2e-6, 4.2e-4, 4.4e-4])
    for base, gap_s in (
        (bare(), 0.0),
        (replace(load_hardware("cpu"), sections=MappingProxyType({})), 2e-6),
    ):
        both = fit_profile(base, r).profile.section("runtime", "*")
        assert both["host_op_s"] == pytest.approx(4.3e-4 / LAYER_LAUNCHES)
        assert both["graph_gap_s"] == gap_s
    alone = fit_profile(bare(), r.select(np.array([0]))).profile
    assert alone.section("runtime", "*")["host_op_s"] == 2e-6


def test_the_host_time_of_a_busy_cpu_stays_in_the_range_of_profiles(tmp_path: Path) -> None:
    r = Records.from_columns([Source("x")], operator=["launch_eager"], cold=False, seconds=[4.6e-5])
    base = replace(load_hardware("cpu"), name="busy", sections=MappingProxyType({}))
    fit = fit_profile(base, r)
    save_hardware(fit.profile, tmp_path / "busy.yaml")
    assert load_hardware(tmp_path / "busy.yaml").section("runtime", "*")["graph_gap_s"] == 2e-5
    assert any(
        note.startswith("runtime: graph_gap_s 4.6e-05 outside the range") for note in fit.notes
    )


def test_a_device_without_a_datasheet_gets_a_measured_one_that_rises_with_its_records() -> None:
    hw = base_profile(device(CPU), "fp32")
    assert (hw.architecture, hw.sm_count, hw.name) == ("cpu", 4, "cpu")
    assert hw.sources["bandwidth"] == hw.sources["rates.fp32"] == MEASURED
    assert 0.9 * 6e14 < hw.peak_flop_per_s("fp32") < 1.1 * 6e14
    assert 0.8 * 2.6e12 < hw.bandwidth_bytes_per_s < 1.1 * 2.6e12
    fast = Records.from_columns(
        [Source("x")], m=1024, n=1024, k=1024, dtype="fp32", seconds=[2 * 1024.0**3 / 9e14]
    )
    assert raised(hw, fast).peak_flop_per_s("fp32") == pytest.approx(1.01 * 9e14)
    # where a format is emulated, attention is faster than all GEMMs, and none of its rows is refused
    attention = {
        "batch": 1,
        "q_len": 1024,
        "kv_len": 1024,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 64,
    }
    calls = Records.from_columns(
        [Source("x")], operator=["attention_prefill"], dtype="fp32", seconds=[1e-6], **attention
    )
    assert raised(hw, calls).peak_flop_per_s("fp32") == pytest.approx(
        1.01 * float(work(calls)[0][0]) / 1e-6
    )
    h100 = load_hardware("h100")
    assert raised(h100, fast.replace(dtype=3)).rates == h100.rates


def test_groups_held_out_once_stay_held_out() -> None:
    shapes = {"m": [1, 2, 1, 1], "n": [64, 64, 128, 64], "k": 64, "seconds": 1e-6}
    r = Records.from_columns([Source("x")], **shapes, purpose=[1, 2, 1, 4])
    assert keep_apart(r).purpose.tolist() == [2, 2, 1, 4]


@pytest.mark.parametrize(
    ("text", "value"), [("2min", 120.0), ("90", 90.0), (" 1.5h ", 5400.0), ("30 s", 30.0)]
)
def test_times_of_the_command_line(text: str, value: float) -> None:
    assert seconds("--budget", text) == value
