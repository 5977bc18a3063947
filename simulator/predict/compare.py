"""Speedups of many workloads at once: everything a comparison needs, as arrays with one entry a workload.

Use :func:`compare` for a stack on one device; :func:`simulator.speedups` is the same for one dense workload, as
objects. What does not depend on the device is counted once for all of them, and a shape that occurs several times is
timed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.kernels.intervals import BOUNDS, pair_spread
from simulator.kernels.stack import F, Rows, Stack
from simulator.kernels.stream import check_runtime, eager_kernels, operator_times, peaks, segment_of, stream_time
from simulator.workload import DTYPES, ROLES, Kind

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
_HOST, _LAUNCH = BOUNDS.index("host"), BOUNDS.index("launch")


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
class _Groups:
    """Rows of a workload that share phase, place in the pass, kind and role."""

    cell: Rows  # of each row: workload x group
    segment: Rows  # of each group, as the following
    gemm: NDArray[np.bool_]
    kernels: F  # that an eager framework launches for one execution
    passes: F  # times it streams the data
    count: F  # workload x group: executions

    def sums(self, column: F) -> F:
        """Sums of a column of the rows, workload x group."""
        return _sums(self.cell, column, self.count.shape)


@dataclass(frozen=True)
class Pairs:
    """A stack and the index, within it, of the dense workload of each; counted once for all devices."""

    stack: Stack
    dense: Rows

    @cached_property
    def flops(self) -> F:
        """FLOPs of each row, all its executions; 0 for what pruning adds."""
        return np.where(self.stack.rows.overhead, 0.0, self.stack.rows.flops)

    @cached_property
    def bytes(self) -> F:
        """Bytes of each row, all its executions; 0 for what pruning adds."""
        return np.where(self.stack.rows.overhead, 0.0, self.stack.rows.bytes)

    @cached_property
    def flop_bound(self) -> F:
        """Ratio of FLOPs, dense to pruned, by workload."""
        return self.ratio(self.stack.total(self.flops))

    @cached_property
    def byte_bound(self) -> F:
        """Ratio of bytes, dense to pruned, by workload."""
        return self.ratio(self.stack.total(self.bytes))

    def ratio(self, totals: F) -> F:
        """Totals of the dense workloads over those of each."""
        out: F = totals[self.dense] / totals
        return out

    @cached_property
    def groups(self) -> _Groups:
        """The groups of rows that share an error."""
        w = self.stack.rows
        code = (segment_of(w) * len(Kind) + w.kind) * len(ROLES) + w.role
        occurs = np.bincount(code) > 0
        used = np.flatnonzero(occurs)
        cell = self.stack.owner * len(used) + (np.cumsum(occurs) - 1)[code]
        place, role = np.divmod(used, len(ROLES))
        segment, kind = np.divmod(place, len(Kind))
        count = _sums(cell, w.count, (len(self.stack), len(used)))
        return _Groups(cell, segment, kind == Kind.GEMM, *eager_kernels(kind, role), count)

    @cached_property
    def octaves(self) -> F:
        """Distance of a group's GEMMs from the dense ones, workload x group: |log2| of the ratios of m, n, k, added."""
        w, groups = self.stack.rows, self.groups
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


def _sums(cell: Rows, column: F, shape: tuple[int, ...]) -> F:
    """Sums of a column by cell of a table."""
    out = np.bincount(cell, weights=column, minlength=math.prod(shape))
    return np.asarray(out, dtype=np.float64).reshape(shape)


def compare(
    pairs: Pairs, hw: HardwareProfile, runtimes: tuple[str, ...] = ("cuda_graph",), level: float = 0.9
) -> tuple[Comparison, ...]:
    """Every workload of a stack against its dense one on one device under each runtime; ``level`` is of the intervals.

    Raises
    ------
    InputError
        For an unknown runtime, or operators the device cannot run.
    """
    for runtime in runtimes:
        check_runtime(runtime)
    stack, groups = pairs.stack, pairs.groups
    shapes, which = stack.shapes
    each = operator_times(shapes, hw, level)
    half = 0.5 * np.log(each.upper / np.maximum(each.lower, 1e-300))
    time = each.seconds[which] * stack.rows.count
    spent, error = groups.sums(time), groups.sums(time * half[which])
    bound, bounds = stack.owner * len(BOUNDS) + each.bound[which], (len(stack), len(BOUNDS))
    roofline = pairs.ratio(stack.total(_roofline(pairs, hw)))
    calibrated = np.ones(len(stack), dtype=bool)
    for name, (dtype, has) in pairs.sections.items():
        if hw.section(name, dtype).status != "calibrated":
            calibrated &= ~has
    paired = np.zeros(spent.shape)
    if "gemm" in pairs.sections:
        paired = pair_spread(hw.section("gemm", pairs.sections["gemm"][0]), pairs.octaves, level)
    host = groups.count * groups.kernels * hw.section("runtime", "*")["host_op_s"]
    launches, out = groups.count.sum(axis=1), []
    for runtime in runtimes:
        passes = groups.passes if runtime == "eager" else np.ones(len(groups.passes))
        seconds, wrong = spent * passes, error * passes
        stream = stream_time(runtime, hw, seconds, host, groups.segment, launches, seconds.sum(axis=1))
        total, host_bound = stream.total_s, stream.host_bound
        held = _sums(bound, time * passes[groups.cell % len(passes)], bounds)
        held[:, _LAUNCH] += stream.gap_s
        limit = np.where(host_bound, _HOST, held.argmax(axis=1)).astype(np.int8)
        share = np.where(host_bound, 1.0, held.max(axis=1) / held.sum(axis=1))
        ratio, width = pairs.ratio(total), np.exp(_log_sigma(pairs, seconds, wrong, paired, host_bound, level))
        times = total[pairs.dense], total, ratio, ratio / width, ratio * width
        out.append(Comparison(*times, roofline, limit, share, calibrated))
    return tuple(out)


def _roofline(pairs: Pairs, hw: HardwareProfile) -> F:
    """Datasheet roofline of every row, all its executions, if its kernel used every zero; 0 for what pruning adds."""
    w = pairs.stack.rows
    out: F = np.maximum(pairs.flops * (1.0 / peaks(hw))[w.dtype], pairs.bytes * (1.0 / hw.bandwidth_bytes_per_s))
    link = w.read_bytes * w.count / (hw.link.bandwidth_bytes_per_s if hw.link else np.inf)
    return np.where((w.kind == Kind.COLLECTIVE) & ~w.overhead, link, out)


def _log_sigma(pairs: Pairs, spent: F, error: F, paired: F, host: NDArray[np.bool_], level: float) -> F:
    """Half width of the log interval of the time of the dense workload over that of each.

    Errors of different roles are taken as independent and errors within a role as equal; what a pruned operator is less
    sure of than its dense one (a kernel that no table has measured) is one error for all of them. Errors of a role's
    dense and pruned shapes cancel: fully where nothing changed, by :data:`SAME_SHAPE_CORRELATION` where only their
    number did, for GEMMs whose shape changed as far as the paired residuals of the device's fit do
    (:func:`simulator.kernels.intervals.pair_spread`), and for other operators by :data:`UNMATCHED_CORRELATION`. So an
    operator that pruning leaves alone adds only through its changed share.
    """
    dense, groups, count = pairs.dense, pairs.groups, np.maximum(pairs.groups.count, 1e-300)
    own, each = error / np.maximum(spent, 1e-300), spent / count  # log half width and time of one execution, by group
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
