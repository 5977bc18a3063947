"""Errors of forward passes and of their ratios. W are workloads, G groups of operators with one
error, c error factors.

The log error of a pass is the sum of the log errors of its operators, weighted by their share of
the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import instance
from simulator.arrays import Array
from simulator.codes import Kernel
from simulator.engines.engine import Engine, load_engine
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.operators import BY_CODE
from simulator.passes import (
    ForwardPass,
    Host,
    engine_factors,
    estimates,
    gaps,
    launches,
    measured_engine,
    refusal,
    streams,
)
from simulator.uncertainty.factors import (
    COVERAGE_FACTOR,
    ERROR_FACTORS,
    FACTOR_INDEX,
    Posterior,
    Uncertainty,
    correlation,
    level_scale,
    posterior_of,
)
from simulator.uncertainty.operators import (
    TIMES,
    OperatorTimes,
    empty_times,
    most_likely,
    predicted,
)
from simulator.workload import Workload, WorkloadBatch

_BLOCK_SPARSE = int(Kernel.BLOCK_SPARSE)
_CHUNK = 64  # few enough for the second-level cache

Errors = list[tuple[Any, Uncertainty]]
"""Rows of a workload, and the errors of their times."""


def operator_times(
    w: Workload, hw: HardwareProfile, level: float = 0.9, engine: Engine | None = None
) -> tuple[OperatorTimes, Errors]:
    """Return the time of one execution of every row and the errors. With an ``engine``, times of
    GEMMs include :func:`simulator.passes.engine_factors`."""
    columns = empty_times(len(w))
    errors: Errors = []
    for rows, e in estimates(w, w.operators(), hw):
        times, uncertainty = predicted(e, hw, level)
        errors.append((rows, uncertainty))
        for name in TIMES:
            columns[name][rows] = getattr(times, name)
    if engine is not None:
        factor = engine_factors(
            w, hw, engine, columns["seconds"], columns["roofline_s"], columns["bottleneck"]
        )
        for name in ("seconds", "lower", "upper"):
            columns[name] = columns[name] * factor
    return OperatorTimes(**columns), errors


@dataclass(frozen=True)
class PredictedPass(ForwardPass):
    """A forward pass with prediction intervals and errors of its operators."""

    errors: Errors  # errors of one execution of the main kernel of each distinct shape of the batch
    level: float  # level of the intervals of :attr:`time`

    @cached_property
    def time(self) -> OperatorTimes:
        """One execution of each row; the roofline is that of a fused kernel."""
        shapes, which = self.workloads.shapes
        each, _ = operator_times(shapes, self.hw, self.level, self.engine)
        of_row = {name: getattr(each, name)[which] for name in TIMES}
        return OperatorTimes(
            **of_row | {name: of_row[name] * self.streams for name in ("seconds", "lower", "upper")}
        )

    @cached_property
    def uncertainty(self) -> PassUncertainty:
        workloads, groups, (shapes, which) = (
            self.workloads,
            self.workloads.groups,
            self.workloads.shapes,
        )
        device = np.maximum(self.device_s, 1e-300)
        share, size = self.row_s / device[workloads.owner], len(shapes)
        correlated, independent = np.zeros((2, size))
        coordinates = np.zeros((3, size))
        names = {
            name: i
            for i, name in enumerate(
                dict.fromkeys(n for _, error in self.errors for n in error.factors)
            )
        }
        factors = np.zeros((len(names), size))
        for rows, error in self.errors:
            correlated[rows], independent[rows] = error.correlated, error.independent
            coordinates[:, rows] = error.coordinates.T
            factors[np.array([names[name] for name in error.factors])[:, None], rows] = (
                error.systematic
            )
        variance = correlated * correlated + independent + (factors * factors).sum(axis=0)
        systematic = np.zeros((len(workloads), len(ERROR_FACTORS)))
        of_row = np.add.reduceat(share * factors[:, which], workloads.starts, axis=1)
        systematic[:, [FACTOR_INDEX[name] for name in names]] = of_row.T
        systematic[:, FACTOR_INDEX["machine launch"]] += (
            ERROR_FACTORS["machine launch"] * self.gap_s / device
        )
        composed, gaps = self._composed
        own, whole = (
            groups.sums(share * np.sqrt(v[which] + composed)) + gaps
            for v in (independent, variance)
        )
        posterior = posterior_of(self.hw)
        noise = 1.0 if posterior is None else np.sqrt(posterior.noise[groups.kind])
        time = np.maximum(groups.sums(share), 1e-300)
        centre = np.array([groups.sums(share * axis[which]) / time for axis in coordinates])
        return PassUncertainty(
            systematic=systematic,
            correlated=groups.sums(share * correlated[which]) * noise,
            independent=own * noise,
            whole=whole,
            coordinates=centre.transpose(1, 2, 0),
            kind=groups.kind,
            posterior=posterior,
        )

    @property
    def _composed(self) -> tuple[Any, Any]:
        """Variance of the log of each row's time for operators of several kernels without measured
        times, and the standard deviation (W, G) that the gaps between these kernels add to a group,
        as a share of the pass."""
        w, groups, sd = (
            self.workloads.rows,
            self.workloads.groups,
            self.engine.composed_log_sd.value,
        )
        composed = w.overhead | (w.is_attention & (w.kernel == _BLOCK_SPARSE))
        if not np.count_nonzero(composed):
            return 0.0, 0.0
        part = groups.sums(self.row_s * composed) / np.maximum(groups.sums(self.row_s), 1e-300)
        return composed * sd**2, sd * part * self.group_gap_s / np.maximum(self.device_s, 1e-300)[
            :, None
        ]


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
    shapes, which = workloads.shapes
    seconds, roofline_s, bottleneck = (
        np.zeros(len(shapes)),
        np.zeros(len(shapes)),
        np.zeros(len(shapes), dtype=np.int8),
    )
    errors: Errors = []
    for rows, e in estimates(shapes, workloads.distinct, hw):
        seconds[rows], uncertainty = most_likely(e, hw)
        if (
            measured is not None
            and (one := measured.operators.get(BY_CODE[e.kind].name)) is not None
        ):
            uncertainty = replace(uncertainty, independent=uncertainty.independent + one.log_sd**2)
        roofline_s[rows], bottleneck[rows] = e.unit_s * e.roofline, e.bottleneck
        errors.append((rows, uncertainty))
    seconds *= engine_factors(shapes, hw, engine, seconds, roofline_s, bottleneck)
    launched, streamed = launches(workloads, engine), streams(workloads, engine, hw)
    gap = gaps(workloads, engine, hw, launched)
    row_s = seconds[which] * workloads.rows.count * streamed
    return PredictedPass(
        workloads=workloads,
        hw=hw,
        engine=engine,
        bottleneck_of_row=bottleneck[which],
        streams=streamed,
        row_s=row_s,
        group_s=workloads.groups.sums(row_s) + gap,
        group_gap_s=gap,
        host=Host.of(workloads, engine, hw, launched, *host_launch(hw)),
        errors=errors,
        level=level,
    )


def host_launch(hw: HardwareProfile) -> tuple[float, float]:
    """Return the time of an eager launch on a profile's host, s, and the standard deviation of its
    log."""
    launch_s, posterior = hw.section("runtime", "*")["host_op_s"], posterior_of(hw)
    if posterior is None:
        return launch_s, ERROR_FACTORS["host"]
    mean, sd = posterior.factor("host")
    return launch_s * float(np.exp(mean)), sd


@dataclass(frozen=True)
class PassUncertainty:
    """Errors of the logs of W total times, sums over G groups of operators. All fields but ``kind``
    are weighted by share of the time; ``correlated`` and ``independent`` include the factors of the
    posterior."""

    systematic: Array  # (W, c) of ERROR_FACTORS
    correlated: Array  # (W, G)
    independent: Array  # (W, G) standard deviations
    whole: Array  # (W, G) standard deviations of a group's total error
    coordinates: Array  # (W, G, 3)
    kind: NDArray[np.intp]  # (G,)
    posterior: Posterior | None = None

    @cached_property
    def _scale(self) -> Any:
        return 1.0 if self.posterior is None else self.posterior.scale

    def _correlated(self, a: Any, b: Any) -> Array:
        """Covariance (n,) of the correlated errors of passes ``a`` and ``b``, n indices each."""
        out = np.zeros(len(a))
        for kind in sorted(set(self.kind.tolist())):
            at = np.flatnonzero(self.kind == kind)
            sd, place = self.correlated[:, at], self.coordinates[:, at]
            for first in range(0, len(out), _CHUNK):
                i, j = a[first : first + _CHUNK], b[first : first + _CHUNK]
                near = correlation(place[i], place[j])
                out[first : first + _CHUNK] += ((sd[i][:, None] @ near)[:, 0] * sd[j]).sum(axis=1)
        return out

    def covariance(
        self, systematic: Array, correlated: Array, coordinates: Array, kind: NDArray[np.intp]
    ) -> Array:
        """Return the covariance (W, n) with the errors of n times of operators."""
        out = self.systematic @ systematic.T
        for group, own in enumerate(self.kind):
            same_kind = correlated * (kind == own)
            if self.correlated[:, group].any() and same_kind.any():
                near = correlation(self.coordinates[:, group], coordinates)
                out += near * self.correlated[:, group, None] * same_kind
        return np.asarray(out)

    @cached_property
    def _measured(self) -> Array:
        """Covariance (W, n) with the measured times."""
        if (p := self.posterior) is None:
            return np.zeros((len(self.systematic), 0))
        return self.covariance(
            p.systematic * p.scale, p.correlated * np.sqrt(p.noise[p.kind]), p.coordinates, p.kind
        )

    def _less_measured(self, variance: Array, c: Array) -> Array:
        if self.posterior is None:
            return variance
        return np.asarray(
            np.maximum(variance - np.einsum("ij,ij->i", c @ self.posterior.inverse, c), 0.0)
        )

    def variance(self) -> Array:
        """Return the variances (W,) of the logs of the times."""
        every = np.arange(len(self.correlated))
        return self._variance(self._correlated(every, every))

    def _variance(self, correlated: Array) -> Array:
        prior = (self.systematic * self.systematic * self._scale).sum(axis=1) + correlated
        return self._less_measured(
            prior + (self.independent * self.independent).sum(axis=1), self._measured
        )

    def variances(self, other: NDArray[np.intp], same: Array) -> tuple[Array, Array]:
        """Return the variances (W,) of the log of each time, and of the log of its ratio to the
        time of pass ``other`` (W,). ``same`` (W, G) is 1 where a group is the same in both passes,
        below 1 where only the number of executions changed, and 0 where the shape changed."""
        every = np.arange(len(self.correlated))
        pairs = (other != every).nonzero()[0]
        found = self._correlated(
            np.concatenate([every, other[pairs]]), np.concatenate([every, pairs])
        )
        alone, covariance = found[: len(every)], found[: len(every)].copy()
        covariance[pairs] = found[len(every) :]
        systematic = self.systematic[other] - self.systematic
        correlated = np.maximum(alone[other] + alone - 2.0 * covariance, 0.0)
        dense, covered = self.independent[other], same > 0.0
        own = (
            dense * dense
            + self.independent * self.independent
            - 2.0 * covered * dense * self.independent
        )
        apart = 2.0 * np.where(covered, 1.0 - same, 0.0) * self.whole[other] * self.whole
        variance = (
            (systematic * systematic * self._scale).sum(axis=1)
            + correlated
            + np.maximum(own, 0.0).sum(axis=1)
        )
        ratio = variance + apart.sum(axis=1)
        if self.posterior is not None:
            ratio = self._less_measured(ratio, self._measured[other] - self._measured)
        return self._variance(alone), ratio

    def half(self, variance: Array, level: float) -> Array:
        coverage_factor = (
            COVERAGE_FACTOR if self.posterior is None else self.posterior.coverage_factor
        )
        return np.asarray(coverage_factor * level_scale(level) * np.sqrt(variance))


def ratio_half(
    a: Uncertainty, b: Uncertainty, level: float = 0.9, posterior: Posterior | None = None
) -> Array:
    """Return the log half-width (n,) of ratios of times of one kind of operator at two shapes."""
    both = Uncertainty.joined([a, b])
    passes = PassUncertainty(
        systematic=both.wide(),
        correlated=both.correlated[:, None],
        independent=np.sqrt(both.independent)[:, None],
        whole=np.sqrt(np.concatenate([a.variance, b.variance]))[:, None],
        coordinates=both.coordinates[:, None],
        kind=np.array([a.kind]),
        posterior=posterior,
    )
    size = len(a.independent)
    other = np.roll(np.arange(2 * size), size)
    return passes.half(passes.variances(other, np.zeros((2 * size, 1)))[1][:size], level)
