"""Find rows of a workload, and count their weights."""

from __future__ import annotations

import numpy as np

from simulator.arrays import Array
from simulator.codes import Kernel, Kind
from simulator.pruning._family import PROJECTIONS, WHOLE
from simulator.workload import Workload


def layer_count(w: Workload) -> int:
    """Return the number of layers in the rows, fewer than the model's after depth pruning."""
    return int((w.layer + w.layers).max(initial=0))


def projections(w: Workload, *names: str) -> Array:
    """Return a mask of projections in the layers; without names, of all seven."""
    mask: Array = w.is_role(*(names or PROJECTIONS)) & (w.layer >= 0)
    return mask


def weighted(w: Workload) -> Array:
    """Return a mask of all weights in the layers: projections, latent attention, linear sublayers, experts."""
    mask: Array = w.is_role(*PROJECTIONS, *WHOLE, "linear") & (w.layer >= 0)
    return mask


def zeros(w: Workload) -> Array:
    """Return a mask of rows with zeros or blocks in their weights; rows that only skip tokens have none."""
    mask: Array = (w.kernel != Kernel.DENSE) & ~((w.kernel == Kernel.BLOCK_SPARSE) & (w.block == 0))
    return mask


def writers(w: Workload, *names: str) -> Array:
    """Return a mask of projections with the N of the model: all except first factors of low-rank pairs."""
    mask: Array = projections(w, *names) & (w.stage != 1)
    return mask


def readers(w: Workload, *names: str) -> Array:
    """Return a mask of projections with the K of the model: all except second factors of low-rank pairs."""
    mask: Array = projections(w, *names) & (w.stage != 2)
    return mask


def covering(w: Workload, mask: Array, values: Array) -> Array:
    """Return, for every row, the value of the masked row that covers its first layer, else 0."""
    at = np.flatnonzero(mask)
    if not len(at):
        return np.zeros(len(w), dtype=values.dtype)
    at = at[np.argsort(w.layer[at], kind="stable")]
    place = np.searchsorted(w.layer[at], w.layer, side="right") - 1
    return np.where((place >= 0) & (w.layer >= 0), values[at[np.maximum(place, 0)]], 0)


def shorter_copies(w: Workload, out: Workload) -> Workload:
    """Return ``out`` with cache copies as long as its decode attention; ``w`` is the workload before pruning."""
    copies = w.is_role("cache_write") & (w.kv_len > 0)
    if not copies.any():
        return out
    before, after = (covering(x, x.kind == Kind.DECODE_ATTENTION, x.kv_len.astype(np.float64)) for x in (w, out))
    share = np.where(copies & (before > 0), after / np.maximum(before, 1.0), 1.0)
    kept = np.where(copies, np.maximum(np.round(w.kv_len * share), 1), out.kv_len)
    return out.replace(kv_len=kept, read_bytes=out.read_bytes * share, write_bytes=out.write_bytes * share)


def biases(w: Workload) -> Array:
    """Return the bias parameters per execution of GEMM rows that own a bias."""
    weight: Array = w.n.astype(np.float64) * w.k
    if np.count_nonzero(w.kernel):
        weight = np.where((w.kernel == Kernel.SPARSE24) | (w.kernel == Kernel.UNSTRUCTURED), w.density, 1.0) * weight
    owns = (w.kind == Kind.GEMM) & (w.params > 0) & (np.abs(w.params * w.repeats - weight - w.n) < 0.5)
    return np.where(owns, w.n / w.repeats, 0.0)


def weights(w: Workload) -> Array:
    """Return the parameters of all executions of each row, without biases."""
    owned: Array = (w.params - biases(w)) * w.count
    return owned


def removed(before: float, after: float) -> float:
    """Return the fraction removed, 0 if there was nothing before."""
    return max(0.0, 1.0 - after / before) if before > 0 else 0.0


def parameters_removed(w: Workload, out: Workload) -> float:
    """Return the fraction of weights in the layers that pruning removed."""
    return removed(*(float(weights(x)[weighted(x)].sum()) for x in (w, out)))
