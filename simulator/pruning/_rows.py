"""Finding the rows of a workload that a pruning family changes, and counting their weights."""

from __future__ import annotations

import numpy as np

from simulator.columns import Array
from simulator.pruning._family import PROJECTIONS
from simulator.workload import Kernel, Kind, Workload


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


def biases(w: Workload) -> Array:
    """N parameters of the GEMM rows that own a bias besides their weight."""
    weight: Array = w.n.astype(np.float64) * w.k
    if np.count_nonzero(w.kernel):
        weight = np.where((w.kernel == Kernel.SPARSE24) | (w.kernel == Kernel.UNSTRUCTURED), w.density, 1.0) * weight
    return np.where((w.kind == Kind.GEMM) & (w.params > 0) & (np.abs(w.params - weight - w.n) < 0.5), w.n, 0.0)


def weights(w: Workload) -> Array:
    """Parameters of each row's executions, biases left out."""
    owned: Array = (w.params - biases(w)) * w.count
    return owned


def removed(before: float, after: float) -> float:
    """Fraction removed; 0 of nothing."""
    return max(0.0, 1.0 - after / before) if before > 0 else 0.0


def parameters_removed(w: Workload, out: Workload) -> float:
    """Fraction of the projections' weights that pruning removed."""
    return removed(*(float(weights(x)[projections(x)].sum()) for x in (w, out)))
