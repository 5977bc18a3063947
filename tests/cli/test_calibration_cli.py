"""The commands that import, measure, fit, validate and calibrate: what they write, what they print, what they refuse in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from calibration.cli import run
from calibration.cli.rows import seconds
from calibration.devices.protocol import Description
from calibration.devices.replay import Faults, ReplayDevice, roofline_timings
from calibration.execute.runs import keep_apart, model_shapes
from calibration.fit.base_profile import MEASURED, base_profile, raised, shipped_name
from calibration.measure.interrupt import Interrupted
from calibration.records.parquet import read_records, write_records
from calibration.records.store import read_store
from calibration.records.table import Records, Source
from simulator.hardware.library import load_hardware, save_hardware
from simulator.kernels.gemm import gemm_time

ROOT = Path(__file__).resolve().parents[2]
H100 = Description("cuda:0", "NVIDIA H100 80GB HBM3 (132 SM)", {"torch": "2.9", "driver": "580"}, 80e9, 50e6)
CPU = Description("cpu", "Some CPU (4 threads)", {"torch": "2.9", "threads": "4"}, 8e9, 32e6)


def device(description: Description = H100, **options: Any) -> ReplayDevice:
    return ReplayDevice(
        roofline_timings(6e14, 2.6e12, 3e-6), noise=0.004, description=description, setup_s=0.02, **options
    )


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[ReplayDevice]:
    """Devices that the commands open, one after the other; a planted H100 when the list is empty."""
    queue: list[ReplayDevice] = []
    monkeypatch.setattr("calibration.devices.open_device", lambda name, **_: queue.pop(0) if queue else device())
    return queue


def output(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> tuple[str, str]:
    """Standard output and error of a command line that ends with a status."""
    code = run(arguments)
    found = capsys.readouterr()
    assert code == status, found.err
    return found.out, found.err


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refused command line."""
    out, err = output(arguments, capsys, 2)
    assert not out
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1, err
    return lines[0]


def table(path: Path, rows: int = 200, factor: float = 1.1, **columns: Any) -> Path:
    """A records table of H100 GEMMs, slower than the datasheet's defaults by a factor."""
    rng = np.random.default_rng(1)
    m = rng.choice([1, 8, 64, 256, 1024, 4096], rows)
    n, k = rng.choice([1024, 2048, 4096, 8192], (2, rows))
    hw = replace(load_hardware("h100"), sections=MappingProxyType({}))
    time_s = gemm_time(m, n, k, hw).seconds * factor * np.exp(0.01 * rng.standard_normal(rows))
    source = Source("planted H100", {"planted": "1"}, method="planted")
    write_records(Records.from_columns([source], m=m, n=n, k=k, seconds=time_s, **columns), path)
    return path


# -- import ---------------------------------------------------------------------------------------------------------------------

CSV = "m,n,k,dtype,latency_us\n8,4096,4096,bf16,14.5\n16,4096,4096,bf16,15\n8,1024,4096,bf16,{}\n"


def test_import_counts_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text(CSV.format(-3))
    out, err = output(
        ["import", str(tmp_path / "t.csv"), "-o", str(tmp_path / "o.parquet"), "--hardware", "h100"], capsys
    )
    assert "2 rows kept, 1 refused" in out
    assert "1 row: time is negative (row 3)" in out
    assert "only 2 usable rows" in err
    assert read_records(tmp_path / "o.parquet").seconds == pytest.approx([14.5e-6, 15e-6])


def test_import_json_and_column_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("M,n,k,t\n8,64,64,2\n")
    arguments = [
        "import",
        str(tmp_path / "t.csv"),
        "-o",
        str(tmp_path / "o.parquet"),
        "--map",
        "m=M",
        "--map",
        "latency_us=t",
        "--json",
    ]
    row = json.loads(output(arguments, capsys)[0])[0]
    assert (row["kept"], row["refused"]) == (1, 0)


