"""Read the measured kernels of alibaba/InferSim on an H20 (:data:`TABLES`).

The CSV files are the repository's ``bench_data/*/h20``. Its benchmark scripts
(``kernel_benchmark``) show how each was measured, and therefore which rows are the time of a
kernel. SGLang runs these kernels (stack ``sglang``), except in decode attention: the table's kernel
is FlashInfer's (stack ``flashinfer``), an option of SGLang. SGLang's default on Hopper is
FlashAttention-3, which is 2.2 to 2.8 times slower on an H20 (SGLang, issue 5630 and pull request
6151). Gated delta nets have no table: their files hold nine different rows
(``tests/operators/test_delta_net.py``). ``infersim.yaml`` states the file, kernel and timing method
of each table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from calibration.evidence.measurements import FOLDER, aiter
from calibration.evidence.measurements.wheel import (
    CHOICES,
    SelectedTable,
    beaten,
    datasheet,
    exclude,
    in_order,
)
from calibration.measurements import read_tables
from calibration.records.importers import Draft, finish
from calibration.records.screening import Refusals, Screen
from calibration.records.timing_table import Flag, Records, Source
from simulator.arrays import Array
from simulator.codes import ROLES
from simulator.files import csv
from simulator.files.read import read_bounded
from simulator.operators.experts import PARTS

REPOSITORY = "alibaba/InferSim@f2293da"
URL = "https://github.com/alibaba/InferSim"
_OWNERS = "Alimama AI Infra Team and Future Living Lab, Alibaba Group"
COPYRIGHT = f"Copyright (c) {_OWNERS}, as the repository's README names them"
LICENCE = "Apache-2.0"
DEVICE = "NVIDIA H20"

# a call of FlashInfer from Python takes the host 26 to 39 us, whatever it computes: shorter rows
# are the host's time
CALL_S = 40e-6
STALL = 1.15  # a row with this many times the time of a row of more work was disturbed: 2 of 375
# skew of the rule that distributes tokens to experts (simulator.operators.experts.dealt_load)
AROUND_MEAN = -0.3
# experts from which the number of tokens is known within 9 %, the standard deviation of what was
# drawn
FEWEST = 4
_HEADS = ("heads", "kv_heads", "head_dim")


_METHODS = read_tables(FOLDER / "infersim.yaml")
TABLES: Mapping[str, SelectedTable] = {
    name: SelectedTable(
        "h20", name.split("/")[2], " and ".join(about["files"]), ships=tuple(about["ships"])
    )
    for name, about in _METHODS.items()
}
# every table that profiles are fitted on, by device/operator/stack
SOURCES: Mapping[str, SelectedTable] = {**CHOICES, **TABLES, **aiter.TABLES}


def read_table(name: str, folder: Path) -> tuple[Records, dict[str, int], Refusals]:
    operator = name.split("/")[1]
    about = _METHODS[name]
    contents = [read_bounded(folder / file) for file in about["files"]]
    tables = [
        csv.read_csv(content, file) for content, file in zip(contents, about["files"], strict=True)
    ]
    shared = set(tables[0].header).intersection(*(table.header for table in tables))
    cells = {
        column: np.array([cell for table in tables for cell in table.column(column)])
        for column in shared
    }
    columns, screen = (
        _experts(cells) if operator == "experts" else _columns(operator, cells, about["columns"])
    )
    for column, value in (("operator", operator), ("launch", about["launch"])):
        columns[column] = np.full(len(columns["seconds"]), value, dtype=object)
    source = Source(
        device=DEVICE,
        stack={about["library"]: "of unknown version"},
        kernel=about["kernel"],
        method=f"InferSim: {about['method']}",
        origin=f"{REPOSITORY}, {TABLES[name].path}",
        digest=hashlib.sha256(b"".join(contents)).hexdigest(),
        licence=LICENCE,
    )
    found = finish(Draft(columns, (source,), screen), label=about["files"][0], hw=datasheet("h20"))
    r, left = exclude(
        found.records, {"timed twice, over 10 % apart": found.records.flags & Flag.CONFLICT > 0}
    )
    return in_order(r, (*_HEADS, "experts", "active", "role")), left, found.refusals


def _columns(
    operator: str, cells: Mapping[str, Array], named: Mapping[str, str | float]
) -> tuple[dict[str, Array], Screen]:
    """Return columns of records and refused rows; ``named``: a column of the file, or a value, per
    column."""
    size = len(cells["latency_us"])
    gemm = operator == "gemm"
    columns: dict[str, Array] = {
        ours: _numbers(cells[theirs]) if isinstance(theirs, str) else np.full(size, theirs)
        for ours, theirs in named.items()
    }
    cache = cells.get("kv_dtype", np.full(size, "bf16"))
    columns |= {
        "dtype": np.full(size, "fp8" if gemm else "bf16", dtype=object),
        "weight_dtype": np.where(cache == "", "bf16", "fp8_block" if gemm else cache).astype(
            object
        ),
        "seconds": _numbers(cells["latency_us"]) * 1e-6,
        "cold": np.full(size, gemm),
        "copies": np.full(size, 0.0 if gemm else 1.0),
    }
    screen = Screen(size)
    screen.refuse(np.isnan(columns["seconds"]), "the file has no time")
    if operator == "attention_decode":
        calls, stalled = _disturbed(columns)
        screen.refuse(
            calls, f"shorter than {CALL_S * 1e6:.0f} us, where calls take the host that long"
        )
        screen.refuse(stalled, f"over {STALL:g} times the time of a call of more work")
    return columns, screen


def _numbers(cells: Array) -> Array:
    return np.array([float(cell or "nan") for cell in cells])


def _disturbed(columns: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return masks of decode rows with the host's time of a call instead of a kernel's, and of
    disturbed rows. A layout of heads is one run; runs whose shortest time is above half of
    :data:`CALL_S` timed calls."""
    calls, stalled = (np.zeros(len(columns["seconds"]), dtype=np.bool_) for _ in range(2))
    layouts = np.stack([columns[name] for name in _HEADS], axis=1)
    for layout in np.unique(layouts, axis=0):
        run = np.flatnonzero((layouts == layout).all(axis=1) & np.isfinite(columns["seconds"]))
        seconds, batch, length = (columns[name][run] for name in ("seconds", "batch", "kv_len"))
        if len(run) and seconds.min() > 0.5 * CALL_S:
            calls[run] = seconds < CALL_S
        for cache in np.unique(columns["weight_dtype"][run]):
            same = columns["weight_dtype"][run] == cache
            stalled[run[same]] = beaten([batch[same], length[same]], seconds[same], STALL)
    return calls, stalled


