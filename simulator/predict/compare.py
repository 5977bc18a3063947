"""Speedups of many workloads at once: everything a comparison needs, as arrays with one entry a workload.

Use :func:`compare` for a stack on one device; :func:`simulator.speedups` is the same for one dense workload, as
objects. :func:`against` sets pruned workloads against each other: what two of them have in common cancels in their
ratio, which is surer than either speedup. What does not depend on the device is counted once for all of them, and a
shape that occurs several times is timed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import SECONDS, number
from simulator.arrays import FloatArray, IndexArray
from simulator.cost.forward import SECTIONS, section_of
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import Inferred, prediction_intervals
from simulator.workload import DTYPES
from simulator.workload_batch import WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

SAME_SHAPE = 0.99
"""Correlation of the errors of operators of which only the number changed: what a kernel's surroundings do is left."""


@dataclass(frozen=True)
class Comparison:
    """The numbers of :class:`~simulator.Speedup` of each workload of a stack; ``bottleneck`` is an index into
    ``BOUNDS``."""

    dense_s: FloatArray
    dense_lower: FloatArray  # intervals at the level asked for, as of the others
    dense_upper: FloatArray
    pruned_s: FloatArray
    pruned_lower: FloatArray
    pruned_upper: FloatArray
    speedup: FloatArray
    lower: FloatArray
    upper: FloatArray
    roofline_bound: FloatArray
    bottleneck: NDArray[Any]
    bottleneck_share: FloatArray
    calibrated: NDArray[np.bool_]
    tokens_per_s: FloatArray  # of the pruned, new ones, on all devices; NaN in prefill
    ttft_s: FloatArray  # NaN in decode
    tpot_s: FloatArray  # NaN in prefill
    dense_tokens_per_s: FloatArray
    dense_ttft_s: FloatArray
    dense_tpot_s: FloatArray


@dataclass(frozen=True)
class Pairs:
    """A stack and the index, within it, of the dense workload of each; counted once for all devices."""

    workloads: WorkloadBatch
    dense: IndexArray

    def ratio(self, totals: FloatArray) -> FloatArray:
        """Totals of the dense workloads over those of each."""
        out: FloatArray = totals[self.dense] / totals
        return out

    def bound(self, column: FloatArray) -> FloatArray:
        """Ratio of the sums of a column of the rows, dense to pruned, by workload; what pruning adds is left out."""
        return self.ratio(self.workloads.total(np.where(self.workloads.rows.overhead, 0.0, column)))

    @cached_property
    def flop_bound(self) -> FloatArray:
        """Ratio of FLOPs."""
        return self.bound(self.workloads.flops)

    @cached_property
    def byte_bound(self) -> FloatArray:
        """Ratio of bytes."""
        return self.bound(self.workloads.bytes)

    @cached_property
    def sections(self) -> dict[str, tuple[str, NDArray[np.bool_]]]:
        """Sections of a profile that are needed, the dtype of each, and the pairs that need it."""
        w, out = self.workloads.rows, {}
        for kind in SECTIONS:
            for latent in (False, True):
                rows = np.flatnonzero((w.kind == kind) & ((w.value_dim > 0) == latent))
                if len(rows):
                    has = np.bincount(self.workloads.owner[rows], minlength=len(self.workloads)) > 0
                    out[section_of(w, rows[0])] = DTYPES[w.dtype[rows[0]]], has | has[self.dense]
        return out


def compare(
    pairs: Pairs, hw: HardwareProfile, level: float = 0.9, dense_s: float | None = None
) -> tuple[Comparison, Inferred | None]:
    """Every workload of a stack against its dense one on one device; ``level`` is of the intervals. ``dense_s`` is a
    measured time of the first, which moves all, and what it implies is told. InputError for what cannot run."""
    p, dense = forward_passes(pairs.workloads, hw, level), pairs.dense
    roofline, calibrated = pairs.bound(p.ideal_s), np.ones(len(pairs.workloads), dtype=bool)
    for name, (dtype, has) in pairs.sections.items():
        if p.hw.section(name, dtype).status != "calibrated":
            calibrated &= ~has
    if dense_s is not None:
        number("dense_s", dense_s, SECONDS)
    found = prediction_intervals(p, level, dense, *_alike(dense, p), None if dense_s is None else (0, dense_s))
    times = found.seconds, found.lower, found.upper
    of_dense = (column[dense] for column in times)
    ratio = found.ratio, found.ratio_lower, found.ratio_upper
    tokens = _tokens(pairs, p, found.seconds)
    of_tokens = (column[dense] for column in tokens)
    columns: tuple[Any, ...] = (*of_dense, *times, *ratio, roofline, *p.bottleneck, calibrated, *tokens, *of_tokens)
    return Comparison(*columns), found.inferred


def against(
    workloads: WorkloadBatch, hw: HardwareProfile, others: Sequence[IndexArray], level: float = 0.9
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Log speedup (R, W) of every workload of a stack over R others of it, indices (W,) each, and how far below and
    above it its interval reaches."""
    p, every = forward_passes(workloads, hw, level), []
    for other in others:
        found = prediction_intervals(p, level, other, *_alike(other, p))
        middle = np.log(found.ratio)
        every.append((middle, middle - np.log(found.ratio_lower), np.log(found.ratio_upper) - middle))
    middle, below, above = (np.stack(part) for part in zip(*every))
    return middle, below, above


def _alike(other: IndexArray, p: PredictedPass) -> tuple[FloatArray, NDArray[np.bool_]]:
    """(W, G) how alike errors of groups are in another workload than each, and (W,) whether its host launches another
    mix."""
    groups, spent = p.workloads.groups, p.group_s
    each = spent / np.maximum(groups.count, 1e-300)
    alike = np.abs(each - each[other]) <= 1e-9 * each[other]
    untouched = np.abs(spent - spent[other]) <= 1e-9 * spent[other]
    same = np.where(untouched, 1.0, np.where(alike, SAME_SHAPE, 0.0))
    return same, ~(groups.count == groups.count[other]).all(axis=1)  # other kernels, or launched less often


def _tokens(pairs: Pairs, p: PredictedPass, seconds: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Of each workload: new tokens a second of all devices, time to the first token and for each further one, s; NaN
    where the phase has none. Of a serve, a request waits for a share of the other prompts before its first token, for
    the rest between its own."""
    meta, none = p.workloads.rows.meta, np.full(len(seconds), np.nan)
    sequences = none if p.workloads.sequences is None else p.workloads.sequences.astype(np.float64)
    prefill, decode = p.phase_s.T * (seconds / p.total_s)  # a measured time moves both alike
    if meta.phase == "prefill":
        return none, seconds, none
    if meta.phase == "decode":
        return sequences / seconds, none, seconds
    steps = float(meta.new_tokens)
    first = prefill
    if meta.phase == "serve":
        first = prefill / sequences * (1.0 + p.engine.prefill_wait.value * (sequences - 1.0))
    return sequences * steps / seconds, first, (prefill - first + decode) / steps


def known(column: Any) -> list[Any]:
    """Values of a column, None where it has none."""
    values: list[Any] = column.tolist()
    return [None if value != value else value for value in values] if column.dtype.kind == "f" else values
