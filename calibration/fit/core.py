"""Fit of the named constants of the analytic GEMM model: robust least squares in log time, with what the data cannot identify named
and fixed.

Use :func:`fit_constants`; :func:`bootstrap` for a spread that does not trust the model, :class:`Shapes` to hold measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.gemm_core import (
    ELEMENT_BYTES,
    PACKING_ARCHITECTURES,
    PERSISTENT_ARCHITECTURES,
    CoreTime,
    Machine,
    core_time,
    machine_core,
)

F = NDArray[np.float64]

HUBER = 0.05
"""Log residual from which a row counts less: kernel choice makes steps of 5-15 % (DESIGN section 10)."""
ROWS = 6000
"""Rows the constants are fitted on; more do not move them."""
PACK_FROM = (2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
"""Rows from which a CPU's product may rearrange its weights: the one that leaves the least spread is taken."""
WEAK, CLOSE = 1.0, 0.15
"""Log spread of a prior that only steadies (architecture defaults), and of one from a sibling device or another stack."""


@dataclass(frozen=True)
class Shapes:
    """Measured GEMMs: equal-length float64 arrays, seconds, and the weights each benchmark used in turn (see ``gemm_time``)."""

    m: F
    n: F
    k: F
    seconds: F
    copies: F

    def __len__(self) -> int:
        return len(self.m)

    def take(self, rows: Any) -> Shapes:
        """Rows by mask or index."""
        return Shapes(self.m[rows], self.n[rows], self.k[rows], self.seconds[rows], self.copies[rows])

    @property
    def groups(self) -> NDArray[np.intp]:
        """Number of each row's (n, k) pair, from 0."""
        return np.unique(self.n * 2.0**24 + self.k, return_inverse=True)[1].reshape(-1)


def rotated_copies(n: F, k: F, machine: Machine) -> F:
    """Weights the published tables use in turn: enough to fill L2 once, at most 6."""
    return np.clip(np.ceil(machine.l2_bytes / (machine.weight_bytes * n * k)), 1.0, 6.0)


def shapes(m: Any, n: Any, k: Any, seconds: Any, machine: Machine, copies: Any = None) -> Shapes:
    """Arrays to :class:`Shapes`.

    Parameters
    ----------
    m, n, k, seconds : array
    machine : Machine
    copies : array or float, optional
        Weights used in turn; by default those of the published tables (:func:`rotated_copies`). ``inf``: cold.

    Raises
    ------
    ValueError
        For arrays of different lengths, dimensions below 1, or times that are not positive and finite: how many of which.
    """
    columns = [np.asarray(v, dtype=np.float64).reshape(-1) for v in (m, n, k, seconds)]
    if len({len(c) for c in columns}) > 1:
        raise ValueError(f"m, n, k, seconds: expected equal lengths, got {', '.join(str(len(c)) for c in columns)}")
    bad = ~(np.isfinite(columns[3]) & (columns[3] > 0))
    if bad.any():
        raise ValueError(f"seconds: expected positive finite times, got {int(bad.sum())} of {len(bad)} that are not")
    small = ~((columns[0] >= 1) & (columns[1] >= 1) & (columns[2] >= 1))
    if small.any():
        raise ValueError(f"m, n, k: expected at least 1, got less in {int(small.sum())} of {len(small)} rows")
    used = (
        rotated_copies(columns[1], columns[2], machine)
        if copies is None
        else np.broadcast_to(np.asarray(copies, dtype=np.float64), columns[0].shape)
    )
    return Shapes(columns[0], columns[1], columns[2], columns[3], np.array(used))


def machine_of(hw: HardwareProfile, dtype: str) -> Machine:
    """Datasheet facts of a device's arithmetic, dense."""
    element = ELEMENT_BYTES[dtype]
    return Machine(
        hw.rate(dtype).flop_per_s,
        float(hw.bandwidth_bytes_per_s),
        float(hw.l2_bytes),
        int(hw.sm_count),
        max(1.0, float(hw.clock_headroom)),
        element,
        element,
        hw.architecture in PERSISTENT_ARCHITECTURES,
        hw.architecture in PACKING_ARCHITECTURES,
    )


@dataclass(frozen=True)
class ConstantsFit:
    """Constants of the analytic form, and how well the data know them.

    Attributes
    ----------
    values : mapping of str to float
        All constants, SI.
    std_errors : mapping of str to float
        Of the fitted ones, SI.
    fixed : mapping of str to str
        Constants that were free and had to be fixed -> why.
    correlation : array
        Of the logs of the fitted constants, in the order of ``std_errors``.
    spread : float
        Standard deviation of the log residuals the errors assume.
    """

    values: Mapping[str, float]
    std_errors: Mapping[str, float]
    fixed: Mapping[str, str]
    correlation: F
    spread: float


def free_constants(machine: Machine) -> tuple[str, ...]:
    """Constants a dense table can identify on a machine."""
    if machine.packs:
        return ("t0", "e_tc", "e_d", "b_hit", "pack")
    names = ["t0", "e_tc", "tau", "b_e", "e_d", "b_hit", "c_l2", "t_s", "b_s"]
    if not machine.persistent:
        names.append("b_l2")
    if machine.element_bytes == 1.0:
        names.append("b_convert")
    return tuple(names)


def timed(data: Shapes, machine: Machine, values: Mapping[str, float]) -> CoreTime:
    """The analytic form at measured shapes, float64."""
    copies = None if np.isinf(data.copies).all() else data.copies
    return core_time(data.m, data.n, data.k, machine_core(machine, values), copies)


