"""Add rows: routers, gathers and selections, at their places between other rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, Kind, Part, Phase, dtype_code, role_code
from simulator.pruning._rows import covering, writers
from simulator.workload import Workload


def sublayer_ends(w: Workload) -> Array:
    """Return a mask of the last projection per sublayer, run of layers and phase: templates of added rows."""
    routed = w.is_role("experts") & (w.layer >= 0)
    shared = covering(w, routed, np.ones(len(w))) > 0  # experts come after the MLP that they share a sublayer with
    ends: Array = routed | (writers(w, "o", "down", "linear") & ~(shared & (w.part == Part.MLP)))
    return ends


def hidden_at(w: Workload, at: Array) -> Array:
    """Return the hidden size at sublayer ends."""
    hidden: Array = np.where(w.kind[at] == Kind.EXPERTS, w.k[at], w.n[at])
    return hidden


def before_sublayer(w: Workload, rows: Array) -> Array:
    """Return the positions (see :func:`insert`) before the sublayers of some rows."""
    change = np.zeros(len(w), dtype=bool)
    change[1:] = (w.part[1:] != w.part[:-1]) | (w.phase[1:] != w.phase[:-1])
    begin: Array = np.maximum.accumulate(np.where(change, np.arange(len(w)), 0))[rows] - 0.5
    return begin


def _stream(w: Workload, at: Array) -> Array:
    """Return format codes of the residual stream at some rows: their format, or bf16 for 8 bits and fewer."""
    own = w.dtype[at]
    return np.where(DTYPE_BYTES[own] < 2.0, dtype_code("bf16"), own)


def stream_bytes(w: Workload, at: Array) -> Array:
    """Return the bytes per value of the residual stream at some rows."""
    return DTYPE_BYTES[_stream(w, at)]


def overheads(w: Workload, at: Array, role: str, **columns: Any) -> Workload:
    """Return elementwise rows in the stream's format, with layer, part, phase and count of the rows ``at``."""
    base = {name: getattr(w, name)[at] for name in ("part", "phase", "layer", "layers", "count")}
    stream, code = _stream(w, at), role_code(role)[0]
    columns = {"kind": Kind.ELEMENTWISE, **base, "dtype": stream, "weight_dtype": stream, **columns}
    return Workload.filled(w.meta, size=len(at), role=code, overhead=True, **columns)


def overhead_gemm(w: Workload, at: Array, role: str, n: Array | int, k: Array | int, **columns: Any) -> Workload:
    """Return GEMMs over all tokens of the rows ``at``; they own parameters in the phase that counts parameters."""
    # the decode steps of a generate own none
    owns = (w.phase[at] == Phase.PREFILL) | ~(w.phase == Phase.PREFILL).any()
    params = np.where(owns, np.asarray(n, dtype=np.float64) * k / w.repeats[at], 0.0)
    return overheads(w, at, role, kind=Kind.GEMM, m=w.m[at], n=n, k=k, params=params, **columns)


Inserted = list[tuple[Array, Workload]]
"""Rows to insert, each with a position (possibly fractional) before which it is put."""


def insertion(w: Workload, parts: Inserted) -> Array:
    """Return the order that puts the rows of ``w`` followed by ``parts`` into their places."""
    place = np.concatenate([np.arange(len(w), dtype=np.float64), *[at for at, _ in parts]])
    return np.argsort(place, kind="stable")


def insert(w: Workload, parts: Inserted) -> Workload:
    """Return ``w`` with the rows of ``parts`` inserted; equal positions keep their order."""
    return Workload.concat([w, *[rows for _, rows in parts]]).take(insertion(w, parts))
