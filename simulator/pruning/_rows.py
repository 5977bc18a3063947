"""What pruning families do to the rows of a workload: find them, shrink them, double them, add some of their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.columns import Array
from simulator.errors import InputError
from simulator.pruning._common import PROJECTIONS, QKV, Choice, F
from simulator.workload import DTYPE_BYTES, Kernel, Kind, Phase, Workload, dtype_code, role_code

INPUTS: tuple[str, ...] = (*QKV, "gate", "up", "gate_up")
"""Projections that read the hidden state."""
OUTPUTS: tuple[str, ...] = ("o", "down")
"""Projections that write the hidden state."""

SCORE_BYTES = 4.0
"""A score or an index of a selection: fp32 or int32."""

_GEMM = int(Kind.GEMM)


# -- finding rows ------------------------------------------------------------------------------------------------------


def layer_count(w: Workload) -> int:
    """Layers the rows are numbered by (fewer than the model's once depth pruning has removed some)."""
    return int((w.layer + w.layers).max(initial=0))


def projections(w: Workload, *names: str) -> Array:
    """Mask of projections inside the layers, all seven unless some are named."""
    mask: Array = w.is_role(*(names or PROJECTIONS)) & (w.layer >= 0)
    return mask


def writers(w: Workload, *names: str) -> Array:
    """Mask of projections whose N is that of the model: all but the first factors of low-rank pairs."""
    mask: Array = projections(w, *names) & (w.stage != 1)
    return mask


def readers(w: Workload, *names: str) -> Array:
    """Mask of projections whose K is that of the model: all but the second factors of low-rank pairs."""
    mask: Array = projections(w, *names) & (w.stage != 2)
    return mask


def covering(w: Workload, mask: Array, values: Array) -> Array:
    """Of every row: the value of the masked row that covers its (first) layer; 0 where there is none."""
    at = np.flatnonzero(mask)
    if not len(at):
        return np.zeros(len(w), dtype=values.dtype)
    at = at[np.argsort(w.layer[at], kind="stable")]
    place = np.searchsorted(w.layer[at], w.layer, side="right") - 1
    return np.where((place >= 0) & (w.layer >= 0), values[at[np.maximum(place, 0)]], 0)


def weights(w: Workload) -> F:
    """Parameters of each row's executions, biases left out."""
    owned: F = (w.params - biases(w)) * w.count
    return owned


def removed(before: float, after: float) -> float:
    """Fraction removed; 0 of nothing."""
    return max(0.0, 1.0 - after / before) if before > 0 else 0.0


def parameters_removed(w: Workload, out: Workload) -> float:
    """Fraction of the projections' weights that pruning removed."""
    return removed(*(float(weights(x)[projections(x)].sum()) for x in (w, out)))


def sublayer_ends(w: Workload) -> Array:
    """One row a sublayer, run of layers and phase: its last projection. Templates for rows that pruning adds."""
    return writers(w, *OUTPUTS)


def before_sublayer(w: Workload, rows: Array) -> F:
    """Position (see :func:`insert`) before the sublayers that some rows are in."""
    change = np.zeros(len(w), dtype=bool)
    change[1:] = (w.part[1:] != w.part[:-1]) | (w.phase[1:] != w.phase[:-1])
    begin: F = np.maximum.accumulate(np.where(change, np.arange(len(w)), 0))[rows] - 0.5
    return begin


# -- shrinking rows ----------------------------------------------------------------------------------------------------


def whole_share(share: Array | float, of: Array | float) -> Array:
    """``share`` of ``of``, rounded to the nearest whole (halves up)."""
    rounded: Array = np.floor(np.asarray(share) * np.asarray(of) + 0.5).astype(np.int64)
    return rounded


def aligned(width: Array, keep: Array, align: int) -> Array:
    """``keep`` of ``width`` rounded up to a multiple of ``align``, and no more than ``width``.

    >>> aligned(np.array([11008, 100]), np.array([0.8, 0.99]), 16).tolist()
    [8816, 100]
    """
    wanted = np.ceil(keep * width / align - 1e-9).astype(np.int64) * align
    return np.minimum(np.maximum(wanted, align), width)


def biases(w: Workload) -> F:
    """N parameters of the GEMM rows that own a bias besides their weight."""
    weight: Array = w.n.astype(np.float64) * w.k
    if np.count_nonzero(w.kernel):
        weight = np.where((w.kernel == Kernel.SPARSE24) | (w.kernel == Kernel.UNSTRUCTURED), w.density, 1.0) * weight
    return np.where((w.kind == _GEMM) & (w.params > 0) & (np.abs(w.params - weight - w.n) < 0.5), w.n, 0.0)


def resized(w: Workload, n: Array, k: Array, **columns: Any) -> Workload:
    """GEMMs with other N and K; the parameters follow, with the bias (N of them) where a row has one."""
    bias = biases(w)
    before = np.maximum(w.n.astype(np.float64) * w.k, 1.0)
    params = (w.params - bias) * (n.astype(np.float64) * k / before) + np.where(bias > 0, n, 0.0)
    return w.replace(n=n, k=k, params=np.where(w.kind == _GEMM, params, w.params), **columns)


def moved(w: Workload, share: F) -> dict[str, F]:
    """A share of the bytes that each row reads and writes, as columns to replace."""
    return {"read_bytes": w.read_bytes * share, "write_bytes": w.write_bytes * share}


def zeroed(w: Workload, choice: Choice, kernel: Kernel, name: str) -> tuple[Workload, float]:
    """Weights of the projections set to zero once; ``params`` counts those that are not (and the biases)."""
    rows, keep = projections(w) & (choice.rows > 0), 1.0 - choice.rows
    if (w.kernel[rows] != Kernel.DENSE).any():
        which = Kernel(int(w.kernel[rows].max())).name.lower()
        raise InputError(f"{name}: the projections are sparse already ({which}); a weight is zeroed once")
    bias = biases(w)
    left = np.where(rows, keep * (w.params - bias) + bias, w.params)
    density, code = np.where(rows, w.density * keep, w.density), np.where(rows, kernel, w.kernel)
    out = w.replace(density=density, kernel=code, params=left)
    return out, parameters_removed(w, out)


def doubled(w: Workload, mask: Array) -> tuple[Workload, Array, Array, Array]:
    """The masked rows twice; which row each comes from, and masks of the first and of the second of two."""
    index = np.repeat(np.arange(len(w)), np.where(mask, 2, 1))
    second = np.r_[False, index[1:] == index[:-1]]
    return w.take(index), index, mask[index] & ~second, second


def split_at(w: Workload, layer: int) -> Workload:
    """Rows that stand for layers on both sides of the start of one as two rows, the counts shared out."""
    across = (w.layer >= 0) & (w.layer < layer) & (w.layer + w.layers > layer)
    if not across.any():
        return w
    out, _, first, second = doubled(w, across)
    before = layer - out.layer
    layers = np.where(first, before, np.where(second, out.layers - before, out.layers))
    count = out.count * np.where(first | second, layers / np.maximum(out.layers, 1), 1.0)
    return out.replace(layer=np.where(second, layer, out.layer), layers=layers, count=count)


def merge_runs(w: Workload) -> Workload:
    """Neighbouring rows that are equal but for consecutive layers merged: undoes ``expand`` and ``split_at``."""
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


# -- rows that pruning adds --------------------------------------------------------------------------------------------


def stream_dtype(w: Workload, at: Array) -> Array:
    """Codes of the residual stream's format at some rows: their own, or bf16 where they compute in 8 bits or fewer."""
    own = w.dtype[at]
    return np.where(DTYPE_BYTES[own] < 2.0, dtype_code("bf16"), own)


def overheads(w: Workload, at: Array, role: str, **columns: Any) -> Workload:
    """Rows added for each row index in ``at``: its layer, part, phase, count; elementwise, in the stream's format."""
    base = {name: getattr(w, name)[at] for name in ("part", "phase", "layer", "layers", "count")}
    stream, code = stream_dtype(w, at), role_code(role)[0]
    columns = {"kind": Kind.ELEMENTWISE, **base, "dtype": stream, "weight_dtype": stream, **columns}
    return Workload.from_columns(w.meta, size=len(at), role=code, overhead=True, **columns)


def overhead_gemm(w: Workload, at: Array, role: str, n: Array | int, k: Array | int, **columns: Any) -> Workload:
    """GEMMs added over all tokens of the rows ``at``; their weights are counted where that phase carries parameters."""
    owns = (w.phase[at] == Phase.PREFILL) | ~(w.phase == Phase.PREFILL).any()  # all, but the decodes of a generate
    params = np.where(owns, np.asarray(n, dtype=np.float64) * k, 0.0)
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
