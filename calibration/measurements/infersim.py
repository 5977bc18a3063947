"""The measured kernels of alibaba/InferSim on an H20, and the selected rows (:data:`TABLES`).

The CSV files are those of the repository's ``bench_data/*/h20``; its benchmark scripts (``kernel_benchmark``) show how
each was measured, and so which rows are the time of a kernel. SGLang runs these kernels (stack ``sglang``), except in
decode attention: the table's kernel is FlashInfer's (stack ``flashinfer``), an option of SGLang. SGLang's default on
Hopper is FlashAttention-3, which is 2.2 to 2.8 times slower on an H20 (SGLang, issue 5630 and pull request 6151).
Gated delta nets have no table: their files hold nine different rows (``tests/operators/test_delta_net.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.measurements.wheel import CHOICES, SelectedTable, datasheet, exclude
from calibration.records.importers import finish
from calibration.records.readers import GROUPED_SHAPE, Draft, read_grouped
from calibration.records.screening import Refusals, Screen
from calibration.records.timing_table import Flag, Records, Source
from simulator.arrays import Array
from simulator.files import csv
from simulator.files.read import read_bounded

REPOSITORY = "alibaba/InferSim@f2293da"
URL = "https://github.com/alibaba/InferSim"
_OWNERS = "Alimama AI Infra Team and Future Living Lab, Alibaba Group"
COPYRIGHT = f"Copyright (c) {_OWNERS}, as the repository's README names them"
DEVICE = "NVIDIA H20"

# a call of FlashInfer from Python takes the host 26 to 39 us, whatever it computes: shorter rows are its time
CALL_S = 40e-6
STALL = 1.15  # a row with this many times the time of a row of more work was disturbed: 2 of 375


@dataclass(frozen=True)
class TimingMethod:
    files: tuple[str, ...]
    kernel: str
    library: str
    method: str
    launch: str
    columns: Mapping[str, str | float]  # column of records -> column of the file, or a value


# fmt: off
_HEADS = {"heads": "heads", "kv_heads": "kv_heads", "head_dim": "head_dim"}
_METHODS: Mapping[str, TimingMethod] = {
    "gemm": TimingMethod(
        ("gemm_fp8.csv",), "deep_gemm fp8_gemm, scales of 128 x 128 weights", "DeepGEMM",
        "kernel time of a profiler, L2 overwritten before each; activations quantised before", "excluded",
        {"m": "m", "n": "n", "k": "k"}),
    "attention_prefill": TimingMethod(
        ("attention_prefill.csv",), "sgl_kernel flash_attn_varlen_func", "FlashAttention-3",
        "mean of 10 calls in a row after 10 others, operands as far in L2 as they fit", "eager",
        {**_HEADS, "batch": 1.0, "q_len": "seq_len", "kv_len": "seq_len"}),
    "attention_decode": TimingMethod(
        ("attention_decode.csv",), "BatchDecodeWithPagedKVCacheWrapper, tensor cores", "FlashInfer",
        "mean of 10 calls in a row after 10 others, cache as far in L2 as it fits", "eager",
        {**_HEADS, "batch": "batch_size", "q_len": 1.0, "kv_len": "kv_len"}),
    "mla_decode": TimingMethod(
        ("mla_decode.csv",), "FlashMLA", "FlashMLA", "calls in a row; the script is not in the repository", "unknown",
        {"heads": "heads", "kv_heads": 1.0, "head_dim": 576.0, "n": 512.0, "batch": "batch_size", "q_len": 1.0,
         "kv_len": "kv_len"}),
    "experts": TimingMethod(
        ("experts_decode.csv", "experts_prefill.csv"),
        "deep_gemm grouped fp8_gemm, scales of 128 x 128 weights", "DeepGEMM",
        "kernel time of a profiler, L2 overwritten before each; one product of all experts", "excluded", {}),
}
_EXPERTS = ("experts", "active", "role")
_FORMATS = {"gemm": ("fp8_block",), "experts": ("fp8_block",), "attention_decode": ("bf16", "fp8_wo")}
_STACKS = {"attention_decode": "flashinfer"}


def _tables() -> dict[str, SelectedTable]:
    out = {}
    for operator, about in _METHODS.items():
        stack, formats = _STACKS.get(operator, "sglang"), _FORMATS.get(operator, ("bf16",))
        out[f"h20/{operator}/{stack}"] = SelectedTable("h20", stack, " and ".join(about.files), ships=formats)
    return out


TABLES: Mapping[str, SelectedTable] = _tables()
# fmt: on
# every table that profiles are fitted on, by device/operator/stack
SOURCES: Mapping[str, SelectedTable] = {**CHOICES, **TABLES}


def read_table(name: str, folder: Path) -> tuple[Records, dict[str, int], Refusals]:
    """Return the rows of a table, with times in single precision; excluded and refused rows by reason."""
    operator = name.split("/")[1]
    about = _METHODS[operator]
    contents = [read_bounded(folder / file) for file in about.files]
    parts = [csv.read_csv(content, file) for content, file in zip(contents, about.files, strict=True)]
    if operator == "experts":
        columns, screen = read_grouped(_numbers(parts, GROUPED_SHAPE))
    else:
        columns, screen = _columns(operator, parts[0])
    source = Source(
        device=DEVICE,
        stack={about.library: "of unknown version"},
        kernel=about.kernel,
        method=f"InferSim: {about.method}",
        origin=f"{REPOSITORY}, {' and '.join(about.files)}",
        digest=hashlib.sha256(b"".join(contents)).hexdigest(),
        licence="Apache-2.0",
    )
    found = finish(Draft(columns, (source,), screen), label=about.files[0], hw=datasheet("h20"))
    r, left = exclude(found.records, {"timed twice, over 10 % apart": found.records.flags & Flag.CONFLICT > 0})
    r = r.select(np.lexsort([getattr(r, n) for n in ("m", "kv_len", "q_len", "batch", "k", "n", *_HEADS, *_EXPERTS)]))
    r = r.select(np.argsort(r.labels().astype(str), kind="stable")).tidy()
    return r.replace(seconds=r.seconds.astype(np.float32).astype(np.float64)), left, found.refusals


def _numbers(tables: Sequence[csv.CsvTable], names: Iterable[str]) -> dict[str, Array]:
    """Return columns of numbers of some tables; NaN where a cell is empty."""
    return {name: np.array([float(cell or "nan") for t in tables for cell in t.column(name)]) for name in names}


def _columns(operator: str, cells: csv.CsvTable) -> tuple[dict[str, Array], Screen]:
    """Return the columns of records of GEMMs or attention, and the refused rows."""
    about, size, gemm = _METHODS[operator], len(cells.rows), operator == "gemm"
    given = _numbers([cells], [name for name in cells.header if name not in ("dtype", "kv_dtype")])
    columns: dict[str, Array] = {
        ours: given[theirs] if isinstance(theirs, str) else np.full(size, theirs)
        for ours, theirs in about.columns.items()
    }
    formats = cells.column("kv_dtype") if "kv_dtype" in cells.header else ["bf16"] * size
    columns |= {
        "operator": np.full(size, operator, dtype=object),
        "dtype": np.full(size, "fp8" if gemm else "bf16", dtype=object),
        "weight_dtype": np.array(["fp8_block"] * size if gemm else [f or "bf16" for f in formats], dtype=object),
        "seconds": given["latency_us"] * 1e-6,
        "cold": np.full(size, gemm),
        "copies": np.full(size, 0.0 if gemm else 1.0),
        "launch": np.full(size, about.launch, dtype=object),
    }
    screen = Screen(size)
    screen.refuse(np.isnan(columns["seconds"]), "the file has no time")
    if operator == "attention_decode":
        calls, stalled = _disturbed(columns)
        screen.refuse(calls, f"shorter than {CALL_S * 1e6:.0f} us, where calls take the host that long")
        screen.refuse(stalled, f"over {STALL:g} times the time of a call of more work")
    return columns, screen


def _disturbed(columns: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return masks of decode rows with the host's time of a call instead of a kernel's, and of disturbed rows. A layout
    of heads is one run; runs whose shortest time is above half of :data:`CALL_S` timed calls."""
    calls, stalled = (np.zeros(len(columns["seconds"]), dtype=np.bool_) for _ in range(2))
    layouts = np.stack([columns[name] for name in _HEADS], axis=1)
    for layout in np.unique(layouts, axis=0):
        run = np.flatnonzero((layouts == layout).all(axis=1) & np.isfinite(columns["seconds"]))
        seconds, batch, length = (columns[name][run] for name in ("seconds", "batch", "kv_len"))
        if len(run) and seconds.min() > 0.5 * CALL_S:
            calls[run] = seconds < CALL_S
        more = (batch[:, None] <= batch) & (length[:, None] <= length)
        same = columns["weight_dtype"][run][:, None] == columns["weight_dtype"][run]
        stalled[run] = (more & same & (STALL * seconds < seconds[:, None])).any(axis=1)
    return calls, stalled
