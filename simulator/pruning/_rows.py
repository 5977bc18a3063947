"""Finding the rows of a workload that a pruning family changes, and counting their weights."""

from __future__ import annotations

import numpy as np

from simulator.arrays import Array
from simulator.pruning._family import PROJECTIONS, WHOLE
from simulator.workload import Kernel, Kind, Workload


def layer_count(w: Workload) -> int:
    """Layers the rows are numbered by (fewer than the model's once depth pruning has removed some)."""
    return int((w.layer + w.layers).max(initial=0))


def projections(w: Workload, *names: str) -> Array:
    """Mask of projections inside the layers, all seven unless some are named."""
    mask: Array = w.is_role(*(names or PROJECTIONS)) & (w.layer >= 0)
    return mask


def weighted(w: Workload) -> Array:
    """Mask of all weights inside the layers: the seven projections, those of latent attention, linear ones, experts."""
    mask: Array = w.is_role(*PROJECTIONS, *WHOLE, "linear") & (w.layer >= 0)
    return mask


def zeros(w: Workload) -> Array:
    """Mask of rows whose weights hold zeros, or are computed in blocks: all but dense ones and those that only skip
    tokens."""
    mask: Array = (w.kernel != Kernel.DENSE) & ~((w.kernel == Kernel.BLOCK_SPARSE) & (w.block == 0))
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


def shorter_copies(w: Workload, out: Workload) -> Workload:
    """The same rows, those that copy a cache (``cache_write`` with positions) as long as decode attention now finds it
    in ``out``; ``w`` is before."""
    copies = w.is_role("cache_write") & (w.kv_len > 0)
    if not copies.any():
        return out
    before, after = (covering(x, x.kind == Kind.DECODE_ATTENTION, x.kv_len.astype(np.float64)) for x in (w, out))
    share = np.where(copies & (before > 0), after / np.maximum(before, 1.0), 1.0)
    kept = np.where(copies, np.maximum(np.round(w.kv_len * share), 1), out.kv_len)
    return out.replace(kv_len=kept, read_bytes=out.read_bytes * share, write_bytes=out.write_bytes * share)


def biases(w: Workload) -> Array:
    """Parameters of an execution of the GEMM rows that own a bias besides their weight: N, or its share of them."""
    weight: Array = w.n.astype(np.float64) * w.k
    if np.count_nonzero(w.kernel):
        weight = np.where((w.kernel == Kernel.SPARSE24) | (w.kernel == Kernel.UNSTRUCTURED), w.density, 1.0) * weight
    owns = (w.kind == Kind.GEMM) & (w.params > 0) & (np.abs(w.params * w.repeats - weight - w.n) < 0.5)
    return np.where(owns, w.n / w.repeats, 0.0)


def weights(w: Workload) -> Array:
    """Parameters of each row's executions, biases left out."""
    owned: Array = (w.params - biases(w)) * w.count
    return owned


def removed(before: float, after: float) -> float:
    """Fraction removed; 0 of nothing."""
    return max(0.0, 1.0 - after / before) if before > 0 else 0.0


def parameters_removed(w: Workload, out: Workload) -> float:
    """Fraction of the projections' weights that pruning removed."""
    return removed(*(float(weights(x)[weighted(x)].sum()) for x in (w, out)))
