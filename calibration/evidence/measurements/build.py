"""Make the shipped tables from the wheel (``wheel``) and from a folder with InferSim's files in
``h20`` (``infersim``) and the file of aiter's times (``aiter``): ``python -m
calibration.evidence.measurements.build WHEEL FOLDER``.

The same sources give the same bytes. PROVENANCE.yaml counts excluded rows by reason. It names the
version of pyarrow, because another version may encode differently.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.evidence.measurements import PUBLISHED, aiter, infersim
from calibration.evidence.measurements.infersim import SOURCES
from calibration.evidence.measurements.wheel import (
    CHOICES,
    PACKAGE,
    WHEEL_SHA256,
    open_wheel,
    read_choice,
    shipped_part,
)
from calibration.measurements import FOLDER, INDEX, file_name
from calibration.records.timing_table import write_records
from simulator.files.csv import csv_text
from simulator.files.write import write_whole

LICENCE = "Apache-2.0"
COPYRIGHT = "Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES. All rights reserved."

MEMBER = "aiconfigurator_core/systems/silicon_sample.csv"
_DATA: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
MODELS: Mapping[str, str] = _DATA["models"]
FP8_CACHE = "meta-llama/Llama-3.1-70B"
CACHE_ASSUMED = (
    "the cache's format is not stated: fp8, with which errors do not grow with the concurrency"
)
HARDWARE = ("h100_sxm", "h200_sxm", "b200_sxm")
ENGINES = ("trtllm", "sglang", "vllm")

CACHED = (
    "prompts were cached: rows of this group are over in under 0.75 of the time that their prefills"
    " take"
)
QUEUED = "requests queued for seconds before their first token"
SEVERAL = "its requests went to several replicas"


def build(wheel: Path, others: Path, folder: Path, serving_file: Path) -> dict[str, dict[str, Any]]:
    """Write the installed tables and their index into a folder, and the table of serving runs into
    a file; return the index. ``others`` is the folder of the files that are not in the wheel."""
    import pyarrow

    tables: dict[str, dict[str, Any]] = {}
    with open_wheel(wheel) as archive:
        for name, choice in SOURCES.items():
            if not choice.ships:
                continue
            package = PACKAGE
            path = choice.member
            owner = COPYRIGHT
            licence = LICENCE
            if name in CHOICES:
                records, left, refusals = read_choice(archive, choice)
                records, more = shipped_part(records, choice)
                left |= more
            else:
                reader = aiter if name in aiter.TABLES else infersim
                package = reader.REPOSITORY
                path = choice.path
                owner = reader.COPYRIGHT
                licence = reader.LICENCE
                records, left, refusals = reader.read_table(
                    name, others if reader is aiter else others / "h20"
                )
            extra = {
                "name": name,
                "package": package,
                "copyright": owner,
                "licence": licence,
                "modified": "see NOTICE",
            }
            content = write_records(records, extra=extra, single=True)
            write_whole(folder / file_name(name), content)
            source = records.sources[0]
            labels = records.labels().astype(str)
            ((framework, version),) = source.stack.items()
            tables[name] = {
                "file": file_name(name),
                "device": source.device,
                "framework": framework,
                "version": version,
                "kernels": [s.kernel for s in records.sources],
                "rows": {str(label): int((labels == label).sum()) for label in np.unique(labels)},
                "left_out": left,
                "refused": {reason: len(rows) for reason, rows in refusals.items()},
                **_origin_of(content, path, owner, licence),
            }
        served = serving_table(archive)
    content = csv_text(served).encode()
    write_whole(serving_file, content)
    serving = {
        "file": serving_file.name,
        "rows": len(served),
        "left_out": dict(why_left_out(served)),
    }
    index = {
        "package": PACKAGE,
        "url": "https://pypi.org/project/aiconfigurator-core/0.12.0/",
        "wheel": wheel.name,
        "wheel_sha256": WHEEL_SHA256,
        **_DATA["wheel"],
        "pyarrow": pyarrow.__version__,
        "serving": serving | _origin_of(content, MEMBER, COPYRIGHT, LICENCE),
        "infersim": {"package": infersim.REPOSITORY, "url": infersim.URL, **_DATA["infersim"]},
        "aiter": {"package": aiter.REPOSITORY, "url": aiter.URL, **_DATA["aiter"]},
        "tables": tables,
    }
    text = yaml.safe_dump(index, sort_keys=False, width=140, allow_unicode=True)
    write_whole(folder / INDEX, text.encode())
    return tables


def _origin_of(content: bytes, path: str, owner: str, licence: str) -> dict[str, Any]:
    about = {"path": path, "licence": licence, "copyright": owner, "bytes": len(content)}
    return {**about, "sha256": hashlib.sha256(content).hexdigest()}


def serving_table(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    with archive.open(MEMBER) as file:
        rows = [
            row for run in csv.DictReader(io.TextIOWrapper(file, "utf-8")) if (row := _served(run))
        ]
    distinct = {tuple(row.values()): row for row in rows}
    texts = ("engine", "version", "model", "hardware", "weight_dtype")
    numbers = ("devices", "seq", "new_tokens")

    def order(row: Mapping[str, str]) -> tuple[object, ...]:
        sizes = (int(row[name]) for name in (*numbers, "concurrency"))
        return (
            *(row[name] for name in texts),
            *sizes,
            row["source"],
            float(row["ttft_s"]),
            float(row["tpot_s"]),
        )

    return sorted(distinct.values(), key=order)


def _served(run: Mapping[str, str]) -> dict[str, str]:
    """Return the row of a run in SI units; {} for a run that is not selected. Selected are runs on
    one node in one pool (mode agg), where one engine runs the prefill and decode of a request, of
    dense models and of Qwen3-235B-A22B. Rows that a steady-state model cannot explain have the
    reason in ``left_out``."""
    path, engine, version, source = (
        run[name] for name in ("model_path", "backend", "backend_version", "silicon_data_source")
    )
    selected = (
        run["mode"] == "agg" and engine in ENGINES and run["system"] in HARDWARE and path in MODELS
    )
    if not selected or float(run["pp_size"]) != 1:
        return {}
    parallel = "tensor"
    if "235B" in path:  # devices share the routed experts
        devices, tensor, expert = (
            float(run[name] or 0) for name in ("tp_size", "moe_tp_size", "moe_ep_size")
        )
        if devices not in (tensor, expert):
            return {}  # attention and experts run on different numbers of devices
        parallel = "tensor" if tensor == devices else "expert"
    # older lists state the batch instead of the requests in flight
    stated = re.search(r"silicon_concurrency=(\d+)", source)
    concurrency = int(stated[1]) if stated else int(float(run["batch_size"]))
    left_out = SEVERAL if concurrency > float(run["batch_size"]) else ""
    if (engine, version) == ("sglang", "0.5.8.post1"):
        left_out = QUEUED
    fp8 = run["gemm_quant_mode"] == "fp8"
    if (engine, version, fp8) == ("vllm", "0.12.0", True) or version.startswith("1.2.0rc6"):
        left_out = CACHED
    # without the folders
    file = source.split(";")[0].removeprefix("source_file=").rpartition("/data/")[2]
    measured = re.search(r"measured=(\d{4}-\d{2}-\d{2})", source)
    return {
        "engine": engine,
        "version": version,
        "model": MODELS[path],
        "hardware": run["system"],
        "devices": str(int(float(run["tp_size"]))),
        "parallel": parallel,
        # without a format of the products and a precision, the checkpoint is bf16
        "weight_dtype": run["gemm_quant_mode"] or run["precision"] or "bf16",
        "kv_dtype": "fp8" if path == FP8_CACHE else "",
        "concurrency": str(concurrency),
        "seq": str(int(float(run["isl"]))),
        "new_tokens": str(int(float(run["osl"]))),
        "ttft_s": f"{float(run['silicon_ttft_ms']) / 1e3:.7g}",
        "tpot_s": f"{float(run['silicon_tpot_ms']) / 1e3:.7g}",
        "left_out": left_out,
        "assumed": CACHE_ASSUMED if path == FP8_CACHE else "",
        "source": f"silicon_sample.csv: {file}{f', measured {measured[1]}' if measured else ''}",
    }


def why_left_out(rows: list[dict[str, str]]) -> Counter[str]:
    return Counter(row["left_out"] for row in rows if row["left_out"])


def main() -> None:
    about = (
        f"Make the shipped measurement tables from {PACKAGE}, {infersim.REPOSITORY} and"
        f" {aiter.REPOSITORY}"
    )
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "others", type=Path, help=f"folder of h20 (the files of InferSim) and {aiter.FILE}"
    )
    arguments = parser.parse_args()
    index = build(arguments.wheel, arguments.others, FOLDER, PUBLISHED["serving"])
    for name, entry in index.items():
        print(f"{name}: {sum(entry['rows'].values())} rows, {entry['bytes']} bytes")


if __name__ == "__main__":
    main()
