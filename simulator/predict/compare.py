"""Speedups of many workloads at once: everything a comparison needs, as arrays with one entry a workload.

Use :func:`compare` for a stack on one device; :func:`simulator.speedups` is the same for one dense workload, as
objects. What does not depend on the device is counted once for all of them, and a shape that occurs several times is
timed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.kernels.intervals import pair_spread
from simulator.kernels.stack import F, Rows, Stack
from simulator.kernels.stream import Pass, passes
from simulator.workload import DTYPES, Kind

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

UNMATCHED_CORRELATION = 0.5
"""Correlation of the log errors of an operator that is no GEMM and its pruned neighbour; assumed, never measured."""

SAME_SHAPE_CORRELATION = 0.99
"""Correlation where only the number of equal operators changed: what a kernel's surroundings do is left."""

HOST_SIGMA = 0.25
"""Log spread of the host's launch time, which no profile has measured: 5-25 us are seen around the default of 10."""

HOST_CORRELATION = 0.95
"""Correlation of that error between the dense and the pruned model: the same host, not the same mix of operators."""

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
    pruned_s: F
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
    def octaves(self) -> F:
        """Distance of a group's GEMMs from the dense ones, workload x group: |log2| of the ratios of m, n, k, added."""
        w, groups = self.stack.rows, self.stack.groups
        gemm = np.flatnonzero(w.kind == Kind.GEMM)
        out = np.zeros(groups.count.shape)
        for size in (w.m, w.n, w.k):
            log = np.zeros(len(w))
            log[gemm] = np.log2(np.maximum(size[gemm], 1))
            mean = groups.sums(log * w.count) / np.maximum(groups.count, 1e-300)
            out += np.abs(mean - mean[self.dense])
        return out

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
    paired = np.zeros(timed[0].group_s.shape)
    if "gemm" in pairs.sections:
        paired = pair_spread(hw.section("gemm", pairs.sections["gemm"][0]), pairs.octaves, level)
    out = []
    for p in timed:
        ratio, width = pairs.ratio(p.total_s), np.exp(_log_sigma(pairs, p, paired, level))
        times = p.total_s[pairs.dense], p.total_s, ratio, ratio / width, ratio * width
        out.append(Comparison(*times, roofline, *p.limit, calibrated))
    return tuple(out)


def _log_sigma(pairs: Pairs, p: Pass, paired: F, level: float) -> F:
    """Half width of the log interval of the time of the dense workload over that of each.

    Errors of different roles are taken as independent and errors within a role as equal; what a pruned operator is less
    sure of than its dense one (a kernel that no table has measured) is one error for all of them. Errors of a role's
    dense and pruned shapes cancel: fully where nothing changed, by :data:`SAME_SHAPE_CORRELATION` where only their
    number did, for GEMMs whose shape changed as far as the paired residuals of the device's fit do
    (:func:`simulator.kernels.intervals.pair_spread`), and for other operators by :data:`UNMATCHED_CORRELATION`. So an
    operator that pruning leaves alone adds only through its changed share.
    """
    dense, groups, spent, host = pairs.dense, p.stack.groups, p.group_s, p.host_bound
    count = np.maximum(groups.count, 1e-300)
    own, each = (
        p.group_error_s / np.maximum(spent, 1e-300),
        spent / count,
    )  # log half width and time of one execution, by group
    own_dense, each_dense, spent_dense = own[dense], each[dense], spent[dense]
    same = np.abs(each - each_dense) <= 1e-9 * each_dense
    untouched = np.abs(spent - spent_dense) <= 1e-9 * spent_dense
    common = np.where(own_dense > 0, np.minimum(own, own_dense), own)
    cancel = (common**2 + own_dense**2 - paired**2) / np.maximum(2.0 * common * own_dense, 1e-300)
    changed = np.where(groups.gemm, np.clip(cancel, 0.0, SAME_SHAPE_CORRELATION), UNMATCHED_CORRELATION)
    correlation = np.where(untouched, 1.0, np.where(same, SAME_SHAPE_CORRELATION, changed))
    part = spent / spent.sum(axis=1, keepdims=True)
    a, b = (own * part)[dense], common * part
    ratio = np.maximum((a * a + b * b - 2.0 * correlation * a * b).sum(axis=1), 0.0)
    variance = ratio + ((own - common) * part).sum(axis=1) ** 2
    # HOST_SIGMA is one standard deviation; the operators' half widths are already at the level
    host_half = HOST_SIGMA * NormalDist().inv_cdf(0.5 + 0.5 * level)
    alone = 2.0 * (1.0 - HOST_CORRELATION) * host_half**2
    one = host | host[dense]
    held = np.where(host & host[dense], alone, np.where(one, variance + alone + (host_half / 2) ** 2, variance))
    equal = (untouched & (groups.count == groups.count[dense])).all(axis=1)  # the same kernels launched as often
    out: F = np.sqrt(np.where(equal, variance, held))
    return out
