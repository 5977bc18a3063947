"""Compute times of W passes and their ratios, with prediction intervals, at h hosts, of which the
first is the median.

Kernel errors follow a linear model (:mod:`simulator.uncertainty.factors`). The host acts
nonlinearly: it matters only where it is slower than the device. Its two speeds
(:class:`simulator.passes.Host`) are functions of two independent normals: ``first``, the speed of
passes, and ``second``, the rest of the speed of launches and sequences. Each pass is evaluated on
the typical host and at both ends of the interval of ``first`` and of ``second``. On each side, the
changes are combined with the device interval as a root of sum of squares.

A measured pass time is one observation. Bayes' rule weights a grid of both normals; kernel errors
are conditioned on the remaining difference. The ends of ``first`` are then evaluated with the
median of ``second`` there, so host times per pass and per layer vary with a nearly constant sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import instance
from simulator.arrays import BoolArray, FloatArray, IndexArray
from simulator.codes import ROLES
from simulator.hardware.library import load_hardware
from simulator.passes import measured_engine
from simulator.uncertainty.factors import COVERAGE_FACTOR, level_scale
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.operators import TIMES, OperatorTimes
from simulator.units import seconds, seconds_between
from simulator.workload import Workload, WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

SAME_SHAPE = 0.99
"""Correlation of the errors of equal operators in two passes; the kernels around them differ."""

MIXED_LOG_SD = 0.05
"""Log standard deviation of the ratio of host times of two mixes of kernels on the same host."""

MEASURED_LOG_SD = 0.01
"""Log standard deviation of a measured time of a whole pass from run to run."""

SLOW_HOSTS, SLOWEST, SLOW_SD = 0.05, 200.0, 2.0
"""Share of slow hosts beside the normal distribution, their largest multiple of the typical host's
time, and the standard deviations by which they are slower at least (assumed); their logs are
uniform. In the deviation of a measured time, a slow host counts with this least number. Slow hosts
are real: the B200 of ML.ENERGY 3.0 takes 30 ms per token with any model and batch
(calibration/evidence/measurements/steady.csv), and the typical time per pass of its engine is 0.2
ms. Hosts that were measured on the machine, and hosts that launch every kernel, are normal: long
times of eager Transformers are those of its kernels (SliceGPT in published_speedups.csv)."""

_ENDS = ([(0, 0)], [(0, 0), (-1, 0), (1, 0)], [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
"""Hosts at which passes are evaluated: factors on the half-width of ``first`` and ``second``, by
number of unknowns."""

CPU_LOG_SD = 0.02
"""Log standard deviation, per model, of a pass on a CPU over the sum of its operators, from
executed speedups (docs/generated/vllm.md, transformers.md): 92 % of SmolLM2's and Qwen2.5's and 93
% of those of a mixture of experts lie in their interval; with 0.015 only 72 % of the decodes in
eager Transformers do."""

REPEATED_LOG_SD = 0.01
"""Log standard deviation of a measured speedup from measurement to measurement: two halves of a
measurement differ by 0.9 % (median, docs/generated/comparison.md). With it alone, instead of
:data:`CPU_LOG_SD`, 91 % of the 65 speedups of depth in vLLM's records and in publications lie in
their interval, 82 % without. On a CPU, and in engines with ``apart_log_sd``, other numbers include
it."""

FOLLOWS_WORK = 0.5
"""Share of the host time of an engine that was calibrated on this machine that may fall with the
work of a shorter pass, instead of being spent per pass and per layer. With 0.5, 87 % of 70 decodes
in vLLM on a calibrated CPU are inside, without it 80 %; narrower MLPs gain 4.5 % more than
predicted."""

UNEXPLAINED = 0.3
"""Share of the deviation of a measured time from its prediction that may be time per pass where the
model assumes time in proportion to the work, or the reverse (assumed): the model has no cause for
this share."""

CONSISTENT_SD = 2.5
"""A measured time is ignored if it deviates from its prediction by more standard deviations."""


class PredictionIntervals(NamedTuple):
    """Times of W passes, s, and ratios of another pass to each, with intervals."""

    seconds: FloatArray
    lower: FloatArray
    upper: FloatArray
    ratio: FloatArray
    ratio_lower: FloatArray
    ratio_upper: FloatArray
    device_share: FloatArray  # share of the time that follows the device
    inferred: Inferred | None = None

    def columns(self, dense: IndexArray) -> dict[str, FloatArray]:
        """Return the columns of a result about times; ``dense`` (W,) are the other passes."""
        times = {"s": self.seconds, "lower": self.lower, "upper": self.upper}
        return {
            **{f"dense_{end}": time[dense] for end, time in times.items()},
            **{f"pruned_{end}": time for end, time in times.items()},
            "speedup": self.ratio,
            "speedup_lower": self.ratio_lower,
            "speedup_upper": self.ratio_upper,
        }


@dataclass(frozen=True)
class Inferred:
    """Results of a measured time."""

    host: float  # factor on the predicted time of the host
    device: float  # factor on the predicted time of the kernels
    predicted_s: float  # without the measured time
    # between measured and predicted time on the most likely host, standard deviations
    deviation: float
    consistent: bool  # False: predictions do not change
    layer_s: float  # time of the host to launch one layer; 0 under a graph
    host_s: float  # time of the host in the whole measured pass
    host_bound: bool
    # interval of the part of the host's time that is spent per pass
    pass_share: tuple[float, float]


class _Hosts(NamedTuple):
    """Passes at h hosts: times (h, W) and the part of the time that follows the device."""

    seconds: FloatArray
    share: FloatArray

    @classmethod
    def at(cls, p: PredictedPass, first: FloatArray, second: FloatArray) -> _Hosts:
        return cls(*p.at(*p.host.speeds(first, second)))

    @property
    def log(self) -> FloatArray:
        return np.log(np.maximum(self.seconds, 1e-300))


@dataclass(frozen=True)
class _Pairs:
    """W passes, each with the pass to which its ratio is predicted, and variances of the logs of
    their times on the device."""

    p: PredictedPass
    other: IndexArray  # (W,)
    same: FloatArray  # (W, G) correlation of errors of groups with those of the other pass
    mix: FloatArray  # (W,) variance because the hosts launch other kernels, or at another time
    variance: FloatArray  # (W,) of the time
    of_ratio: FloatArray  # (W,) of the ratio

    @classmethod
    def of(cls, p: PredictedPass, other: IndexArray, relative: BoolArray | None = None) -> _Pairs:
        groups, spent = p.workloads.groups, p.group_s
        each = spent / np.maximum(groups.count, 1e-300)
        equal = np.abs(each - each[other]) <= 1e-9 * each[other]
        untouched = np.abs(spent - spent[other]) <= 1e-9 * spent[other]
        untouched = untouched if relative is None else untouched | relative
        same = np.where(untouched, 1.0, np.where(equal, SAME_SHAPE, 0.0))
        # other kernels, or fewer launches
        mixed = ~(groups.count == groups.count[other]).all(axis=1)
        mix = 2.0 * MEASURED_LOG_SD**2 + np.where(mixed, MIXED_LOG_SD**2, 0.0)
        mix = np.where((same == 1.0).all(axis=1), 0.0, mix)
        variances = p.uncertainty.variances(other, same)
        capped = p.cap_variances(other)
        return cls(p, other, same, mix, *(a + b for a, b in zip(variances, capped)))

    def variances(self, hosts: _Hosts) -> tuple[FloatArray, FloatArray]:
        """Return the variances (h, W) of the logs of times and of ratios at each host."""
        variance, other, (alike, apart) = self.variance, self.other, _of_engine(self.p)
        a, b = hosts.share, hosts.share[:, other]
        together = 0.5 * (variance + variance[other] - self.of_ratio)  # covariance of the two
        between = a * a * variance + b * b * variance[other] - 2.0 * a * b * together
        if measured_engine(self.p.engine, self.p.hw)[1] is not None:
            waits = (1.0 - hosts.share)[:, other]
            shorter = -np.expm1(np.minimum(hosts.log - hosts.log[:, other], 0.0))
            between = between + (FOLLOWS_WORK * waits * shorter) ** 2
        repeated = np.where((self.same == 1.0).all(axis=1), 0.0, REPEATED_LOG_SD**2)
        models = np.maximum(2.0 * apart, repeated)
        between = between + np.where(other == np.arange(len(other)), 0.0, models)
        return a * a * variance + alike + apart, between

    def conditioned(
        self, hosts: _Hosts, dense_s: float, predicted_s: float
    ) -> tuple[_Hosts, FloatArray, FloatArray]:
        """Return the passes at each host given the measured time of the first, and their
        :meth:`variances`."""
        of_time, between = self.variances(hosts)
        follows = hosts.share[0]
        hosts, explained, wider = _conditioned(self, hosts, dense_s)
        # the measured pass launched another mix
        of_time = of_time + wider - explained**2 + self.mix * (1.0 - follows) ** 2
        between = between - (explained - explained[:, self.other]) ** 2
        log, beyond = hosts.log, UNEXPLAINED * math.log(dense_s / predicted_s)
        of_time, between = (
            square + (beyond * np.expm1(-np.abs(log - log[:, other]))) ** 2
            for square, other in ((of_time, [0]), (between, self.other))
        )
        return hosts, of_time, between


def prediction_intervals(
    p: PredictedPass,
    level: float,
    other: IndexArray,
    dense_s: float | None = None,
    relative: BoolArray | None = None,
) -> PredictionIntervals:
    """Return passes with intervals at a level, and their ratios to pass ``other`` (W,); ``dense_s``
    is a measured time of the first pass, s. The groups ``relative`` (W, G) take a given share of
    their time in the other pass."""
    pairs, scale = _Pairs.of(p, other, relative), COVERAGE_FACTOR * level_scale(level)
    hosts = _Hosts.at(p, *(scale * np.array(_ENDS[p.host.unknowns], dtype=np.float64).T))
    of_time, between = pairs.variances(hosts)
    inferred = None
    if dense_s is not None:
        likely, inferred = _hosts_given(p, pairs.variance[0], dense_s, scale)
        if inferred.consistent:
            hosts = _Hosts.at(p, *likely)
            hosts, of_time, between = pairs.conditioned(hosts, dense_s, inferred.predicted_s)
    log, waits = hosts.log, 1.0 - hosts.share[0]
    lower, upper = _ends(log, scale**2 * of_time)
    of_ratio = scale**2 * (between + pairs.mix * waits * waits[other])
    ratio_lower, ratio_upper = _ends(log[:, other] - log, of_ratio)
    seconds = np.exp(log[0])
    return PredictionIntervals(
        seconds=seconds,
        lower=np.exp(lower),
        upper=np.exp(upper),
        ratio=seconds[other] / seconds,
        ratio_lower=np.exp(ratio_lower),
        ratio_upper=np.exp(ratio_upper),
        device_share=hosts.share[0],
        inferred=inferred,
    )


def device_errors(p: PredictedPass, other: IndexArray) -> tuple[FloatArray, FloatArray]:
    """Return the standard deviations (W,) of the logs of times on the device, and the correlation
    (W,) of their errors with those of passes ``other``."""
    pairs, (alike, apart) = _Pairs.of(p, other), _of_engine(p)
    variance = pairs.variance + alike + apart
    shared = 0.5 * (pairs.variance + pairs.variance[other] - pairs.of_ratio) + alike
    same = other == np.arange(len(other))
    together = np.where(same, 1.0, shared / np.sqrt(variance * variance[other]))
    return np.sqrt(variance), np.clip(together, 0.0, 1.0)


def _of_engine(p: PredictedPass) -> tuple[float, float]:
    """Return the variances of the log of a pass that no operator explains: common to all models,
    and per model."""
    apart = p.engine.apart_log_sd.value**2 + (CPU_LOG_SD**2 if p.hw.architecture == "cpu" else 0.0)
    return p.engine.log_sd.value**2, apart


def _conditioned(
    pairs: _Pairs, hosts: _Hosts, dense_s: float
) -> tuple[_Hosts, FloatArray, FloatArray]:
    """Return the passes at each host given the measured time of the first; the covariance (h, W) of
    their logs with the log of the measured time, over the standard deviation of the latter; and how
    much the variance that all passes share grows. The likely cause of a deviation is one that dense
    and pruned share, such as other kernels or clocks, so the shared variance becomes at least the
    square of the deviation."""
    variance, (alike, apart) = pairs.variance, _of_engine(pairs.p)
    first = np.arange(len(variance)) == 0
    _, ratio = pairs.p.uncertainty.variances(
        np.zeros(len(variance), dtype=np.intp), np.where(first[:, None], 1.0, pairs.same)
    )
    share = hosts.share[:, [0]]
    left = np.log(dense_s / hosts.seconds[:, [0]])
    shared = np.maximum(alike, left * left)
    covariance = (
        0.5 * hosts.share * share * (variance + variance[0] - ratio) + shared + apart * first
    )
    whole = share**2 * variance[0] + shared + apart + MEASURED_LOG_SD**2
    moved = hosts._replace(seconds=hosts.seconds * np.exp(covariance / whole * left))
    return moved, covariance / np.sqrt(whole), shared - alike


def _ends(log: FloatArray, square: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the ends of intervals of logs (h, W): the first host is the prediction, each further
    pair the ends of one unknown; ``square`` holds squared half-widths per host. The squared
    half-width of device errors is the mean of two cases: the typical host, and the slowest (or
    fastest) host within the interval. If planted hosts and kernels take equally long, the typical
    host alone covers 81 %, this rule 86 %."""
    square, change = np.maximum(square, 0.0), log - log[0]
    sides = np.array([-change, change])
    of_device = 0.5 * (square[0] + square[sides.argmax(axis=1), np.arange(log.shape[1])])
    of_host = np.maximum(sides[:, 1:].reshape(2, -1, 2, log.shape[1]).max(axis=2), 0.0) ** 2
    below, above = np.sqrt(of_device + of_host.sum(axis=1))
    return log[0] - below, log[0] + above


