"""What the GEMM model is judged against: rooflines with none, three and four constants, and a roofline with an RBF residual.

Each function takes training shapes, a machine, and shapes to predict, and returns seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator
from scipy.optimize import least_squares

from calibration.fit.core import Shapes
from calibration.fit.solver import HUBER
from simulator.kernels.gemm_core import Machine

F = NDArray[np.float64]


def flop_time(data: Shapes, machine: Machine) -> F:
    """FLOP over the datasheet rate, s."""
    return 2.0 * data.m * data.n * data.k / machine.peak_flop_per_s


def byte_time(data: Shapes, machine: Machine) -> F:
    """Bytes over the datasheet bandwidth, s."""
    moved = machine.weight_bytes * data.n * data.k + machine.element_bytes * data.m * (data.n + data.k)
    return np.asarray(moved / machine.bandwidth_bytes_per_s)


def datasheet(train: Shapes, machine: Machine, test: Shapes) -> F:
    """max(FLOP / peak, bytes / bandwidth)."""
    return np.maximum(flop_time(test, machine), byte_time(test, machine))


def rule_of_thumb(train: Shapes, machine: Machine, test: Shapes) -> F:
    """max(FLOP / peak, bytes / 0.8 bandwidth) + 3 us."""
    return np.maximum(flop_time(test, machine), byte_time(test, machine) / 0.8) + 3e-6


def _robust(form: Callable[[F, Shapes], F], start: F, train: Shapes, machine: Machine, test: Shapes) -> F:
    logs = np.log(train.seconds)

    def misfit(x: F) -> F:
        return np.asarray(np.log(form(np.exp(x), train)) - logs)

    found = least_squares(misfit, np.log(start), loss="soft_l1", f_scale=HUBER)
    return form(np.exp(found.x), test)


def three_constants(train: Shapes, machine: Machine, test: Shapes) -> F:
    """t0 + max(FLOP / (a peak), bytes / (b bandwidth)), the three fitted."""
    return _robust(
        lambda c, d: c[0] + np.maximum(flop_time(d, machine) / c[1], byte_time(d, machine) / c[2]),
        np.array([3e-6, 0.7, 0.8]),
        train,
        machine,
        test,
    )


def two_efficiencies(train: Shapes, machine: Machine, test: Shapes) -> F:
    """max(FLOP / (a peak), bytes / (b bandwidth)), the two efficiencies fitted: what GenZ-style LLM simulators use."""
    return _robust(
        lambda c, d: np.maximum(flop_time(d, machine) / c[0], byte_time(d, machine) / c[1]),
        np.array([0.5, 0.5]),
        train,
        machine,
        test,
    )


def roofline_rbf(train: Shapes, machine: Machine, test: Shapes, limit: int = 4000, seed: int = 0) -> F:
    """Three constants times an RBF interpolant of the log residual over log2 (m, n, k); of at most ``limit`` training rows, whose cube
    is its cost."""
    if len(train) > limit:
        train = train.take(np.random.default_rng(seed).choice(len(train), limit, replace=False))

    def axes(d: Shapes) -> F:
        return np.log2(np.stack([d.m, d.n, d.k], axis=1))

    rest = np.log(train.seconds / three_constants(train, machine, train))
    neighbours = min(len(train), 64)
    smooth = RBFInterpolator(axes(train), rest, neighbors=neighbours, smoothing=0.1, kernel="linear")
    return np.asarray(three_constants(train, machine, test) * np.exp(smooth(axes(test))), dtype=np.float64)


BASELINES: Mapping[str, Callable[[Shapes, Machine, Shapes], F]] = MappingProxyType(
    {
        "datasheet roofline": datasheet,
        "max(flop, bytes/0.8) + 3 us": rule_of_thumb,
        "two efficiencies (GenZ-style)": two_efficiencies,
        "three-constant roofline": three_constants,
        "roofline + RBF": roofline_rbf,
    }
)
"""Baselines by name."""
