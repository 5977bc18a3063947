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
from simulator.arrays import FloatArray
from simulator.codes import ROLES
from simulator.hardware.library import load_hardware
from simulator.uncertainty.factors import COVERAGE_FACTOR, level_scale
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.operators import TIMES, OperatorTimes
from simulator.units import seconds, seconds_between
from simulator.workload import Workload, WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

MIXED_LOG_SD = 0.05
"""Log standard deviation of the ratio of host times of two mixes of kernels on the same host."""

MEASURED_LOG_SD = 0.01
"""Log standard deviation of a measured time of a whole pass from run to run."""

_FINE, _COARSE, _NONE = np.linspace(-5.0, 5.0, 201), np.linspace(-4.0, 4.0, 81), np.zeros(1)
_GRIDS = ((_NONE, _NONE), (_FINE, _NONE), (_COARSE, _FINE))
"""Grids of ``first`` and ``second`` for a measured time, standard deviations, by number of
unknowns."""

_ENDS = ([(0, 0)], [(0, 0), (-1, 0), (1, 0)], [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
"""Hosts at which passes are evaluated: factors on the half-width of ``first`` and ``second``, by
number of unknowns."""

CPU_LOG_SD = 0.02
"""Log standard deviation, per model, of a pass on a CPU over the sum of its operators, from
executed speedups (docs/generated/vllm.md, transformers.md): 92 % of SmolLM2's and Qwen2.5's and 93
% of those of a mixture of experts lie in their interval; with 0.015 only 72 % of the decodes in
eager Transformers do."""

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
    inferred: Inferred | None = None


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


def prediction_intervals(
    p: PredictedPass,
    level: float,
    other: NDArray[np.intp],
    same: FloatArray,
    mixed: NDArray[np.bool_],
    measured: tuple[int, float] | None = None,
) -> PredictionIntervals:
    """Return passes with intervals at a level, and their ratios to pass ``other`` (W,). ``same``
    (W, G) is that of ``PassUncertainty.variances``; ``mixed`` (W,) is true where the two passes
    launch different mixes of kernels; ``measured`` is the index of a pass and its measured time,
    s."""
    uncertainty, (alike, apart) = p.uncertainty, _of_engine(p)
    coverage_factor = (
        COVERAGE_FACTOR if uncertainty.posterior is None else uncertainty.posterior.coverage_factor
    )
    scale = coverage_factor * level_scale(level)
    speeds, inferred = scale * np.array(_ENDS[p.host.unknowns], dtype=np.float64).T, None
    variance, of_ratio = uncertainty.variances(other, same)
    if measured is not None:
        given, inferred = _hosts_given(p, variance[measured[0]], *measured, scale)
        speeds = given if inferred.consistent else speeds
    hosts = _Hosts.at(p, *speeds)
    a, b = hosts.share, hosts.share[:, other]
    together = 0.5 * (variance + variance[other] - of_ratio)  # covariance with the other pass
    own = a * a * variance + alike + apart
    between = a * a * variance + b * b * variance[other] - 2.0 * a * b * together
    between = between + np.where(other == np.arange(len(other)), 0.0, 2.0 * apart)
    mix = 2.0 * MEASURED_LOG_SD**2 + np.where(mixed, MIXED_LOG_SD**2, 0.0)
    mix = np.where((same == 1.0).all(axis=1), 0.0, mix)
    if measured is not None and inferred is not None and inferred.consistent:
        hosts, explained, wider = _conditioned(p, hosts, variance, same, *measured)
        # the measured pass launched another mix
        own = own + wider - explained**2 + mix * (1.0 - a[0]) ** 2
        between = between - (explained - explained[:, other]) ** 2
    log = np.log(np.maximum(hosts.seconds, 1e-300))
    if measured is not None and inferred is not None and inferred.consistent:
        beyond = UNEXPLAINED * math.log(measured[1] / inferred.predicted_s)
        own = own + (beyond * -np.expm1(-np.abs(log - log[:, [measured[0]]]))) ** 2
        between = between + (beyond * -np.expm1(-np.abs(log - log[:, other]))) ** 2
    lower, upper = _ends(log, scale**2 * own)
    ratio_lower, ratio_upper = _ends(
        log[:, other] - log, scale**2 * (between + mix * (1.0 - a[0]) * (1.0 - b[0]))
    )
    times = np.exp(log[0])
    ratios = times[other] / times, np.exp(ratio_lower), np.exp(ratio_upper)
    return PredictionIntervals(times, np.exp(lower), np.exp(upper), *ratios, inferred)


def _of_engine(p: PredictedPass) -> tuple[float, float]:
    """Return the variances of the log of a pass that no operator explains: common to all models,
    and per model."""
    apart = p.engine.apart_log_sd.value**2 + (CPU_LOG_SD**2 if p.hw.architecture == "cpu" else 0.0)
    return p.engine.log_sd.value**2, apart


def _conditioned(
    p: PredictedPass, hosts: _Hosts, variance: FloatArray, same: FloatArray, at: int, seconds: float
) -> tuple[_Hosts, FloatArray, FloatArray]:
    """Return the passes at each host given the measured time of pass ``at``; the covariance (h, W)
    of their logs with the log of the measured time, over the standard deviation of the latter; and
    how much the variance that all passes share grows. The likely cause of a deviation is one that
    dense and pruned share, such as other kernels or clocks, so the shared variance becomes at least
    the square of the deviation."""
    every, (alike, apart) = np.arange(len(variance)), _of_engine(p)
    _, ratio = p.uncertainty.variances(
        np.full_like(every, at), np.where(every[:, None] == at, 1.0, same)
    )
    share = hosts.share[:, [at]]
    left = np.log(seconds / hosts.seconds[:, [at]])
    shared = np.maximum(alike, left * left)
    covariance = (
        0.5 * hosts.share * share * (variance + variance[at] - ratio)
        + shared
        + apart * (every == at)
    )
    whole = share**2 * variance[at] + shared + apart + MEASURED_LOG_SD**2
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


def _hosts_given(
    p: PredictedPass, variance: float, at: int, seconds: float, scale: float
) -> tuple[FloatArray, Inferred]:
    """Return the hosts of :data:`_ENDS` (2, h), for intervals of ``scale`` standard deviations, and
    the results of a measured pass."""
    first, second = _GRIDS[p.host.unknowns]
    host, segment = p.host.take([at]), p.workloads.groups.segment
    total, follows = host.total(p.group_s[[at]], segment, *p.host.speeds(first[:, None], second))
    predicted = total.sum(axis=-1)[..., 0]
    share = follows.sum(axis=-1)[..., 0] / np.maximum(predicted, 1e-300)
    log, prior = np.log(seconds / predicted), first[:, None] ** 2 + second**2
    whole = np.broadcast_to(
        share**2 * variance + sum(_of_engine(p)) + MEASURED_LOG_SD**2, prior.shape
    )
    log, share = np.broadcast_to(log, prior.shape), np.broadcast_to(share, prior.shape)
    likely = -0.5 * (prior + log * log / whole + np.log(whole))
    best = np.unravel_index(int(likely.argmax()), likely.shape)
    deviation = float(np.sqrt(prior[best] + log[best] ** 2 / whole[best]))
    hosts = _hosts_of(first, second, likely, scale, p.host.unknowns)
    usual, (each_pass, other) = (
        float(p.host_s[at]),
        (part[:, 0] for part in host.spent(*p.host.speeds(*hosts))),
    )
    spent, launch = (
        each_pass + other,
        float(np.exp(p.host.launch_log_sd * p.host.speeds(*hosts)[0][0])),
    )
    shares = each_pass / np.maximum(spent, 1e-300)
    there, middle = p.at(*p.host.speeds(*hosts[:, :1]))[1], (len(first) // 2, len(second) // 2)
    gain = share[best] * variance / whole[best]
    return hosts, Inferred(
        host=float(spent[0]) / usual if usual else 1.0,
        device=float(np.exp(gain * log[best])),
        predicted_s=float(predicted[middle]),
        deviation=deviation,
        consistent=deviation <= CONSISTENT_SD,
        layer_s=float(p.host.layer[at]) * launch,
        host_s=float(spent[0]),
        host_bound=bool(there[0, at] < 0.5),
        pass_share=(float(shares.min()), float(shares.max())),
    )


def _hosts_of(
    first: FloatArray, second: FloatArray, log_weight: FloatArray, scale: float, unknowns: int
) -> FloatArray:
    """Return the hosts of :data:`_ENDS` (2, h) from weights of a grid: medians, and quantiles at
    ``scale`` standard deviations of a normal distribution. Quantiles of ``second`` are conditional
    on ``first``."""
    ends = np.array(_ENDS[unknowns], dtype=np.float64).T
    at = 0.5 + 0.5 * ends * math.erf(scale / math.sqrt(2.0))
    row = log_weight.max(axis=1)
    given = np.exp(log_weight - row[:, None])
    found = _quantiles(first, np.exp(row - row.max()) * given.sum(axis=1), at[0])
    rows, next_to = (
        np.arange(len(first), dtype=np.float64),
        np.interp(found, first, np.arange(len(first))),
    )
    out = np.zeros(len(found))
    for i in np.unique(np.concatenate([np.floor(next_to), np.ceil(next_to)])).astype(int):
        part = np.maximum(1.0 - np.abs(next_to - rows[i]), 0.0)  # weight of linear interpolation
        out += part * _quantiles(second, given[i], at[1])
    return np.stack([found, out])


def _quantiles(values: FloatArray, weights: FloatArray, at: FloatArray) -> FloatArray:
    """Return the values below which shares of the weights lie."""
    total = np.cumsum(weights)
    return np.asarray(np.interp(at, (total - 0.5 * weights) / total[-1], values))


def intervals(p: PredictedPass, level: float) -> tuple[FloatArray, FloatArray]:
    every = np.arange(len(p.workloads))
    found = prediction_intervals(
        p, level, every, np.ones(p.group_s.shape), np.zeros(len(every), dtype=bool)
    )
    return found.lower, found.upper


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
