"""The tables that ship: complete, small, what their provenance says, and within the physics of
their device."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import calibration.measurements as shipped
from calibration.evidence.measurements import PUBLISHED
from calibration.evidence.measurements import aiter as aiter_tables
from calibration.evidence.measurements import infersim as infersim_tables
from calibration.evidence.measurements.infersim import SOURCES
from calibration.evidence.measurements.wheel import (
    CHOICES,
    HEAD_DIMS,
    PACKAGE,
    choose,
    datasheet,
    shipped_part,
)
from calibration.measurements import (
    FOLDER,
    INDEX,
    file_name,
    list_measurements,
    load_measurements,
    provenance,
)
from calibration.records.screening import too_fast
from calibration.records.timing_table import LAUNCHES, OPERATORS, Records, Source, write_records
from simulator.codes import ROLES
from simulator.errors import InputError

pytest.importorskip("pyarrow")
build = pytest.importorskip("calibration.evidence.measurements.build")


def test_what_is_promised_is_there_and_small() -> None:
    tables = list_measurements()
    assert set(tables) == {name for name, choice in SOURCES.items() if choice.ships}
    sizes = {path.name: path.stat().st_size for path in FOLDER.glob("*.parquet")}
    assert set(sizes) == {file_name(name) for name in tables}
    assert sum(sizes.values()) < 3e6
    # rows of fp8 whose time is mostly the conversion of activations are left out
    assert [len(load_measurements("h100_sxm/gemm/trtllm", dtype=d)) for d in ("bf16", "fp8")] == [
        35700,
        23356,
    ]
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    assert PACKAGE in notice
    assert build.COPYRIGHT in notice
    assert "Alimama AI Infra Team" in notice
    assert aiter_tables.COPYRIGHT in notice
    assert "MIT License" in notice
    assert "Apache License" in (FOLDER / "LICENSE-Apache-2.0.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list_measurements())
def test_a_table_is_what_its_provenance_says(name: str) -> None:
    records, entry = load_measurements(name), provenance(name)
    labels = records.labels()
    assert {str(d): int((labels == d).sum()) for d in np.unique(labels.astype(str))} == entry[
        "rows"
    ]
    assert {OPERATORS[o] for o in records.operator} == {name.split("/")[1]}
    assert {s.device for s in records.sources} == {entry["device"]}
    assert {s.licence for s in records.sources} == {entry["licence"]}
    assert records.sources[0].stack == {entry["framework"]: entry["version"]}
    if name in CHOICES:
        assert entry["path"].endswith(records.sources[0].origin)
        assert "NVIDIA CORPORATION" in entry["copyright"]
    else:
        reader = aiter_tables if name in aiter_tables.TABLES else infersim_tables
        assert records.sources[0].origin == f"{reader.REPOSITORY}, {entry['path']}"
        assert (entry["copyright"], entry["licence"]) == (reader.COPYRIGHT, reader.LICENCE)
    assert set(provenance(name)) >= {"left_out", "refused", "sha256", "kernels"}
    assert records.timed.all()
    assert not records.flags.any()
    assert int(records.groups().max()) + 1 == len(records)
    assert not np.any(too_fast(records, datasheet(SOURCES[name].hardware)))
    if "attention" in name:
        assert len(records.sources) == 1  # one kernel path
        assert not records.window.any()
        assert set(np.unique(records.head_dim)) <= set(HEAD_DIMS)
    elif "collective" in name:
        assert len(records.sources) == 1
        assert {LAUNCHES[code] for code in records.launch} == {"graph"}
        assert set(np.unique(records.batch)) == {2, 4, 8}
        kinds = {ROLES[code] for code in records.role}
        assert kinds == (
            {"all_reduce", "all_gather", "all_to_all", "reduce_scatter"}
            if "nccl" in name
            else {"all_reduce"}
        )
    elif name in CHOICES:
        assert set(np.unique(records.copies)) <= set(range(1, 7))
    elif "gemm" in name:
        assert records.cold.all()  # InferSim overwrites the L2 before each


def test_the_files_are_written_the_same_again() -> None:
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if f"pyarrow: {pyarrow.__version__}\n" not in (FOLDER / INDEX).read_text(encoding="utf-8"):
        pytest.skip("another version of pyarrow made the files")
    for name in list_measurements():
        records, path = load_measurements(name), FOLDER / file_name(name)
        extra = json.loads(pq.read_schema(path).metadata[b"prunesim.records"])["extra"]
        assert write_records(records, extra=extra, single=True) == path.read_bytes()


def test_changed_files_and_unknown_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(InputError, match=r"SHA-256: expected \w+, as in PROVENANCE\.yaml"):
        load_measurements(name)
    (tmp_path / file_name(name)).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_measurements(name)
    wheel = tmp_path / "aiconfigurator_core-0.12.0.whl"
    with pytest.raises(InputError, match="cannot be read"):
        build.build(wheel, tmp_path, tmp_path, tmp_path / "serving.csv")
    wheel.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"expected the wheel of aiconfigurator-core 0\.12\.0"):
        build.build(wheel, tmp_path, tmp_path, tmp_path / "serving.csv")


def test_a_choice_takes_one_kernel_and_counts_what_it_leaves() -> None:
    sources = [Source("B200", {"SGLang": "0.5.14"}, kernel) for kernel in ("trtllm_mha", "triton")]
    columns = {
        "operator": "attention_decode",
        "batch": 1,
        "q_len": 1,
        "kv_len": 64,
        "heads": 8,
        "kv_heads": 8,
    }
    columns |= {
        "head_dim": [64, 128, 128, 512],
        "window": [0, 128, 0, 0],
        "source": [0, 0, 1, 0],
        "seconds": 1e-5,
    }
    records = Records.from_columns(
        sources, **columns, dtype="bf16", weight_dtype=["bf16", "bf16", "bf16", "fp8"]
    )
    choice = CHOICES["b200_sxm/attention_decode/sglang"]
    taken, left = choose(records, choice)
    assert left == {
        "kernel other than trtllm_mha": 1,
        "features per head not among 64, 128, 256": 1,
    }
    assert taken.window.tolist() == [0, 128]
    ships, more = shipped_part(taken, choice)
    assert (len(ships), more) == (1, {"in the wheel only: sliding window": 1})
    fp8 = shipped_part(records.select([3]), choice)[1]
    assert fp8 == {"in the wheel only: number format other than bf16": 1}


@pytest.fixture(scope="module")
def wheel() -> Path:
    file = os.environ.get("PRUNESIM_AICONFIGURATOR_WHEEL")
    if not file:
        pytest.skip("set PRUNESIM_AICONFIGURATOR_WHEEL to the wheel of aiconfigurator-core 0.12.0")
    return Path(file)


@pytest.mark.slow
def test_the_sources_give_the_shipped_files(tmp_path: Path, wheel: Path, shared_data: Path) -> None:
    (tmp_path / "tables").mkdir()
    serving = tmp_path / "serving.csv"
    tables = build.build(wheel, shared_data, tmp_path / "tables", serving)
    assert set(tables) == set(list_measurements())
    assert serving.read_bytes() == PUBLISHED["serving"].read_bytes()
    for path in (tmp_path / "tables").iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