@dataclass(frozen=True)
class _Posterior:
    """A grid of hosts, given the measured time of the first pass."""

    first: FloatArray  # (n,)
    second: FloatArray  # (m,)
    predicted: FloatArray  # (n, m) time of the pass, s
    share: FloatArray  # (n, m) part of the time that follows the device
    log: FloatArray  # (n, m) of measured over predicted time
    whole: FloatArray  # (n, m) variance of this log
    prior: FloatArray  # (n, m) -2 ln of a host's probability over that of the typical host
    most: float  # standard deviations with which a slow host counts in a deviation

    @classmethod
    def of(cls, p: PredictedPass, variance: float, dense_s: float) -> _Posterior:
        known = measured_engine(p.engine, p.hw)[1] is not None or bool(p.host.launch.any())
        slowest = 0.0 if known else math.log(SLOWEST) / p.host.widest_log_sd
        first, second = _grids(p.host.unknowns, slowest)
        speeds = p.host.speeds(first[:, None], second)
        segment = p.workloads.groups.segment
        total, follows = p.host.take([0]).total(p.group_s[[0]], segment, *speeds)
        predicted = total.sum(axis=-1)[..., 0]
        share = follows.sum(axis=-1)[..., 0] / np.maximum(predicted, 1e-300)
        log = np.log(dense_s / predicted)
        prior = _rarity(first, slowest)[:, None] + _rarity(second, slowest)
        whole = share**2 * variance + sum(_of_engine(p)) + MEASURED_LOG_SD**2
        share, log, whole = (np.broadcast_to(one, prior.shape) for one in (share, log, whole))
        most = SLOW_SD if slowest else math.inf
        return cls(first, second, predicted, share, log, whole, prior, most)

    @property
    def log_weight(self) -> FloatArray:
        square = self.log * self.log / self.whole
        return -0.5 * (self.prior + square + np.log(self.whole))

    def deviation(self, i: int, j: int) -> float:
        """Return the standard deviations between measured and predicted time on one host."""
        host = min(math.hypot(self.first[i], self.second[j]), self.most)
        return math.sqrt(host**2 + float(self.log[i, j] ** 2 / self.whole[i, j]))

    @property
    def typical_s(self) -> float:
        """Time of the pass on the typical host, s."""
        first, second = (int(np.abs(x).argmin()) for x in (self.first, self.second))
        return float(self.predicted[first, second])


