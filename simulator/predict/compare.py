"""Speedups of many workloads at once: everything a comparison needs, as arrays with one entry a workload.

Use :func:`compare` for a stack on one device; :func:`simulator.speedups` is the same for one dense workload, as objects. What does not
depend on the device is counted once for all of them, and a shape that occurs several times is timed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.kernels.intervals import PAIR_REGIMES, pair_spread
from simulator.kernels.optime import BOUNDS
from simulator.kernels.stack import F, Rows, Stack
from simulator.kernels.stream import EAGER_KERNELS, eager_total, operator_times, segment_of
from simulator.workload import DTYPES, ROLES, RUNTIMES, Kind, Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

UNMATCHED_CORRELATION = 0.5
"""Correlation of the log errors of an operator that is no GEMM and its pruned neighbour; assumed, no paired residuals are kept for them."""

SAME_SHAPE_CORRELATION = 0.99
"""Correlation where only the number of equal operators changed: errors cancel but for what a kernel's surroundings do."""

HOST_SIGMA = 0.25
"""Log spread of the host's launch time, which no profile has measured: 5-25 us are seen around the default of 10."""

HOST_CORRELATION = 0.95
"""Correlation of that error between the dense and the pruned model: it is the same host, but not the same mix of operators."""

FEW_ROWS = 200
"""Rows below which looking for equal operators costs more than timing them twice."""

_SECTIONS = {
    Kind.GEMM: "gemm",
    Kind.PREFILL_ATTENTION: "attention_prefill",
    Kind.DECODE_ATTENTION: "attention_decode",
    Kind.ELEMENTWISE: "elementwise",
}
_HOST, _LAUNCH = BOUNDS.index("host"), BOUNDS.index("launch")


@dataclass(frozen=True)
class Comparison:
    """Each workload of a stack against its dense one on one device, arrays of one entry a workload; fields as in ``Speedup``.

    ``limit`` is an index into :data:`simulator.kernels.optime.BOUNDS`; ``dense_s`` and the bounds of a dense workload are its own and 1.
    """

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
    """A stack and the dense workload of each of its workloads; what does not depend on the device, counted once.

    Attributes
    ----------
    stack : Stack
    dense : intp array
        Index, within the stack, of the dense workload of each.
    """

    stack: Stack
    dense: Rows

    @cached_property
    def flops(self) -> F:
        """FLOPs of each row, all its executions; 0 for what pruning adds."""
        w = self.stack.rows
        return np.where(w.overhead, 0.0, w.flops)

    @cached_property
    def bytes(self) -> F:
        """Bytes of each row, all its executions; 0 for what pruning adds."""
        w = self.stack.rows
        return np.where(w.overhead, 0.0, w.bytes)

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
    def shapes(self) -> tuple[Workload, Rows]:
        """Different operators of the stack, and which of them each row is; of a few rows, each as it is."""
        rows = self.stack.rows
        return distinct(rows) if len(rows) >= FEW_ROWS else (rows, np.arange(len(rows)))

    @cached_property
    def groups(self) -> _Groups:
        """Rows of a workload that share phase, place in the pass, and role."""
        w = self.stack.rows
        code = (segment_of(w) * len(Kind) + w.kind) * len(ROLES) + w.role
        used = np.flatnonzero(np.bincount(code))
        place = np.zeros(int(used[-1]) + 1, dtype=np.int64)
        place[used] = np.arange(len(used))
        cell = self.stack.owner * len(used) + place[code]
        role, kind, segment = used % len(ROLES), used // len(ROLES) % len(Kind), used // (len(ROLES) * len(Kind))
        kernels = np.array([EAGER_KERNELS.get(ROLES[code], 1) for code in role], dtype=np.float64)
        passes = np.where(kind == Kind.ELEMENTWISE, kernels, 1.0)
        return _Groups(
            cell,
            len(used),
            segment,
            kernels,
            passes,
            _sums(cell, w.count, len(self.stack), len(used)),
            kind == Kind.GEMM,
        )

    @cached_property
    def octaves(self) -> F:
        """Distance of each GEMM role from its dense workload's, workload x group: |log2| of the ratios of m, n and k, added up."""
        w, groups = self.stack.rows, self.groups
        gemm = np.flatnonzero(groups.gemm[groups.cell % groups.number])
        times = np.maximum(groups.count, 1e-300)
        out = np.zeros(groups.count.shape)
        for size in (w.m, w.n, w.k):
            log = np.zeros(len(w))
            log[gemm] = np.log2(np.maximum(size[gemm], 1))
            mean = groups.sums(log * w.count, len(self.stack)) / times
            out += np.abs(mean - mean[self.dense])
        return out

    @cached_property
    def formats(self) -> tuple[tuple[int, int, NDArray[np.bool_]], ...]:
        """Kinds of operators that occur, the code of their dtype, and the workloads that have them."""
        w = self.stack.rows
        out = []
        number = len(self.stack)
        has = (
            np.bincount(w.kind.astype(np.intp) * number + self.stack.owner, minlength=len(Kind) * number).reshape(
                -1, number
            )
            > 0
        )
        for kind in _SECTIONS:
            if has[kind].any():
                first = int((w.kind == kind).argmax())
                out.append((int(kind), int(w.dtype[first]), has[kind] | has[kind][self.dense]))
        return tuple(out)