def _experts(cells: Mapping[str, Array]) -> tuple[dict[str, Array], Screen]:
    """Return the columns of the products of gate and up, then of down, of a layer's experts.
    DeepGEMM timed each alone (``kernel_benchmark/deepgemm_grouped_gemm_*.py``), with the tokens of
    each expert drawn from 0.7 to 1.3 times their mean."""
    given = {name: _numbers(values) for name, values in cells.items()}
    every = given["num_experts"]
    experts = given["num_local_experts"]
    top = given["topk"]
    once = {"m": np.rint(given["tokens_per_expert"] * every / top), "n": given["intermediate_size"]}
    once |= {"k": given["hidden_size"], "experts": experts, "active": top * experts / every}
    columns = {name: np.tile(column, 2) for name, column in once.items()}
    size = 2 * len(every)
    columns |= {
        "role": np.repeat([float(ROLES.index(name)) for name in PARTS[1:]], len(every)),
        "dtype": np.full(size, "fp8", dtype=object),
        "weight_dtype": np.full(size, "fp8_block", dtype=object),
        "skew": np.full(size, AROUND_MEAN),
        "seconds": 1e-6 * np.concatenate([given["up_proj_us"], given["down_proj_us"]]),
        "cold": np.ones(size, np.bool_),
    }
    screen = Screen(size)
    screen.refuse(
        columns["experts"] < FEWEST, f"under {FEWEST} experts: their number of tokens was drawn"
    )
    return columns, screen
