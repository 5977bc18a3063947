"""Errors of forward passes and of their ratios. W are workloads, G groups of operators with one
error, c error factors.

The log error of a pass is the sum of the log errors of its operators, weighted by their share of
the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from simulator.arguments import instance
from simulator.arrays import Array, BoolArray, CodeArray, FloatArray, IndexArray
from simulator.codes import COLLECTIVE, Kernel
from simulator.engines.engine import Engine, load_engine
from simulator.errors import InputError
from simulator.hardware.profile import EngineTimes, HardwareProfile
from simulator.operators import BY_CODE
from simulator.operators.base import BOTTLENECKS
from simulator.passes import (
    Host,
    engine_factors,
    estimates,
    gaps,
    launches,
    measured_engine,
    refusal,
    streams,
)
from simulator.power import CAP_LOG_SD, Power, Work
from simulator.uncertainty.factors import (
    COVERAGE_FACTOR,
    ERROR_FACTORS,
    FACTOR_INDEX,
    Uncertainty,
    correlation,
    in_order,
    level_scale,
)
from simulator.uncertainty.operators import (
    TIMES,
    OperatorTimes,
    empty_times,
    most_likely,
    operator_time,
)
from simulator.workload import Workload, WorkloadBatch, sums

_HOST, _LAUNCH, _COMPUTE = map(BOTTLENECKS.index, ("host", "launch", "compute"))
_BLOCK_SPARSE = int(Kernel.BLOCK_SPARSE)
_LEAST_SLOWER = 1e-9  # log, where a power limit binds and slows no kernel
_CHUNK = 64  # few enough for the second-level cache

Errors = list[tuple[Any, Uncertainty]]
"""Rows of a workload, and the errors of their times."""


def operator_times(
    w: Workload, hw: HardwareProfile, level: float = 0.9, engine: Engine | None = None
) -> OperatorTimes:
    """Return the time of one execution of every row. With an ``engine``, times of GEMMs include
    :func:`simulator.passes.engine_factors`."""
    columns = empty_times(len(w))
    for rows, e in estimates(w, w.operators(), hw):
        times = operator_time(e, hw, level)
        for name in TIMES:
            columns[name][rows] = getattr(times, name)
    if engine is not None:
        factor = engine_factors(
            w, hw, engine, columns["seconds"], columns["roofline_s"], columns["bottleneck"]
        )
        for name in ("seconds", "lower", "upper"):
            columns[name] = columns[name] * factor
    return OperatorTimes(**columns)


@dataclass(frozen=True)
class PredictedPass:
    """Forward passes of a batch of workloads on a device in an engine, s, with the errors of their
    operators. Times of rows and groups include all executions, and all kernels of an operator that
    is not fused."""

    workloads: WorkloadBatch
    hw: HardwareProfile  # as the engine uses it
    engine: Engine
    bottleneck_of_row: Array  # code
    streams: FloatArray  # how often each row's kernels stream its data
    row_s: FloatArray  # on the device
    group_s: FloatArray  # (W, G) sums of the rows and of the gaps
    group_gap_s: FloatArray  # (W, G) between the kernels, idle or the host's
    host: Host
    errors: Errors  # errors of one execution of the main kernel of each distinct shape of the batch
    level: float  # level of the intervals of :attr:`time`
    # (W,) log of the time under a power limit over the time without; None without a limit
    slower: FloatArray | None = None

    @property
    def gap_s(self) -> FloatArray:
        """Time (W,) between the kernels."""
        return np.asarray(self.group_gap_s.sum(axis=1))

    @cached_property
    def device_s(self) -> FloatArray:
        """Time (W,) of the kernels and gaps."""
        return np.asarray(self.group_s.sum(axis=1))

    def at(self, work: Any, passes: Any) -> tuple[FloatArray, FloatArray]:
        """Return the time (..., W) on hosts (...) that are ``work`` and ``passes`` standard
        deviations slower than the typical host, and the share of the time that follows the
        device."""
        total, shown = self.host.total(self.group_s, self.workloads.groups.segment, work, passes)
        total = total.sum(axis=-1)
        return total, shown.sum(axis=-1) / np.maximum(total, 1e-300)

    @cached_property
    def _typical(self) -> tuple[FloatArray, FloatArray]:
        """Time by phase on the typical host, and the time that follows the device."""
        return self.host.total(self.group_s, self.workloads.groups.segment)

    @property
    def phase_s(self) -> FloatArray:
        """Time (W, 2) by phase, prefill and decode."""
        return self._typical[0]

    @cached_property
    def total_s(self) -> FloatArray:
        return np.asarray(self.phase_s.sum(axis=1))

    @property
    def host_s(self) -> FloatArray:
        """Time (W,) of the host to launch and to schedule, hidden time included."""
        return np.asarray(sum(self.host.spent()))

    @cached_property
    def device_share(self) -> FloatArray:
        """Share (W,) of the time that follows the device."""
        return np.asarray(self._typical[1].sum(axis=1) / np.maximum(self.total_s, 1e-300))

    @cached_property
    def work(self) -> Work:
        """What the passes do on one device, by phase."""
        return Work.of(self.workloads, self.hw, self.row_s, self.bottleneck_of_row, self.phase_s)

    def cap_variances(self, other: IndexArray) -> tuple[FloatArray, FloatArray]:
        """Return the variances (W,) that a power limit adds to the logs of times, and of their
        ratios to the times of passes ``other``: half of what the limit changes, and where it binds
        at least 15 % at 90 % (assumed)."""
        if self.slower is None:
            none = np.zeros(len(self.workloads))
            return none, none
        least = np.where(self.slower > 0.0, CAP_LOG_SD, 0.0)
        change = self.slower - self.slower[other]
        return np.maximum(least, 0.5 * self.slower) ** 2, (0.5 * change) ** 2

    @property
    def ideal_s(self) -> FloatArray:
        """Datasheet roofline of each row if its kernel used every zero; for a collective, that of
        its link."""
        w = self.workloads.rows
        hw = self.hw.over(self.workloads.rows.meta.link)
        # formats that the device does not compute in have no arithmetic time
        compute_s = self.workloads.flops * hw.flop_s[w.dtype]
        out = np.maximum(compute_s, self.workloads.bytes * (1.0 / hw.bandwidth_bytes_per_s))
        between = w.kind == COLLECTIVE
        if hw.link is None or not np.count_nonzero(between):
            return out
        return np.where(
            between,
            w.read_bytes * w.count / hw.link.between(w.meta.devices).bandwidth_bytes_per_s,
            out,
        )

    @property
    def host_bound(self) -> BoolArray:
        """Whether the host takes most of the time (W,)."""
        return self.device_share < 0.5

    def bottleneck(self, device_share: FloatArray) -> tuple[CodeArray, FloatArray]:
        """Return codes (W,) of the bottlenecks with the largest share of the time, and these
        shares; ``device_share`` (W,) follows the device."""
        cell = self.workloads.owner * len(BOTTLENECKS) + self.bottleneck_of_row
        share = sums(cell, self.row_s, (len(self.workloads), len(BOTTLENECKS)))
        share[:, _LAUNCH] += self.gap_s
        share *= (device_share / np.maximum(share.sum(axis=1), 1e-300))[:, None]
        share[:, _HOST] += 1.0 - device_share
        return share.argmax(axis=1).astype(np.int8), share.max(axis=1)

    @cached_property
    def time(self) -> OperatorTimes:
        """One execution of each row; the roofline is that of a fused kernel."""
        shapes, which = self.workloads.shapes
        each = operator_times(shapes, self.hw, self.level, self.engine)
        of_row = {name: getattr(each, name)[which] for name in TIMES}
        return OperatorTimes(
            **of_row | {name: of_row[name] * self.streams for name in ("seconds", "lower", "upper")}
        )

    @cached_property
    def share(self) -> FloatArray:
        """Share of each row in the time of its pass on the device."""
        return self.row_s / np.maximum(self.device_s, 1e-300)[self.workloads.owner]

    @cached_property
    def uncertainty(self) -> PassUncertainty:
        groups, (shapes, which) = self.workloads.groups, self.workloads.shapes
        share = self.share
        each = in_order(self.errors, len(shapes))
        independent, whole = self._independent(each)
        time = np.maximum(groups.sums(share), 1e-300)
        centre = np.array([groups.sums(share * axis[which]) / time for axis in each.coordinates.T])
        return PassUncertainty(
            systematic=self._systematic(each),
            correlated=groups.sums(share * each.correlated[which]),
            independent=independent,
            whole=whole,
            coordinates=centre.transpose(1, 2, 0),
            kind=groups.kind,
        )

    def _systematic(self, each: Uncertainty) -> Array:
        """Return the systematic errors (W, c) of the passes."""
        workloads = self.workloads
        which = self.workloads.shapes[1]
        systematic = np.zeros((len(workloads), len(ERROR_FACTORS)))
        of_row = np.add.reduceat(self.share * each.systematic[:, which], workloads.starts, axis=1)
        systematic[:, [FACTOR_INDEX[name] for name in each.factors]] = of_row.T
        systematic[:, FACTOR_INDEX["machine launch"]] += (
            ERROR_FACTORS["machine launch"] * self.gap_s / np.maximum(self.device_s, 1e-300)
        )
        return systematic

    def _independent(self, each: Uncertainty) -> tuple[Array, Array]:
        """Return the standard deviations (W, G) of the independent and of the whole errors. Those
        of operators of several kernels without measured times, and of the gaps between these
        kernels, are added."""
        w = self.workloads.rows
        groups = self.workloads.groups
        which = self.workloads.shapes[1]
        composed = w.overhead | (w.is_attention & (w.kernel == _BLOCK_SPARSE))
        variance: Any = 0.0
        gaps: Any = 0.0
        if np.count_nonzero(composed):
            sd = self.engine.composed_log_sd.value
            variance = composed * sd**2
            part = groups.sums(self.row_s * composed) / np.maximum(groups.sums(self.row_s), 1e-300)
            device = np.maximum(self.device_s, 1e-300)[:, None]
            gaps = sd * part * self.group_gap_s / device
        independent, whole = (
            groups.sums(self.share * np.sqrt(of_shape[which] + variance)) + gaps
            for of_shape in (each.independent, each.variance)
        )
        return independent, whole


def forward_passes(
    workloads: WorkloadBatch, hw: HardwareProfile, level: float = 0.9
) -> PredictedPass:
    """Return the passes of a batch in the engine of its workloads. In a large batch, equal
    operators are timed once.

    InputError for a batch that the device or the engine cannot run."""
    instance("hw", hw, HardwareProfile, "load_hardware")
    engine = load_engine(workloads.rows.meta.engine)
    if reason := refusal(workloads, hw.architecture):
        raise InputError(reason)
    engine, measured = measured_engine(engine, hw)
    hw = engine.serving(hw, measured is not None)
    each, errors = _shape_times(workloads, hw, engine, measured)
    which = workloads.shapes[1]
    launched = launches(workloads, engine)
    streamed = streams(workloads, engine, hw)
    gap = gaps(workloads, engine, hw, launched)
    row_s = each["seconds"][which] * workloads.rows.count * streamed
    p = PredictedPass(
        workloads=workloads,
        hw=hw,
        engine=engine,
        bottleneck_of_row=each["bottleneck"][which],
        streams=streamed,
        row_s=row_s,
        group_s=workloads.groups.sums(row_s) + gap,
        group_gap_s=gap,
        host=Host.of(
            workloads,
            engine,
            hw,
            launched,
            hw.section("runtime", "*")["host_op_s"],
            ERROR_FACTORS["host"],
        ),
        errors=errors,
        level=level,
    )
    limit = workloads.rows.meta.asked.power_limit
    return p if limit is None else _under(p, limit)


def _under(p: PredictedPass, limit: float) -> PredictedPass:
    """Return passes on devices with a lower power limit."""
    rows = p.workloads.rows
    bound, every = Power.of(p.hw, limit).slowed(p.work, p.hw.power_w)
    place = p.workloads.owner, rows.phase
    factor = np.where(p.bottleneck_of_row == _COMPUTE, bound[place], every[place])
    row_s = p.row_s * factor
    group_s = p.workloads.groups.sums(row_s) + p.group_gap_s
    slowed = replace(p, row_s=row_s, group_s=group_s)
    binds = np.where((bound > 1.0).any(axis=1), _LEAST_SLOWER, 0.0)
    return replace(slowed, slower=np.maximum(np.log(slowed.total_s / p.total_s), binds))


def _shape_times(
    workloads: WorkloadBatch, hw: HardwareProfile, engine: Engine, measured: EngineTimes | None
) -> tuple[Mapping[str, Array], Errors]:
    """Return the columns ``seconds``, ``roofline_s`` and ``bottleneck`` of one execution of each
    distinct shape of a batch, without intervals, and the errors."""
    shapes = workloads.shapes[0]
    each = empty_times(len(shapes))
    errors: Errors = []
    for rows, e in estimates(shapes, workloads.distinct, hw):
        each["seconds"][rows], uncertainty = most_likely(e, hw)
        times = None if measured is None else measured.operators.get(BY_CODE[e.kind].name)
        if times is not None:
            variance = uncertainty.independent + times.log_sd**2
            uncertainty = replace(uncertainty, independent=variance)
        each["roofline_s"][rows], each["bottleneck"][rows] = e.unit_s * e.roofline, e.bottleneck
        errors.append((rows, uncertainty))
    each["seconds"] *= engine_factors(
        shapes, hw, engine, each["seconds"], each["roofline_s"], each["bottleneck"]
    )
    return each, errors


@dataclass(frozen=True)
class PassUncertainty:
    """Errors of the logs of W total times, sums over G groups of operators. All fields but ``kind``
    are weighted by share of the time."""

    systematic: Array  # (W, c) of ERROR_FACTORS
    correlated: Array  # (W, G)
    independent: Array  # (W, G) standard deviations
    whole: Array  # (W, G) standard deviations of a group's total error
    coordinates: Array  # (W, G, 3)
    kind: IndexArray  # (G,)

    def _correlated(self, a: Any, b: Any) -> Array:
        """Covariance (n,) of the correlated errors of passes ``a`` and ``b``, n indices each."""
        out = np.zeros(len(a))
        for kind in sorted(set(self.kind.tolist())):
            groups = np.flatnonzero(self.kind == kind)
            sd = self.correlated[:, groups]
            place = self.coordinates[:, groups]
            for first in range(0, len(out), _CHUNK):
                i = a[first : first + _CHUNK]
                j = b[first : first + _CHUNK]
                near = correlation(place[i], place[j])
                out[first : first + _CHUNK] += ((sd[i][:, None] @ near)[:, 0] * sd[j]).sum(axis=1)
        return out

    def covariance(
        self, systematic: Array, correlated: Array, coordinates: Array, kind: IndexArray
    ) -> Array:
        """Return the covariance (W, n) with the errors of n times of operators."""
        out = self.systematic @ systematic.T
        for group, of_group in enumerate(self.kind):
            same_kind = correlated * (kind == of_group)
            if self.correlated[:, group].any() and same_kind.any():
                near = correlation(self.coordinates[:, group], coordinates)
                out += near * self.correlated[:, group, None] * same_kind
        return np.asarray(out)

    def variance(self) -> Array:
        """Return the variances (W,) of the logs of the times."""
        every = np.arange(len(self.correlated))
        return self._variance(self._correlated(every, every))

    def _variance(self, correlated: Array) -> Array:
        systematic = (self.systematic * self.systematic).sum(axis=1)
        return np.asarray(
            systematic + correlated + (self.independent * self.independent).sum(axis=1)
        )

    def variances(self, other: IndexArray, same: Array) -> tuple[Array, Array]:
        """Return the variances (W,) of the log of each time, and of the log of its ratio to the
        time of pass ``other`` (W,). ``same`` (W, G) is 1 where a group is the same in both passes,
        below 1 where only the number of executions changed, and 0 where the shape changed."""
        every = np.arange(len(self.correlated))
        pairs = (other != every).nonzero()[0]
        correlations = self._correlated(
            np.concatenate([every, other[pairs]]), np.concatenate([every, pairs])
        )
        alone = correlations[: len(every)]
        covariance = correlations[: len(every)].copy()
        covariance[pairs] = correlations[len(every) :]
        systematic = self.systematic[other] - self.systematic
        correlated = np.maximum(alone[other] + alone - 2.0 * covariance, 0.0)
        dense = self.independent[other]
        covered = same > 0.0
        independent = (
            dense * dense
            + self.independent * self.independent
            - 2.0 * covered * dense * self.independent
        )
        apart = 2.0 * np.where(covered, 1.0 - same, 0.0) * self.whole[other] * self.whole
        variance = (
            (systematic * systematic).sum(axis=1)
            + correlated
            + np.maximum(independent, 0.0).sum(axis=1)
        )
        return self._variance(alone), variance + apart.sum(axis=1)

    def half(self, variance: Array, level: float) -> Array:
        return COVERAGE_FACTOR * level_scale(level) * np.sqrt(variance)


def ratio_half(a: Uncertainty, b: Uncertainty, level: float = 0.9) -> Array:
    """Return the log half-width (n,) of ratios of times of one kind of operator at two shapes."""
    both = Uncertainty.joined([a, b])
    passes = PassUncertainty(
        systematic=both.wide(),
        correlated=both.correlated[:, None],
        independent=np.sqrt(both.independent)[:, None],
        whole=np.sqrt(np.concatenate([a.variance, b.variance]))[:, None],
        coordinates=both.coordinates[:, None],
        kind=np.array([a.kind]),
    )
    size = len(a.independent)
    other = np.roll(np.arange(2 * size), size)
    return passes.half(passes.variances(other, np.zeros((2 * size, 1)))[1][:size], level)