@dataclass(frozen=True)
class _Groups:
    cell: Rows  # of each row: workload x group
    number: int
    segment: Rows  # of each group: phase x 3 + segment
    kernels: F  # kernels an eager framework launches for one execution
    passes: F  # times it streams the data: an unfused elementwise operator once a kernel
    count: F  # workload x group: executions
    gemm: NDArray[np.bool_]  # of each group

    def sums(self, column: F, workloads: int) -> F:
        """Sums of a column of the rows, workload x group."""
        return _sums(self.cell, column, workloads, self.number)


def _sums(cell: Rows, column: F, workloads: int, number: int) -> F:
    out = np.bincount(cell, weights=column, minlength=workloads * number)
    return np.asarray(out, dtype=np.float64).reshape(workloads, number)


def distinct(w: Workload) -> tuple[Workload, Rows]:
    """Different operators of a workload as far as their time goes, and which of them each row is.

    >>> one = Workload.from_rows([{"role": "q", "m": 2, "n": 8, "k": 4}, {"role": "o", "m": 2, "n": 8, "k": 4, "count": 3}])
    >>> shapes, which = distinct(one)
    >>> len(shapes), which.tolist()
    (1, [0, 0])
    """
    gemm = w.kind == Kind.GEMM
    role = np.where(gemm, 0, w.role.astype(np.int64))
    small = w.kind.astype(np.int64)
    for column, many in ((role, len(ROLES)), (w.kernel, 8), (w.dtype, len(DTYPES)), (w.weight_dtype, len(DTYPES))):
        small = small * many + column
    columns = [small, w.m, w.n, w.k, w.batch, w.q_len, w.kv_len, w.heads, w.kv_heads, w.head_dim, w.window, w.block]
    columns += [c.view(np.int64) for c in (w.density, w.read_bytes, w.write_bytes)]
    key = np.zeros(len(w), dtype=np.uint64)
    for column in columns:  # a mixing hash: what it makes equal is checked below
        key ^= np.ascontiguousarray(column).view(np.uint64)
        key *= np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    if any((column[first][which] != column).any() for column in columns):  # two operators of one hash: time every row
        return w, np.arange(len(w))
    return w.take(first), which


def compare(
    pairs: Pairs, hw: HardwareProfile, runtimes: tuple[str, ...] = ("cuda_graph",), level: float = 0.9
) -> tuple[Comparison, ...]:
    """Every workload of a stack against its dense one on one device, under each runtime.

    Parameters
    ----------
    pairs : Pairs
    hw : HardwareProfile
    runtimes : tuple of {"cuda_graph", "eager"}
    level : float
        Level of the intervals.

    Returns
    -------
    tuple of Comparison
        One a runtime.

    Raises
    ------
    InputError
        For an unknown runtime, or operators the device cannot run.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise InputError(f"runtime {runtime!r} is unknown; expected {' or '.join(RUNTIMES)}")
    stack, groups = pairs.stack, pairs.groups
    shapes, which = pairs.shapes
    each = operator_times(shapes, hw, level)
    half = 0.5 * np.log(each.upper / np.maximum(each.lower, 1e-300))
    time = each.seconds[which] * stack.rows.count
    spent, error = groups.sums(time, len(stack)), groups.sums(time * half[which], len(stack))
    bound = stack.owner * len(BOUNDS) + each.bound[which]
    roofline = pairs.ratio(stack.total(_roofline(pairs, hw)))
    calibrated = np.ones(len(stack), dtype=bool)
    for kind, dtype, has in pairs.formats:
        if hw.section(_SECTIONS[Kind(kind)], DTYPES[dtype]).status != "calibrated":
            calibrated &= ~has
    section = hw.section("runtime", "*")
    paired = _pair_half_width(pairs, hw, level)
    out = []
    for runtime in runtimes:
        if runtime == "eager":
            row_passes = groups.passes[groups.cell % groups.number]
            seconds, wrong, by_bound = (
                spent * groups.passes,
                error * groups.passes,
                _by_bound(bound, time * row_passes, len(stack)),
            )
            total, host = eager_total(seconds, groups.count * groups.kernels * section["host_op_s"], groups.segment)
            host_bound = host > seconds.sum(axis=1)
        else:
            seconds, wrong, by_bound = spent, error, _by_bound(bound, time, len(stack))
            gap = section["graph_gap_s"] * groups.count.sum(axis=1)
            total, host_bound = seconds.sum(axis=1) + gap, np.zeros(len(stack), dtype=bool)
            by_bound[:, _LAUNCH] += gap
        sigma = _log_sigma(pairs, seconds, wrong, paired, host_bound, level)
        limit = np.where(host_bound, _HOST, by_bound.argmax(axis=1)).astype(np.int8)
        share = np.where(host_bound, 1.0, by_bound.max(axis=1) / by_bound.sum(axis=1))
        ratio, spread = pairs.ratio(total), np.exp(sigma)
        out.append(
            Comparison(
                total[pairs.dense], total, ratio, ratio / spread, ratio * spread, roofline, limit, share, calibrated
            )
        )
    return tuple(out)


def _by_bound(bound: Rows, time: F, workloads: int) -> F:
    """Time of each workload by the limit that holds it."""
    out = np.bincount(bound, weights=time, minlength=workloads * len(BOUNDS))
    return np.asarray(out, dtype=np.float64).reshape(workloads, len(BOUNDS))


def _roofline(pairs: Pairs, hw: HardwareProfile) -> F:
    """Datasheet roofline of every row, all its executions, if its kernel used every zero; 0 for what pruning adds."""
    w = pairs.stack.rows
    peak = np.array([hw.peak_flop_per_s(name) if name in hw.rates else np.inf for name in DTYPES])
    out: F = np.maximum(pairs.flops * (1.0 / peak)[w.dtype], pairs.bytes * (1.0 / hw.bandwidth_bytes_per_s))
    collective = w.kind == Kind.COLLECTIVE
    if collective.any():
        link = w.read_bytes * w.count / (hw.link.bandwidth_bytes_per_s if hw.link else np.inf)
        out = np.where(collective, np.where(w.overhead, 0.0, link), out)
    return out


def _pair_half_width(pairs: Pairs, hw: HardwareProfile, level: float) -> F:
    """Half width of the log error of a ratio of GEMM times, from paired residuals of the device's fit, workload x group."""
    dtype = next((code for kind, code, _ in pairs.formats if kind == Kind.GEMM), None)
    if dtype is None:
        return np.zeros(pairs.octaves.shape)
    section = hw.section("gemm", DTYPES[dtype])
    known = [interval.level for interval in section.intervals if interval.regime in PAIR_REGIMES]
    scale = NormalDist().inv_cdf(0.5 + 0.5 * level) / NormalDist().inv_cdf(0.5 + 0.5 * (known[0] if known else 0.9))
    out: F = np.asarray(pair_spread(section, pairs.octaves) * scale, dtype=np.float64)
    return out