def _rarity(speeds: FloatArray, slowest: float) -> FloatArray:
    """Return -2 ln of the probability of hosts over that of the typical host; 0.0 ``slowest``: no
    host is slower than a normal distribution has it."""
    if not slowest:
        return speeds * speeds
    slow = SLOW_HOSTS * math.sqrt(2.0 * math.pi) / slowest * (speeds > SLOW_SD)
    return -2.0 * np.log((1.0 - SLOW_HOSTS) * np.exp(-0.5 * speeds * speeds) + slow)


def _grids(unknowns: int, slowest: float) -> tuple[FloatArray, FloatArray]:
    """Return the grids of ``first`` and ``second`` for a measured time, standard deviations; the
    host that is ``slowest`` ends them."""

    def grid(least: float, step: float) -> FloatArray:
        most = max(slowest, -least)
        return np.asarray(step * np.arange(round(least / step), int(most / step) + 1))

    fine, none = grid(-5.0, 0.05), np.zeros(1)
    return ((none, none), (fine, none), (grid(-4.0, 0.1), fine))[unknowns]


def _hosts_given(
    p: PredictedPass, variance: float, dense_s: float, scale: float
) -> tuple[FloatArray, Inferred]:
    """Return the hosts of :data:`_ENDS` (2, h), for intervals of ``scale`` standard deviations, and
    the results of a measured time of the first pass."""
    grid = _Posterior.of(p, variance, dense_s)
    log_weight = grid.log_weight
    best = np.unravel_index(int(log_weight.argmax()), log_weight.shape)
    deviation = grid.deviation(int(best[0]), int(best[1]))
    hosts = _hosts_of(grid.first, grid.second, log_weight, scale, p.host.unknowns)
    speeds = p.host.speeds(*hosts)
    usual = float(p.host_s[0])
    each_pass, other = (part[:, 0] for part in p.host.take([0]).spent(*speeds))
    spent, launch = each_pass + other, float(np.exp(p.host.launch_log_sd * speeds[0][0]))
    shares = each_pass / np.maximum(spent, 1e-300)
    follows = p.at(*p.host.speeds(*hosts[:, :1]))[1]
    gain = grid.share[best] * variance / grid.whole[best]
    return hosts, Inferred(
        host=float(spent[0]) / usual if usual else 1.0,
        device=float(np.exp(gain * grid.log[best])),
        predicted_s=grid.typical_s,
        deviation=deviation,
        consistent=deviation <= CONSISTENT_SD,
        layer_s=float(p.host.layer[0]) * launch,
        host_s=float(spent[0]),
        host_bound=bool(follows[0, 0] < 0.5),
        pass_share=(float(shares.min()), float(shares.max())),
    )


