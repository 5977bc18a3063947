"""Change rows of a workload: widths, bytes and zeros; repeat rows; split and merge runs of layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import Kernel, Kind
from simulator.errors import InputError
from simulator.pruning._family import Choice, Pruned
from simulator.pruning._rows import biases, covering, parameters_removed, projections, readers, writers, zeros
from simulator.workload import Workload


def whole_share(share: Array | float, of: Array | float) -> Array:
    """Return ``share`` of ``of``, rounded to the nearest whole number (halves up)."""
    rounded: Array = np.floor(np.asarray(share) * np.asarray(of) + 0.5).astype(np.int64)
    return rounded


def aligned(width: Array, keep: Array, align: int) -> Array:
    """Return the share ``keep`` of ``width``, rounded up to a multiple of ``align``, at most ``width``."""
    wanted = np.ceil(keep * width / align - 1e-9).astype(np.int64) * align
    return np.minimum(np.maximum(wanted, align), width)


def changed(w: Workload, rows: Array, **columns: Any) -> Workload:
    """Return the workload with other values of some columns in some rows."""
    return w.replace(**{name: np.where(rows, values, getattr(w, name)) for name, values in columns.items()})


def resized(w: Workload, n: Array, k: Array, **columns: Any) -> Workload:
    """Return GEMMs with other N and K; parameters change with them, and so does a bias (N parameters)."""
    bias = biases(w)
    before = np.maximum(w.n.astype(np.float64) * w.k, 1.0)
    params = (w.params - bias) * (n.astype(np.float64) * k / before) + bias * (n / np.maximum(w.n, 1))
    return w.replace(n=n, k=k, params=np.where(w.kind == Kind.GEMM, params, w.params), **columns)


def with_inner(w: Workload, kept: Array) -> Workload:
    """Return the workload with MLPs of the inner widths ``kept``, one per row; rows without an MLP do not change."""
    down = readers(w, "down")
    width = covering(w, down, w.k)
    divisor, wide = np.maximum(width, 1), w.is_role("activation", "product", "quantize_inner") & (width > 0)
    n = np.where(writers(w, "gate", "up", "gate_up") | wide, w.n * kept // divisor, w.n)
    return resized(w, n, np.where(down, kept, w.k), **moved(w, np.where(wide, kept / divisor, 1.0)))


def with_expert_width(w: Workload, kept: Array) -> Workload:
    """Return the workload with routed experts of the inner widths ``kept``, one per row; other rows do not change."""
    routed = w.kind == Kind.EXPERTS
    params = w.params * (kept / np.maximum(w.n, 1))
    return changed(w, routed, n=kept, params=params)


def moved(w: Workload, share: Array) -> dict[str, Array]:
    """Return columns with a share of the bytes that each row reads and writes."""
    return {"read_bytes": w.read_bytes * share, "write_bytes": w.write_bytes * share}


def zeroed(w: Workload, choice: Choice, kernel: Kernel, name: str) -> Pruned:
    """Set a share of the projections' weights to zero; ``params`` counts nonzero weights and biases."""
    rows, keep = projections(w) & (choice.rows > 0), 1.0 - choice.rows
    if (already := rows & zeros(w)).any():
        which = Kernel(int(w.kernel[already].max())).name.lower()
        raise InputError(f"{name}: expected dense projections, got sparse ones ({which}); set zeros only once")
    bias = biases(w)
    out = changed(w, rows, density=w.density * keep, kernel=kernel, params=keep * (w.params - bias) + bias)
    return out, parameters_removed(w, out)


def doubled(w: Workload, mask: Array) -> tuple[Workload, Array, Array, Array]:
    """Return the workload with the masked rows twice, origin of each row, and masks of first and second copies."""
    index = np.repeat(np.arange(len(w)), np.where(mask, 2, 1))
    second = np.r_[False, index[1:] == index[:-1]]
    return w.take(index), index, mask[index] & ~second, second


def split_at(w: Workload, layer: int) -> Workload:
    """Split rows whose run of layers contains the start of ``layer`` into two rows that share their count."""
    across = (w.layer >= 0) & (w.layer < layer) & (w.layer + w.layers > layer)
    if not across.any():
        return w
    out, _, first, second = doubled(w, across)
    layers = np.where(first, layer - out.layer, out.layers - (layer - out.layer))
    out = changed(out, first | second, layers=layers, count=out.count * (layers / np.maximum(out.layers, 1)))
    return changed(out, second, layer=layer)


def merge_runs(w: Workload) -> Workload:
    """Merge neighbouring rows that differ only in consecutive layers: the inverse of ``expand`` and ``split_at``."""
    if len(w) < 2:
        return w
    new = np.ones(len(w), dtype=bool)
    new[1:] = (w.layer[1:] != w.layer[:-1] + w.layers[:-1]) | (w.layers[1:] == 0)
    for name in w.SCHEMA.keys() - {"count", "layer", "layers"}:
        column = getattr(w, name)
        new[1:] |= column[1:] != column[:-1]
    start = np.flatnonzero(new)
    if len(start) == len(w):
        return w
    return w.take(start).replace(count=np.add.reduceat(w.count, start), layers=np.add.reduceat(w.layers, start))