def fit_constants(
    data: Shapes,
    machine: Machine,
    start: Mapping[str, float],
    names: Sequence[str] | None = None,
    prior: float = WEAK,
    seed: int = 0,
) -> ConstantsFit:
    """Named constants from measurements, by robust least squares of log time.

    Parameters
    ----------
    data : Shapes
    machine : Machine
    start : mapping of str to float
        All constants; where the search begins and where the prior is centred.
    names : sequence of str, optional
        Constants to fit; by default :func:`free_constants`.
    prior : float
        Log spread of the prior around ``start``.
    seed : int
        Of the choice of :data:`ROWS` rows.

    Returns
    -------
    ConstantsFit
        A constant on its bound, or whose log the data leave wider than 0.5, is put back to its start and named in ``fixed``.
    """
    if len(data) > ROWS:
        data = data.take(np.sort(np.random.default_rng(seed).choice(len(data), ROWS, replace=False)))
    if not machine.packs:
        return _fit_constants(data, machine, start, list(names or free_constants(machine)), prior)
    tried = (
        _fit_constants(data, machine, {**start, "pack_m": at}, list(names or free_constants(machine)), prior)
        for at in PACK_FROM
    )
    best = min(tried, key=lambda fit: fit.spread)
    return replace(best, fixed={**best.fixed, "pack_m": f"the best of {', '.join(f'{at:g}' for at in PACK_FROM)}"})


def _fit_constants(
    data: Shapes, machine: Machine, start: Mapping[str, float], free: list[str], prior: float
) -> ConstantsFit:
    target = np.log(data.seconds * 1e6)
    fixed: dict[str, str] = {}
    while True:
        low = np.log([max(CONSTANTS[x].low, 1e-9) for x in free])
        high = np.log([CONSTANTS[x].high for x in free])
        origin = np.clip(np.log([max(start[x], 1e-9) for x in free]), low + 1e-3, high - 1e-3)

        def errors(x: F, free: Sequence[str] = free, origin: F = origin) -> F:
            values = {**start, **dict(zip(free, np.exp(x), strict=True))}
            misfit = np.log(timed(data, machine, values).total_us) - target
            # the prior counts as one row of ordinary misfit a constant, and rows are weighed down as soft-L1 does, so that it stays
            # outside the loss
            return np.concatenate([_soft(misfit), HUBER / prior * (x - origin)])

        found = least_squares(errors, origin, bounds=(low, high), x_scale=0.1, max_nfev=80)
        misfit = (
            np.log(timed(data, machine, {**start, **dict(zip(free, np.exp(found.x), strict=True))}).total_us) - target
        )
        spread = float(np.sqrt(np.sum(_soft(misfit) ** 2) / max(len(data) - len(free), 1)))
        slopes = np.asarray(found.jac)
        precision = slopes.T @ slopes
        covariance = np.linalg.pinv(precision) * max(spread, 1e-9) ** 2
        errors_log = np.sqrt(np.diag(covariance))
        gone = {}
        for i, name in enumerate(free):
            if min(found.x[i] - low[i], high[i] - found.x[i]) < 1e-2:
                gone[name] = "on its bound"
            elif errors_log[i] > 0.5 or (prior >= WEAK and errors_log[i] > 0.45 * prior):
                gone[name] = "not identified by these shapes"
        if not gone or len(gone) == len(free):
            break
        fixed |= gone
        free = [name for name in free if name not in gone]
    values = {**start, **dict(zip(free, (float(v) for v in np.exp(found.x)), strict=True))}
    scale = np.where(errors_log > 0, errors_log, 1.0)
    return ConstantsFit(
        values,
        {name: float(values[name] * e) for name, e in zip(free, errors_log, strict=True)},
        fixed,
        covariance / np.outer(scale, scale),
        spread,
    )


def _soft(misfit: F) -> F:
    """Residuals whose square is the soft-L1 loss."""
    z = (misfit / HUBER) ** 2
    return np.sign(misfit) * HUBER * np.sqrt(2.0 * (np.sqrt(1.0 + z) - 1.0))


def bootstrap(
    data: Shapes, machine: Machine, fit: ConstantsFit, repeats: int = 50, seed: int = 0, rows: int = 2000
) -> Mapping[str, float]:
    """Relative spread of the constants over samples of (n, k) pairs drawn with replacement: it includes what the form gets wrong.

    Parameters
    ----------
    data : Shapes
    machine : Machine
    fit : ConstantsFit
    repeats, seed : int
    rows : int
        Of each sample at most.

    Returns
    -------
    mapping of str to float
        Constant -> standard deviation of its log.
    """
    rng = np.random.default_rng(seed)
    groups = data.groups
    order = np.argsort(groups, kind="stable")
    edges = np.searchsorted(groups[order], np.arange(groups.max() + 2))
    names = tuple(fit.std_errors)
    logs = []
    for _ in range(repeats):
        chosen = rng.integers(0, groups.max() + 1, groups.max() + 1)
        index = np.concatenate([order[edges[g] : edges[g + 1]] for g in chosen])
        if len(index) > rows:
            index = rng.choice(index, rows, replace=False)
        again = fit_constants(data.take(index), machine, fit.values, names)
        logs.append([np.log(again.values[name]) for name in names])
    return dict(zip(names, (float(v) for v in np.std(logs, axis=0)), strict=True))


def with_values(fit: ConstantsFit, **values: float) -> ConstantsFit:
    """The fit with some values changed."""
    return replace(fit, values={**fit.values, **values})
