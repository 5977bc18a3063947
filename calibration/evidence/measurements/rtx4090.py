"""Read the measured tables of the RTX 4090: GEMMs, attention and elementwise operators, each row
with its source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from calibration.records.importers import Draft, chosen, finish, numbers, unique_rows
from calibration.records.screening import Screen
from calibration.records.timing_table import Records, Source
from simulator.arrays import Array
from simulator.codes import DTYPES, ROLES
from simulator.files import csv
from simulator.files.read import read_bounded
from simulator.hardware.profile import HardwareProfile

RTX_FILES = ("rtx4090_gemm.csv", "rtx4090_attention.csv", "rtx4090_other_ops.csv")
SIZES = ("m", "n", "k", "batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")

_KERNELS: Mapping[str, tuple[str, str, float, float]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text("utf-8")
)


def rtx_tables(folder: Path, hw: HardwareProfile) -> Records:
    """Return the rows of all files; sources name the file and its licence, not the folder, which is
    private."""
    parts = []
    for name in RTX_FILES:
        records = finish(read_table(folder / name), label=name, hw=hw).records
        sources = []
        for s in records.sources:
            stack = {"vLLM": "0.19"} if "vLLM 0.19" in s.method else s.stack
            sources.append(
                replace(s, origin=f"{name}, from {s.origin}", licence="MIT", stack=stack)
            )
        parts.append(records.replace(sources=sources))
    return Records.concat(parts)


def read_table(path: Path) -> Draft:
    content = read_bounded(path)
    table = csv.read_csv(content, path.name)
    cells = {name: np.array(table.column(name), dtype=object) for name in table.header}
    screen = Screen(len(table.lines))
    op = cells["op"].astype(str)
    for name in np.unique(op[~np.isin(op, [*_KERNELS])]).tolist():
        screen.refuse(op == name, f"{name}: operator is not modelled")
    kernel_time = np.array(["kernel time" in note for note in cells["note"]])
    columns = _shapes(op, {name: numbers(cells[name]) for name in SIZES if name in cells})
    columns |= {
        "seconds": numbers(cells["latency_us"]) * 1e-6,
        "launch": np.where(kernel_time, "excluded", "unknown").astype(object),
        # kernel times are from a running model, whose weights and cache come from memory; others
        # are loops over one shape
        "cold": kernel_time & np.isin(columns["operator"], ("gemm", "attention_decode")),
        "dtype": chosen(screen, "dtype", cells["dtype"], DTYPES, "bf16"),
        "line": np.array(table.lines),
    }
    keys = np.stack([cells[name] for name in ("gpu", "source", "note")], axis=1).astype(str)
    distinct, columns["source"] = unique_rows(keys)
    digest = hashlib.sha256(content).hexdigest()
    sources = tuple(Source(device=g, method=n, origin=s, digest=digest) for g, s, n in distinct)
    return Draft(columns, sources, screen)


def _shapes(op: Array, sizes: Mapping[str, Array]) -> dict[str, Array]:
    """Return operator, role, sizes and bytes of each row."""
    kinds, roles, reads, writes = zip(*(_KERNELS.get(name, ("gemm", "", 0.0, 0.0)) for name in op))
    columns = {"m": np.full(len(op), np.nan), **sizes, "operator": np.array(kinds, dtype=object)}
    columns["role"] = np.array([float(ROLES.index(role)) if role else -1.0 for role in roles])
    tokens = np.where(columns["operator"] == "elementwise", columns["m"], 0.0)
    columns["read_bytes"] = tokens * 2.0 * np.array(reads)
    columns["write_bytes"] = tokens * 2.0 * np.array(writes)
    return columns