def _log_sigma(pairs: Pairs, spent: F, error: F, paired: F, host: NDArray[np.bool_], level: float) -> F:
    """Half width of the log interval of the time of the dense workload over that of each.

    Errors of different roles are taken as independent and errors within a role as equal; what a pruned operator is less sure of than
    its dense one (a kernel that no table has measured) is one error for all of them. Errors of a role's dense and pruned shapes
    cancel: fully where nothing changed, by :data:`SAME_SHAPE_CORRELATION` where only their number did, for GEMMs whose shape changed
    as far as the paired residuals of the device's fit do (:func:`simulator.kernels.intervals.pair_spread`), and for other operators by
    :data:`UNMATCHED_CORRELATION`. So an operator that pruning leaves alone adds only through its changed share.
    """
    dense, count = pairs.dense, np.maximum(pairs.groups.count, 1e-300)
    own = error / np.maximum(spent, 1e-300)  # log half width, by group
    each = spent / count
    own_dense, each_dense, spent_dense = own[dense], each[dense], spent[dense]
    same = np.abs(each - each_dense) <= 1e-9 * each_dense
    untouched = np.abs(spent - spent_dense) <= 1e-9 * spent_dense
    common = np.where(own_dense > 0, np.minimum(own, own_dense), own)
    cancel = (common**2 + own_dense**2 - paired**2) / np.maximum(2.0 * common * own_dense, 1e-300)
    changed = np.where(pairs.groups.gemm, np.clip(cancel, 0.0, SAME_SHAPE_CORRELATION), UNMATCHED_CORRELATION)
    correlation = np.where(untouched, 1.0, np.where(same, SAME_SHAPE_CORRELATION, changed))
    part = spent / spent.sum(axis=1, keepdims=True)
    a, b = (own * part)[dense], common * part
    variance = (
        np.maximum((a * a + b * b - 2.0 * correlation * a * b).sum(axis=1), 0.0)
        + ((own - common) * part).sum(axis=1) ** 2
    )
    z = NormalDist().inv_cdf(
        0.5 + 0.5 * level
    )  # HOST_SIGMA is one standard deviation; the operators' half widths are already at the level
    alone = 2.0 * (1.0 - HOST_CORRELATION) * (HOST_SIGMA * z) ** 2
    base_host = host[dense]
    if host.any() or base_host.any():
        held = np.where(
            host & base_host, alone, np.where(host | base_host, variance + alone + (HOST_SIGMA * z / 2) ** 2, variance)
        )
        equal = (untouched & (pairs.groups.count == pairs.groups.count[dense])).all(
            axis=1
        )  # the same kernels launched as often
        variance = np.where(equal, variance, held)
    out: F = np.sqrt(variance)
    return out
