"""Speedups of many workloads at once: everything a comparison needs, as arrays with one entry a workload.

Use :func:`compare` for a stack on one device; :func:`simulator.speedups` is the same for one dense workload, as
objects. What does not depend on the device is counted once for all of them, and a shape that occurs several times is
timed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.kernels.spread import INDEX
from simulator.kernels.stack import F, Rows, Stack
from simulator.kernels.stream import Pass, passes
from simulator.workload import DTYPES, Kind

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

SAME_SHAPE = 0.99
"""Correlation of the errors of operators of which only the number changed: what a kernel's surroundings do is left."""

SAME_HOST = 0.97
"""Correlation of the error of the host's time between the dense and the pruned model: the same host, not the same mix
of operators."""

SECTIONS = {
    int(Kind.GEMM): "gemm",
    int(Kind.PREFILL_ATTENTION): "attention_prefill",
    int(Kind.DECODE_ATTENTION): "attention_decode",
    int(Kind.ELEMENTWISE): "elementwise",
}
"""Sections of a profile, by the kind of operator."""


@dataclass(frozen=True)
class Comparison:
    """The numbers of :class:`~simulator.Speedup` of each workload of a stack; ``limit`` is an index into ``BOUNDS``."""

    dense_s: F
    dense_lower: F  # intervals at the level asked for, as of the others
    dense_upper: F
    pruned_s: F
    pruned_lower: F
    pruned_upper: F
    speedup: F
    lower: F
    upper: F
    roofline_bound: F
    limit: NDArray[Any]
    limit_share: F
    calibrated: NDArray[np.bool_]


@dataclass(frozen=True)
class Pairs:
    """A stack and the index, within it, of the dense workload of each; counted once for all devices."""

    stack: Stack
    dense: Rows

    def ratio(self, totals: F) -> F:
        """Totals of the dense workloads over those of each."""
        out: F = totals[self.dense] / totals
        return out

    def bound(self, column: F) -> F:
        """Ratio of the sums of a column of the rows, dense to pruned, by workload; what pruning adds is left out."""
        return self.ratio(self.stack.total(np.where(self.stack.rows.overhead, 0.0, column)))

    @cached_property
    def flop_bound(self) -> F:
        """Ratio of FLOPs."""
        return self.bound(self.stack.flops)

    @cached_property
    def byte_bound(self) -> F:
        """Ratio of bytes."""
        return self.bound(self.stack.bytes)

    @cached_property
    def sections(self) -> dict[str, tuple[str, NDArray[np.bool_]]]:
        """Sections of a profile that are needed, the dtype of each, and the pairs that need it."""
        w, out = self.stack.rows, {}
        for kind, name in SECTIONS.items():
            rows = np.flatnonzero(w.kind == kind)
            if len(rows):
                has = np.bincount(self.stack.owner[rows], minlength=len(self.stack)) > 0
                out[name] = DTYPES[w.dtype[rows[0]]], has | has[self.dense]
        return out


def compare(
    pairs: Pairs, hw: HardwareProfile, runtimes: tuple[str, ...] = ("cuda_graph",), level: float = 0.9
) -> tuple[Comparison, ...]:
    """Every workload of a stack against its dense one on one device under each runtime; ``level`` is of the intervals.

    Raises
    ------
    InputError
        For an unknown runtime, or operators the device cannot run.
    """
    timed = passes(pairs.stack, hw, runtimes, level)
    roofline, calibrated = pairs.bound(timed[0].ideal_s), np.ones(len(pairs.stack), dtype=bool)
    for name, (dtype, has) in pairs.sections.items():
        if hw.section(name, dtype).status != "calibrated":
            calibrated &= ~has
    out, dense = [], pairs.dense
    for p in timed:
        doubt, total, ratio = p.doubt, p.total_s, pairs.ratio(p.total_s)
        width = np.exp(doubt.half(doubt.variance(), level))
        sure = np.exp(doubt.half(_ratio_variance(pairs, p), level))
        lower, upper = total / width, total * width
        times = total[dense], lower[dense], upper[dense], total, lower, upper, ratio, ratio / sure, ratio * sure
        out.append(Comparison(*times, roofline, *p.limit, calibrated))
    return tuple(out)


def _ratio_variance(pairs: Pairs, p: Pass) -> F:
    """Variance of the log of the time of the dense workload over that of each."""
    dense, groups, spent = pairs.dense, p.stack.groups, p.group_s
    each = spent / np.maximum(groups.count, 1e-300)
    alike = np.abs(each - each[dense]) <= 1e-9 * each[dense]
    untouched = np.abs(spent - spent[dense]) <= 1e-9 * spent[dense]
    out = p.doubt.ratio_variance(dense, np.where(untouched, 1.0, np.where(alike, SAME_SHAPE, 0.0)))
    host = p.doubt.shared[:, INDEX["host"]]
    other = ~(groups.count == groups.count[dense]).all(axis=1)  # other kernels, or launched less often
    return out + np.where(other, 2.0 * (1.0 - SAME_HOST) * host * host[dense], 0.0)
