"""The tables that ship: complete, small, what their provenance says, and within the physics of
their device."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import calibration.measurements as shipped
from calibration.evidence.measurements.wheel import (
    CHOICES,
    HEAD_DIMS,
    PACKAGE,
    SOURCES,
    choose,
    datasheet,
    open_wheel,
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
from calibration.records.timing_table import LAUNCHES, OPERATORS, Records, Source
from simulator.codes import ROLES
from simulator.errors import InputError

pytest.importorskip("pyarrow")
OTHERS = {  # tables of other packages by device: repository and copyright
    "h20": ("alibaba/InferSim@f2293da", "Alimama AI Infra Team"),
    "mi300x": ("ROCm/aiter@e4048607a5", "Advanced Micro Devices"),
    "mi355x": ("ROCm/aiter@e4048607a5", "Advanced Micro Devices"),
}


def test_what_is_promised_is_there_and_small() -> None:
    tables = list_measurements()
    assert set(tables) <= SOURCES.keys()
    sizes = {path.name: path.stat().st_size for path in FOLDER.glob("*.parquet")}
    assert set(sizes) == {file_name(name) for name in tables}
    assert sum(sizes.values()) < 3e6
    # rows of fp8 whose time is mostly the conversion of activations are left out
    assert [len(load_measurements("h100_sxm/gemm/trtllm", dtype=d)) for d in ("bf16", "fp8")] == [
        35700,
        23356,
    ]
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    owners = ("NVIDIA CORPORATION", *(owner for _, owner in OTHERS.values()))
    assert all(text in notice for text in (PACKAGE, *owners, "MIT License"))
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
        repository, owner = OTHERS[name.split("/")[0]]
        assert records.sources[0].origin == f"{repository}, {entry['path']}"
        assert owner in entry["copyright"]
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
        open_wheel(wheel)
    wheel.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"expected the wheel of aiconfigurator-core 0\.12\.0"):
        open_wheel(wheel)


def test_a_choice_takes_one_kernel_and_the_usual_widths() -> None:
    sources = [Source("B200", {"SGLang": "0.5.14"}, kernel) for kernel in ("trtllm_mha", "triton")]
    columns = {"operator": "attention_decode", "batch": 1, "q_len": 1, "kv_len": 64, "heads": 8}
    columns |= {"kv_heads": 8, "head_dim": [64, 128, 128, 512], "window": [0, 128, 0, 0]}
    columns |= {"source": [0, 0, 1, 0], "seconds": 1e-5}
    records = Records.from_columns(sources, **columns, dtype="bf16", weight_dtype="bf16")
    taken = choose(records, CHOICES["b200_sxm/attention_decode/sglang"])
    assert taken.window.tolist() == [0, 128]