BAD_TABLES = {
    "no column": ("m,n,latency_us\n8,64,2\n", "column k is missing"),
    "nothing usable": (CSV.splitlines()[0] + "\n8,64,64,bf16,nan\n8,64,64,bf16,0\n", "no usable row"),
    "too fast": ("m,n,k,dtype,latency_us\n8192,8192,8192,bf16,1\n", "faster than the arithmetic peak"),
    "mixed formats": ("m,n,k,dtype,latency_us\n8,64,64,bf16,9\n8,64,64,fp8,9\n", "mixes number formats"),
    "no time": ("m,n,k\n8,64,64\n", "expected one column of times"),
    "empty": ("", "expected a header, and rows"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, reason = BAD_TABLES[name]
    (tmp_path / "t.csv").write_text(text)
    line = refused(["import", str(tmp_path / "t.csv"), "-o", str(tmp_path / "o.parquet"), "--hardware", "h100"], capsys)
    assert reason in line
    assert "t.csv" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv"]


# -- fit, validate --------------------------------------------------------------------------------------------------------------


def test_fit_then_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, profile = table(tmp_path / "r.parquet"), tmp_path / "p.yaml"
    out, _ = output(["fit", str(rows), "-o", str(profile), "--hardware", "h100"], capsys)
    assert "unseen MAPE" in out
    assert load_hardware(profile).sections["gemm", "bf16"].status == "calibrated"
    assert list(tmp_path.glob("p.*.npz"))
    out, _ = output(["validate", str(profile), str(rows), "--json"], capsys)
    part = json.loads(out)[0]["parts"][0]
    assert part["fitted_on_these_rows"] is True
    assert part["errors"]["mape"] < 0.02
    assert part["roofline"]["mape"] > 0.2
    out, _ = output(["validate", str(profile), str(rows), "--html", str(tmp_path / "v.html")], capsys)
    assert "* the profile was fitted on these rows" in out
    assert (tmp_path / "v.html").stat().st_size > 50_000


def test_fit_json_names_constants_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(tmp_path / "r.parquet")
    part = json.loads(
        output(["fit", str(rows), "-o", str(tmp_path / "p.yaml"), "--hardware", "h100", "--json"], capsys)[0]
    )[0]
    assert part["constants"]["e_tc"]["std_error"] > 0
    assert {"mape", "median", "p95", "bias"} <= set(part["accuracy"])
    assert part["correlations"]


def test_anchor_moves_a_shipped_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hw = load_hardware("h100")
    rng = np.random.default_rng(2)
    m = rng.choice([1, 16, 256, 2048], 60)
    n, k = rng.choice([1024, 4096, 8192], (2, 60))
    write_records(
        Records.from_columns([Source("local")], m=m, n=n, k=k, seconds=1.15 * gemm_time(m, n, k, hw).seconds),
        tmp_path / "r.parquet",
    )
    output(
        ["fit", str(tmp_path / "r.parquet"), "-o", str(tmp_path / "p.yaml"), "--hardware", "h100", "--anchor"], capsys
    )
    section = load_hardware(tmp_path / "p.yaml").sections["gemm", "bf16"]
    assert section.provenance is not None
    assert section.provenance.borrowed_from.endswith("re-anchored")
    before, after = (
        json.loads(output(["validate", p, str(tmp_path / "r.parquet"), "--json"], capsys)[0])[0]["parts"][0]["errors"][
            "mape"
        ]
        for p in ("h100", str(tmp_path / "p.yaml"))
    )
    assert before == pytest.approx(0.13, abs=0.01)
    assert after < 0.5 * before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["fit", "{rows}", "-o", "{dir}/p.txt", "--hardware", "h100"], "ends in .yaml"),
        (["fit", "{rows}", "-o", "{dir}/no/p.yaml", "--hardware", "h100"], "does not exist"),
        (["fit", "{rows}", "-o", "{dir}/p.yaml", "--hardware", "h1000"], "did you mean"),
        (["fit", "{dir}/none.parquet", "-o", "{dir}/p.yaml", "--hardware", "h100"], "cannot be read"),
        (["fit", "{few}", "-o", "{dir}/p.yaml", "--hardware", "h100"], "10 rows are too few"),
        (["fit", "{rows}", "-o", "{dir}/p.yaml", "--hardware", "h100", "--dtype", "fp8"], "nothing to fit"),
        (["validate", "h100"], "expected a PROFILE and RECORDS, or --protocol"),
        (["validate", "h100", "a100_sxm/gemm/nothing"], "nor a shipped measurement"),
        (["validate", "h100", "{rows}", "--html", "{dir}/no/x.html"], "does not exist"),
        (["validate", "h100", "{rows}", "--protocol"], "--protocol"),
        (["validate", "--protocol", "--table", "a10"], "did you mean"),
        (["validate", "--protocol", "--table", "a100", "--rows", "many"], "expected a whole number"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "rows": str(table(tmp_path / "r.parquet", 60)),
        "few": str(table(tmp_path / "f.parquet", 10)),
        "dir": str(tmp_path),
    }
    assert reason in refused([a.format(**names) for a in arguments], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.parquet", "r.parquet"]


@pytest.mark.slow
def test_the_protocol_prints_the_model_beside_its_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output(["validate", "--protocol", "--table", "a100", "--seeds", "0", "--rows", "400", "--json"], capsys)
    rows = {r["method"]: r for r in json.loads(out)}
    assert rows["prunesim"]["mape"] < rows["roofline + RBF"]["mape"] < rows["datasheet roofline"]["mape"]
    assert rows["prunesim + prior"]["mape"] < rows["prunesim"]["mape"]


# -- measure, calibrate ---------------------------------------------------------------------------------------------------------


def test_calibrate_writes_a_whole_run(
    tmp_path: Path, planted: list[ReplayDevice], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    out, err = output(["calibrate", "cuda", "-o", str(folder), "--budget", "40s"], capsys)
    assert {"datasheet.yaml", "profile.yaml", "records.jsonl", "report.md"} <= {p.name for p in folder.iterdir()}
    assert list(folder.glob("report_gemm_bf16_*.png"))
    assert "on shapes held out before the fit" in out
    assert "NVIDIA H100 80GB HBM3" in err
    profile = load_hardware(folder / "profile.yaml")
    assert profile.name == "h100_sxm"
    assert profile.peak_flop_per_s("bf16") == load_hardware("h100").peak_flop_per_s("bf16")
    assert profile.sections["gemm", "bf16"].accuracy["mape"] < 0.1
    assert f"{folder / 'profile.yaml'}" in out


def test_a_run_goes_on_where_it_ended(
    tmp_path: Path, planted: list[ReplayDevice], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    planted.append(device(faults=Faults(lost_at=40)))
    arguments = ["measure", "cuda", "-o", str(folder), "--budget", "60s", "--json"]
    out, err = output(arguments, capsys, 1)
    assert "device lost" in err
    first = json.loads(out)[0]
    out, _ = output(arguments, capsys)
    second = json.loads(out)[0]
    assert second["resumed"] > 20
    assert second["planned"] == first["planned"]
    keys = [r["key"] for r in read_store(folder / "records.jsonl").rows if r["purpose"] != "anchor"]
    assert (
        len(keys)
        == len(set(keys))
        == second["resumed"] + second["ok"] + second["noisy"] + second["unsupported"] + second["skipped"]
    )


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, planted: list[ReplayDevice], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = device()
    play, count = stopped.play, 0

    def interrupted(*arguments: Any) -> float:
        nonlocal count
        count += 1
        if count > 900:
            raise Interrupted
        return play(*arguments)

    monkeypatch.setattr(stopped, "play", interrupted)
    planted.append(stopped)
    _, err = output(["measure", "cuda", "-o", str(tmp_path / "run"), "--budget", "60s"], capsys, 130)
    assert "the same command goes on from here" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--budget", "0"], "expected a time above zero"),
        (["--budget", "soon"], "expected a time such as 2min"),
        (["--dtype", "fp8"], "device cuda:0 has none; it has bf16, fp16, fp32"),
        (["--hardware", "h1000"], "did you mean"),
        (["--quick", "--hardware", "{bare}"], "has no calibrated gemm bf16 section"),
        (["--for", "lama"], "unknown"),
    ],
)
def test_calibrate_refuses_before_it_measures(
    arguments: list[str], reason: str, tmp_path: Path, planted: list[ReplayDevice], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.yaml"
    save_hardware(replace(load_hardware("h100"), sections=MappingProxyType({})), bare)
    line = refused(
        ["calibrate", "cuda", "-o", str(tmp_path / "run"), *(a.format(bare=bare) for a in arguments)], capsys
    )
    assert reason in line
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_folders_of_other_devices_are_refused(
    tmp_path: Path, planted: list[ReplayDevice], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    output(["measure", "cuda", "-o", str(folder), "--budget", "20s"], capsys)
    before = (folder / "records.jsonl").read_bytes()
    planted.append(device(Description("cuda:0", "NVIDIA A100-SXM4-80GB (108 SM)", H100.stack, 80e9, 40e6)))
    assert "holds records of device" in refused(["measure", "cuda", "-o", str(folder)], capsys)
    planted.append(device(Description("cuda:0", H100.device, {**H100.stack, "driver": "999"}, 80e9, 50e6)))
    assert "driver" in refused(["calibrate", "cuda", "-o", str(folder)], capsys)
    assert "dtype" in refused(["measure", "cuda", "-o", str(folder), "--dtype", "fp16"], capsys)
    assert (folder / "records.jsonl").read_bytes() == before


def test_unknown_devices_and_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "device 'gpu' is unknown" in refused(["measure", "gpu", "-o", str(tmp_path / "run")], capsys)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(["measure", "cpu", "-o", str(tmp_path / "file")], capsys)
    assert "does not exist" in refused(["calibrate", "cpu", "-o", str(tmp_path / "a" / "b")], capsys)
    assert "expected one, got 2" in refused(["measure", "cpu", "cuda", "-o", str(tmp_path / "run")], capsys)


def test_runs_of_several_machines_merge(
    tmp_path: Path, planted: list[ReplayDevice], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in ("0", "1"):
        output(["measure", "cuda", "-o", str(tmp_path / seed), "--budget", "20s", "--seed", seed], capsys)
    out, _ = output(
        ["measure", "--merge", str(tmp_path / "0"), str(tmp_path / "1"), "-o", str(tmp_path / "all.jsonl"), "--json"],
        capsys,
    )
    parts = [len(read_store(tmp_path / seed / "records.jsonl").rows) for seed in ("0", "1")]
    assert json.loads(out)[0]["records"] == sum(parts)
    output(["fit", str(tmp_path / "all.jsonl"), "-o", str(tmp_path / "p.yaml"), "--hardware", "h100"], capsys)


def test_exact_shapes_of_a_model_are_measured_first(
    tmp_path: Path, planted: list[ReplayDevice], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--for",
        "qwen2.5-0.5b",
        "--batch",
        "1",
        "--seq",
        "128",
        "--family",
        "width",
        "--sparsity",
        "0.5",
        "--budget",
        "60s",
    ]
    out, _ = output(["calibrate", "cuda", "-o", str(tmp_path / "run"), *arguments], capsys)
    assert "the shapes measured exactly" in out
    arrays = load_hardware(tmp_path / "run" / "profile.yaml").sections["gemm", "bf16"].arrays
    wanted = set(model_shapes("qwen2.5-0.5b", seq=(128,), families=("width",), sparsities=(0.5,)))
    assert set(zip(*(arrays[f"exact_{x}"].tolist() for x in "mnk"), strict=True)) == wanted


def test_quick_moves_the_shipped_section(
    tmp_path: Path, planted: list[ReplayDevice], capsys: pytest.CaptureFixture[str]
) -> None:
    output(["calibrate", "cuda", "-o", str(tmp_path / "run"), "--quick", "--budget", "15s"], capsys)
    section = load_hardware(tmp_path / "run" / "profile.yaml").sections["gemm", "bf16"]
    assert section.provenance is not None
    assert section.provenance.borrowed_from.endswith("re-anchored")


# -- parts ----------------------------------------------------------------------------------------------------------------------


def test_a_device_without_a_datasheet_gets_a_measured_one() -> None:
    cpu = device(CPU)
    hw = base_profile(cpu, "fp32")
    assert (hw.architecture, hw.sm_count, hw.name) == ("cpu", 4, "cpu")
    assert hw.sources["bandwidth"] == hw.sources["rates.fp32"] == MEASURED
    assert 0.9 * 6e14 < hw.peak_flop_per_s("fp32") < 1.1 * 6e14
    assert 0.8 * 2.6e12 < hw.bandwidth_bytes_per_s < 1.1 * 2.6e12


def test_a_measured_peak_rises_with_the_records_and_a_datasheet_does_not() -> None:
    cpu = base_profile(device(CPU), "fp32")
    fast = Records.from_columns([Source("x")], m=1024, n=1024, k=1024, dtype="fp32", seconds=[2 * 1024.0**3 / 9e14])
    assert raised(cpu, fast).peak_flop_per_s("fp32") == pytest.approx(1.01 * 9e14)
    h100 = load_hardware("h100")
    assert raised(h100, fast.replace(dtype=3)).rates == h100.rates


def test_gpus_find_their_datasheet_by_name() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB (108 SM)": "a100_sxm_80gb",
        "NVIDIA A100 80GB PCIe": "a100_pcie_80gb",
        "NVIDIA H100 PCIe": "h100_pcie",
        "NVIDIA H200 (132 SM)": "h200_sxm",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx_4090",
        "NVIDIA GeForce RTX 4090 D": "",
    }
    assert {name: shipped_name(name) for name in names} == names


def test_groups_held_out_once_stay_held_out() -> None:
    r = Records.from_columns(
        [Source("x")], m=[1, 2, 1, 1], n=[64, 64, 128, 64], k=64, seconds=1e-6, purpose=[1, 2, 1, 4]
    )
    assert keep_apart(r).purpose.tolist() == [2, 2, 1, 4]


@pytest.mark.parametrize(("text", "value"), [("2min", 120.0), ("90", 90.0), (" 1.5h ", 5400.0), ("30 s", 30.0)])
def test_times_of_the_command_line(text: str, value: float) -> None:
    assert seconds("--budget", text) == value


def test_help_of_the_whole_program_imports_nothing_heavy() -> None:
    code = (
        "import sys; from calibration.cli import run; run(['--help']); "
        "heavy = {'numpy', 'matplotlib', 'scipy', 'torch', 'pandas', 'pyarrow', 'yaml'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in ("import", "measure", "fit", "validate", "calibrate", "speedup"))
