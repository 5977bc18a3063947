"""The tables that ship: complete, small, what their provenance says, and within the physics of their device."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import calibration.measurements as shipped
from calibration.measurements import FOLDER, INDEX, file_name, list_measurements, load_measurements, provenance
from calibration.records.parquet import write_records
from calibration.records.screening import too_fast
from calibration.records.table import OPERATORS, Records
from simulator.errors import InputError
from simulator.hardware.library import load_hardware

pytest.importorskip("pyarrow")
build = pytest.importorskip("calibration.measurements.build")


@pytest.fixture(scope="module")
def tables() -> dict[str, Records]:
    return {name: load_measurements(name) for name in list_measurements()}


def test_what_is_promised_is_there_and_small(tables: dict[str, Records]) -> None:
    assert set(tables) == set(build.CHOICES)
    for device, operator in (("a100_sxm", "gemm"), ("h100_sxm", "gemm"), ("h200_sxm", "gemm"), ("l40s", "gemm")):
        assert f"{device}/{operator}/trtllm" in tables
    sizes = {path.name: path.stat().st_size for path in FOLDER.glob("*.parquet")}
    assert set(sizes) == {file_name(name) for name in tables}
    assert sum(sizes.values()) < 3e6
    assert [len(load_measurements("h100_sxm/gemm/trtllm", dtype=d)) for d in ("bf16", "fp8")] == [35700, 35700]
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    assert build.PACKAGE in notice
    assert build.COPYRIGHT in notice
    assert "Apache License" in (FOLDER / "LICENSE-Apache-2.0.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list_measurements())
def test_a_table_is_what_its_provenance_says(name: str, tables: dict[str, Records]) -> None:
    records, entry = tables[name], provenance(name)
    labels = records.labels()
    assert {str(d): int((labels == d).sum()) for d in np.unique(labels.astype(str))} == entry["rows"]
    assert {OPERATORS[o] for o in records.operator} == {name.split("/")[1]}
    assert {s.device for s in records.sources} == {entry["device"]}
    assert {s.licence for s in records.sources} == {"Apache-2.0"}
    assert records.sources[0].stack == {entry["framework"]: entry["version"]}
    assert entry["path"].endswith(records.sources[0].origin)
    assert "NVIDIA CORPORATION" in entry["copyright"]
    assert set(provenance(name)) >= {"left_out", "refused", "sha256", "kernels"}
    assert records.timed.all()
    assert not records.flags.any()
    assert int(records.groups().max()) + 1 == len(records)
    assert not np.any(too_fast(records, load_hardware(build.CHOICES[name].hardware)))
    if "attention" in name:
        assert len(records.sources) == 1  # one kernel path
        assert not records.window.any()
    else:
        assert set(np.unique(records.copies)) <= set(range(1, 7))


def test_the_files_are_written_the_same_again(tables: dict[str, Records]) -> None:
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if f"pyarrow: {pyarrow.__version__}\n" not in (FOLDER / INDEX).read_text(encoding="utf-8"):
        pytest.skip("another version of pyarrow made the files")
    for name, records in tables.items():
        path = FOLDER / file_name(name)
        extra = json.loads(pq.read_schema(path).metadata[b"prunesim.records"])["extra"]
        assert write_records(records, extra=extra, single=True) == path.read_bytes()


def test_changed_files_and_unknown_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="measurement 'h100/gemm' is unknown; did you mean"):
        load_measurements("h100/gemm")
    with pytest.raises(InputError, match="dtype 'fp8' is unknown"):
        load_measurements("l40s/gemm/trtllm", dtype="fp8")
    name = "a100_sxm/attention_decode/sglang"
    for file in (INDEX, file_name(name)):
        shutil.copy(FOLDER / file, tmp_path / file)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    content = bytearray((tmp_path / file_name(name)).read_bytes())
    content[100] ^= 1
    (tmp_path / file_name(name)).write_bytes(content)
    with pytest.raises(InputError, match=r"is not the file PROVENANCE\.yaml describes"):
        load_measurements(name)
    (tmp_path / file_name(name)).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_measurements(name)
    wheel = tmp_path / "aiconfigurator_core-0.12.0.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"expected the wheel of aiconfigurator-core 0\.12\.0"):
        build.build(wheel, tmp_path)


def test_times_are_those_of_the_package(wheel_tables: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    choice = build.CHOICES["h100_sxm/gemm/trtllm"]
    raw = pq.read_table(wheel_tables / choice.system / (choice.file.format(choice.collection) + ".parquet")).to_pydict()
    theirs = {
        (m, n, k): t / 1e3
        for m, n, k, t, d in zip(raw["m"], raw["n"], raw["k"], raw["latency"], raw["gemm_dtype"])
        if d == "bfloat16"
    }
    ours = load_measurements("h100_sxm/gemm/trtllm", dtype="bf16")
    assert len(ours) == len(theirs)
    expected = [theirs[shape] for shape in zip(ours.m.tolist(), ours.n.tolist(), ours.k.tolist())]
    assert ours.seconds == pytest.approx(np.array(expected), rel=1e-7)


@pytest.mark.slow
def test_the_wheel_gives_the_shipped_files(tmp_path: Path) -> None:
    wheel = os.environ.get("PRUNESIM_AICONFIGURATOR_WHEEL")
    if not wheel:
        pytest.skip("set PRUNESIM_AICONFIGURATOR_WHEEL to the wheel of aiconfigurator-core 0.12.0")
    tables = build.build(Path(wheel), tmp_path)
    assert set(tables) == set(list_measurements())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
