"""Read the GEMM times of AMD's tuner (:data:`TABLES`): ``aiter/configs`` of ROCm/aiter, collected
in one CSV file.

The tuner times every kernel of its libraries and keeps the fastest per shape, so the times are a
lower bound for stacks without tuning. It calls a kernel 101 times, each time with the next of 101
copies of all operands (``aiter/test_common.py``, ``perftest``). Weights above 2.6 MB therefore come
from DRAM and not from the Infinity Cache of 256 MiB: no row is faster than DRAM, and 100 MB are
read at the rate of 900 MB.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from calibration.evidence.measurements.wheel import SelectedTable, beaten, datasheet, in_order
from calibration.records.importers import Draft, finish
from calibration.records.screening import Refusals, Screen
from calibration.records.timing_table import Records, Source
from simulator.arrays import Array
from simulator.files import csv
from simulator.files.read import read_bounded

VERSION = "e4048607a5"
REPOSITORY = f"ROCm/aiter@{VERSION}"
URL = "https://github.com/ROCm/aiter"
COPYRIGHT = "Copyright (c) Advanced Micro Devices, Inc. All rights reserved."
LICENCE = "MIT"
FILE = "aiter_gemm.csv.gz"

COPIES = 101.0
# A row that takes this many times the time of a product of more work is no best kernel: the tuner
# had none with split-K, which costs 40 to 160 %. Weights rearranged for a kernel (bpreshuffle) save
# 12 %, the median of 726 shapes.
MISSED = 1.3
PER_OCTAVE = 16.0  # kept numbers of tokens per doubling: some (n, k) have 15 of them, one has 4,112
_SIZES = ("m", "n", "k")
_METHOD = (
    "aiter tuner: mean kernel time of a profiler, 101 calls on rotated operands; fastest kernel per"
    " shape"
)
# profile -> target of its compiler, and the GPUs that have it; the file does not distinguish them
_GPUS = {
    "mi300x": ("gfx942", "AMD Instinct MI300X or MI325X"),
    "mi355x": ("gfx950", "AMD Instinct MI350X or MI355X"),
}
_REARRANGED = "a8w8_blockscale_bpreshuffle"
# kind and format of the weights -> number format; kinds of fewer than 400 rows per GPU (int8, a8w8
# in fp8) are excluded
_FORMATS: Mapping[tuple[str, str], str] = {
    ("a8w8_blockscale", ""): "fp8_block",
    (_REARRANGED, ""): "fp8_block",
    ("a8w8_bpreshuffle", "float8_e4m3fn"): "fp8",
    ("bf16", "bfloat16"): "bf16",
}
TABLES: Mapping[str, SelectedTable] = {
    "mi300x/gemm/aiter": SelectedTable("mi300x", "aiter", "aiter/configs", ships=("fp8_block",)),
    "mi355x/gemm/aiter": SelectedTable(
        "mi355x", "aiter", "aiter/configs", ships=("bf16", "fp8", "fp8_block")
    ),
}


def read_table(name: str, folder: Path) -> tuple[Records, dict[str, int], Refusals]:
    content = read_bounded(folder / FILE)
    hardware = TABLES[name].hardware
    target, device = _GPUS[hardware]
    table = csv.read_csv(gzip.decompress(content), FILE)
    cells = {
        column: np.array(table.column(column))
        for column in ("gfx", "kind", "w_dtype", "lib", *_SIZES, "us")
    }
    cells = {column: values[cells["gfx"] == target] for column, values in cells.items()}
    names = [
        _FORMATS.get(key, "")
        for key in zip(cells["kind"].tolist(), cells["w_dtype"].tolist(), strict=True)
    ]
    columns: dict[str, Array] = {column: cells[column].astype(np.float64) for column in _SIZES}
    columns["seconds"] = 1e-6 * cells["us"].astype(np.float64)
    labels = np.array(names)
    screen = _screen(labels, cells["kind"] == _REARRANGED, columns)
    columns |= {
        "dtype": np.where(labels == "bf16", "bf16", "fp8").astype(object),
        "weight_dtype": np.where(labels == "", "fp8", labels).astype(object),
        "launch": np.full(len(labels), "excluded", dtype=object),
        "copies": np.full(len(labels), COPIES),
    }
    source = Source(
        device=device,
        stack={"aiter": VERSION},
        kernel=f"fastest of {', '.join(sorted({lib for lib in cells['lib'].tolist() if lib}))}",
        method=_METHOD,
        origin=f"{REPOSITORY}, {TABLES[name].path}",
        digest=hashlib.sha256(content).hexdigest(),
        licence=LICENCE,
    )
    found = finish(Draft(columns, (source,), screen), label=FILE, hw=datasheet(hardware))
    return in_order(found.records, ()), {}, found.refusals


def _screen(labels: Array, rearranged: Array, columns: Mapping[str, Array]) -> Screen:
    screen = Screen(len(labels))
    missed = np.zeros(len(labels), dtype=np.bool_)
    m, n, k, seconds = columns.values()
    for label in np.unique(labels):
        rows = labels == label
        missed[rows] = beaten([m[rows], n[rows], k[rows]], seconds[rows], MISSED)
    screen.refuse(labels == "", "a kind with under 400 rows")
    screen.refuse(missed, f"over {MISSED:g} times the time of a product of more work")
    screen.refuse(rearranged, "weights rearranged for the kernel")
    order = np.lexsort((seconds, m))
    order = order[screen.kept[order]]
    bins = {
        "timed again, and slower": m,
        f"another number of tokens within 1/{PER_OCTAVE:g} octave": np.floor(
            PER_OCTAVE * np.log2(m)
        ),
    }
    for reason, column in bins.items():
        shapes = np.stack([np.unique(labels, return_inverse=True)[1], n, k, column])[:, order]
        first = order[np.unique(shapes, axis=1, return_index=True)[1]]
        screen.refuse(~np.isin(np.arange(len(m)), first), reason)
    return screen