def _hosts_of(
    first: FloatArray, second: FloatArray, log_weight: FloatArray, scale: float, unknowns: int
) -> FloatArray:
    """Return the hosts of :data:`_ENDS` (2, h) from weights of a grid: medians, and quantiles at
    ``scale`` standard deviations of a normal distribution. Quantiles of ``second`` are conditional
    on ``first``."""
    ends = np.array(_ENDS[unknowns], dtype=np.float64).T
    quantiles = 0.5 + 0.5 * ends * math.erf(scale / math.sqrt(2.0))
    largest = log_weight.max(axis=1)
    weight = np.exp(log_weight - largest[:, None])
    of_first = np.exp(largest - largest.max()) * weight.sum(axis=1)
    speeds = _quantiles(first, of_first, quantiles[0])
    place = np.interp(speeds, first, np.arange(len(first)))
    out = np.zeros(len(speeds))
    for i in np.unique(np.concatenate([np.floor(place), np.ceil(place)])).astype(int):
        part = np.maximum(1.0 - np.abs(place - float(i)), 0.0)  # weight of linear interpolation
        out += part * _quantiles(second, weight[i], quantiles[1])
    return np.stack([speeds, out])


def _quantiles(values: FloatArray, weights: FloatArray, shares: FloatArray) -> FloatArray:
    """Return the values below which shares of the weights lie."""
    total = np.cumsum(weights)
    return np.interp(shares, (total - 0.5 * weights) / total[-1], values)


