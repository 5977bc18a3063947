"""Rows that pruning adds: routers, gathers, selections and their places among the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.pruning._rows import covering, writers
from simulator.workload import DTYPE_BYTES, Kind, Part, Phase, Workload, dtype_code, role_code


def sublayer_ends(w: Workload) -> Array:
    """One row a sublayer, run of layers and phase: its last projection. Templates for rows that pruning adds."""
    routed = w.is_role("experts") & (w.layer >= 0)
    shared = covering(w, routed, np.ones(len(w))) > 0  # experts come after the MLP that they share a sublayer with
    ends: Array = routed | (writers(w, "o", "down", "linear") & ~(shared & (w.part == Part.MLP)))
    return ends


def hidden_at(w: Workload, at: Array) -> Array:
    """Hidden size at some sublayer ends."""
    hidden: Array = np.where(w.kind[at] == Kind.EXPERTS, w.k[at], w.n[at])
    return hidden


def before_sublayer(w: Workload, rows: Array) -> Array:
    """Position (see :func:`insert`) before the sublayers that some rows are in."""
    change = np.zeros(len(w), dtype=bool)
    change[1:] = (w.part[1:] != w.part[:-1]) | (w.phase[1:] != w.phase[:-1])
    begin: Array = np.maximum.accumulate(np.where(change, np.arange(len(w)), 0))[rows] - 0.5
    return begin


def _stream(w: Workload, at: Array) -> Array:
    """Codes of the residual stream's format at some rows: their own, or bf16 where they compute in 8 bits or fewer."""
    own = w.dtype[at]
    return np.where(DTYPE_BYTES[own] < 2.0, dtype_code("bf16"), own)


def stream_bytes(w: Workload, at: Array) -> Array:
    """Bytes of a value of the residual stream at some rows."""
    return DTYPE_BYTES[_stream(w, at)]


def overheads(w: Workload, at: Array, role: str, **columns: Any) -> Workload:
    """Rows added for each row index in ``at``: its layer, part, phase, count; elementwise, in the stream's format."""
    base = {name: getattr(w, name)[at] for name in ("part", "phase", "layer", "layers", "count")}
    stream, code = _stream(w, at), role_code(role)[0]
    columns = {"kind": Kind.ELEMENTWISE, **base, "dtype": stream, "weight_dtype": stream, **columns}
    return Workload.filled(w.meta, size=len(at), role=code, overhead=True, **columns)


def overhead_gemm(w: Workload, at: Array, role: str, n: Array | int, k: Array | int, **columns: Any) -> Workload:
    """GEMMs added over all tokens of the rows ``at``; their weights are counted where that phase carries parameters."""
    owns = (w.phase[at] == Phase.PREFILL) | ~(w.phase == Phase.PREFILL).any()  # all, but the decodes of a generate
    params = np.where(owns, np.asarray(n, dtype=np.float64) * k / w.repeats[at], 0.0)
    return overheads(w, at, role, kind=Kind.GEMM, m=w.m[at], n=n, k=k, params=params, **columns)


Inserted = list[tuple[Array, Workload]]
"""Rows to insert, and the (possibly fractional) positions before which each is put."""


def insertion(w: Workload, parts: Inserted) -> Array:
    """Order of the rows of ``w`` and of ``parts``, one after the other, that puts each of them in its place."""
    place = np.concatenate([np.arange(len(w), dtype=np.float64), *[at for at, _ in parts]])
    return np.argsort(place, kind="stable")


def insert(w: Workload, parts: Inserted) -> Workload:
    """Rows of ``parts`` put among those of ``w``; equal positions keep their order."""
    return Workload.concat([w, *[rows for _, rows in parts]]).take(insertion(w, parts))
