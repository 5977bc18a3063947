"""Baselines of the GEMM model: rooflines with no, two and three constants, and a roofline with an RBF residual.

Each of :data:`BASELINES` takes training shapes, a machine, and shapes to predict, and returns seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.optimize import least_squares

from calibration.fit.gemm import GemmFit
from calibration.fit.solver import HUBER
from calibration.validation.validate import SIMPLE_FLOOR_S, SIMPLE_SHARE
from simulator.arrays import FloatArray
from simulator.cost.base import Machine


def flop_and_byte_time(data: GemmFit, machine: Machine) -> tuple[FloatArray, FloatArray]:
    """Return FLOP over the datasheet rate and bytes over the datasheet bandwidth, s."""
    c = data.calls
    flop = 2.0 * c.m * c.n * c.k
    moved = machine.weight_bytes * c.n * c.k + machine.element_bytes * c.m * (c.n + c.k)
    return flop / machine.peak_flop_per_s, moved / machine.bandwidth_bytes_per_s


def roofline(share: float, floor_s: float, train: GemmFit, machine: Machine, test: GemmFit) -> FloatArray:
    """Return max(FLOP / peak, bytes / (share of the bandwidth)) plus a fixed time."""
    compute, moved = flop_and_byte_time(test, machine)
    return np.maximum(compute, moved / share) + floor_s


def fitted_roofline(start: Sequence[float], train: GemmFit, machine: Machine, test: GemmFit) -> FloatArray:
    """Return t0 + max(FLOP / (a peak), bytes / (b bandwidth)), fitted by robust least squares in log time that start at
    (a, b) or (t0, a, b)."""

    def form(constants: FloatArray, data: GemmFit) -> FloatArray:
        compute, moved = flop_and_byte_time(data, machine)
        *fixed_s, a, b = constants
        return np.asarray(sum(fixed_s) + np.maximum(compute / a, moved / b))

    def log_residual(logs: FloatArray) -> FloatArray:
        return np.asarray(np.log(form(np.exp(logs), train)) - np.log(train.seconds))

    return form(np.exp(least_squares(log_residual, np.log(start), loss="soft_l1", f_scale=HUBER).x), test)


three_constants = partial(fitted_roofline, (3e-6, 0.7, 0.8))


def roofline_rbf(train: GemmFit, machine: Machine, test: GemmFit) -> FloatArray:
    """Return the three-constant roofline times an RBF interpolant of the log residual over log2 (m, n, k), fitted to at
    most 4,000 training rows because the cost is cubic."""
    if len(train) > 4000:
        train = train.take(np.random.default_rng(0).choice(len(train), 4000, replace=False))

    def axes(d: GemmFit) -> FloatArray:
        return np.stack(d.position, axis=1)

    rest = np.log(train.seconds / three_constants(train, machine, train))
    neighbours = min(len(train), 64)
    smooth = RBFInterpolator(axes(train), rest, neighbors=neighbours, smoothing=0.1, kernel="linear")
    return np.asarray(three_constants(train, machine, test) * np.exp(smooth(axes(test))), dtype=np.float64)


BASELINES: Mapping[str, Callable[[GemmFit, Machine, GemmFit], FloatArray]] = {
    "datasheet roofline": partial(roofline, 1.0, 0.0),
    "max(flop, bytes/0.8) + 3 us": partial(roofline, SIMPLE_SHARE, SIMPLE_FLOOR_S),
    "two efficiencies (GenZ-style)": partial(fitted_roofline, (0.5, 0.5)),  # what GenZ-style LLM simulators use
    "three-constant roofline": three_constants,
    "roofline + RBF": roofline_rbf,
}
"""Baselines by name."""