def intervals(p: PredictedPass, level: float) -> tuple[FloatArray, FloatArray]:
    ends = prediction_intervals(p, level, np.arange(len(p.workloads)))
    return ends.lower, ends.upper


@dataclass(frozen=True, repr=False)
class WorkloadTimes(OperatorTimes):
    """Times of a workload on a device, s: of one execution of each row (eager: all its kernels),
    and in total."""

    role: NDArray[np.str_]  # role of each row
    count: FloatArray  # executions of each row
    total_s: float
    total_lower_s: float  # prediction interval
    total_upper_s: float
    device_s: float  # all executions, and the gaps
    gap_s: float  # idle between the kernels of a graph
    host_s: float  # to launch and to schedule, hidden or not
    host_bound: bool  # the host, not the device, takes most of the time

    def _title(self) -> str:
        total = seconds_between(self.total_s, self.total_lower_s, self.total_upper_s)
        host = f"host {seconds(self.host_s)}{' (host-bound)' if self.host_bound else ''}"
        gaps = f", {seconds(self.gap_s)} of it in gaps" if self.gap_s else ""
        device = f"device {seconds(self.device_s)}{gaps}"
        return f"{total}: {device}, {host}; {len(self.seconds)} rows"


def workload_time(w: Workload, hw: str | HardwareProfile, level: float = 0.9) -> WorkloadTimes:
    """Return the time of one workload on one device in its engine, operator by operator.

    Parameters
    ----------
    w : Workload
        The workload (:func:`simulator.lower`).
    hw : str or HardwareProfile
        The device: a name, or a profile.
    level : float
        Level of the prediction intervals, in (0, 1).

    Returns
    -------
    WorkloadTimes
        Times, s: arrays with one element per row of the workload, and totals (``total_s``,
        ``total_lower_s``, ``total_upper_s``, ``device_s``, ``gap_s``, ``host_s``).

    Raises
    ------
    InputError
        For a workload that the device or the engine cannot run, or a level outside (0, 1).

    Examples
    --------
    >>> import simulator
    >>> w = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode")
    >>> c = workload_time(w, "h100")
    >>> c.host_bound, c.total_lower_s < c.total_s < c.total_upper_s, c.to_pandas()["role"][2]
    (False, True, 'qkv')
    """
    p = forward_passes(
        WorkloadBatch.of([instance("w", w, Workload, "simulator.lower")]), load_hardware(hw), level
    )
    in_all = {
        name: getattr(p, name)[0].item()
        for name in ("total_s", "device_s", "gap_s", "host_s", "host_bound")
    }
    lower, upper = (end[0].item() for end in intervals(p, level))
    ends = {
        "role": np.array(ROLES)[w.role],
        "count": w.count,
        "total_lower_s": lower,
        "total_upper_s": upper,
    }
    return WorkloadTimes(**{name: getattr(p.time, name) for name in TIMES}, **in_all, **ends)
