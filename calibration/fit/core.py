"""Measured GEMMs and the named constants of the analytic model, fitted to them.

Use :func:`shapes` or :func:`shapes_of` to hold measurements, :func:`fit_constants` to fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.solver import ConstantsFit, Minimum, Table, fit_logs, gauss_newton, numbered, soft_l1
from calibration.records.screening import rotated_copies
from calibration.records.timing_table import Records
from simulator.arrays import FloatArray
from simulator.cost.gemm_model import CoreTime, Machine, core_time, machine_core
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS

ROWS = 6000
"""Rows the constants are fitted on; more do not move them."""
PACK_FROM = (2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
"""Rows from which a CPU's product may rearrange its weights: the one that leaves the least spread is taken."""
STARTS = 3
"""Further places the search begins at."""
WEAK, CLOSE = 1.0, 0.15
"""Log spread of a prior that only steadies (architecture defaults), and of one from a sibling device or another
stack."""


@dataclass(frozen=True)
class Shapes(Table):
    """Measured GEMMs; ``copies`` are the weights each benchmark used in turn (see ``gemm_time``)."""

    m: FloatArray
    n: FloatArray
    k: FloatArray
    seconds: FloatArray
    copies: FloatArray

    @property
    def groups(self) -> NDArray[np.intp]:
        """Number of each row's (n, k) pair, from 0."""
        return numbered(self.n, self.k)


def shapes(m: Any, n: Any, k: Any, seconds: Any, machine: Machine, copies: Any = None) -> Shapes:
    """Arrays to :class:`Shapes`.

    ``copies`` are the weights used in turn, ``inf`` for cold ones; by default those of the published tables: enough to
    fill L2 once, at most 6.

    Raises
    ------
    ValueError
        For arrays of different lengths, dimensions below 1, or times that are not positive and finite: how many of
        which.
    """
    m, n, k, seconds = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (m, n, k, seconds))
    lengths = [len(c) for c in (m, n, k, seconds)]
    if len(set(lengths)) > 1:
        raise ValueError(f"m, n, k, seconds: expected equal lengths, got {', '.join(map(str, lengths))}")
    bad = ~(np.isfinite(seconds) & (seconds > 0))
    if bad.any():
        raise ValueError(f"seconds: expected positive finite times, got {int(bad.sum())} of {len(bad)} that are not")
    small = ~((m >= 1) & (n >= 1) & (k >= 1))
    if small.any():
        raise ValueError(f"m, n, k: expected at least 1, got less in {int(small.sum())} of {len(small)} rows")
    if copies is None:
        copies = rotated_copies(machine.weight_bytes * n * k, machine.l2_bytes)
    return Shapes(m, n, k, seconds, np.array(np.broadcast_to(np.asarray(copies, dtype=np.float64), m.shape)))


def shapes_of(records: Records, machine: Machine) -> Shapes:
    """The GEMMs among records as a fit takes them."""
    r = records.select(records.is_operator("gemm"))
    return shapes(r.m, r.n, r.k, r.seconds, machine, weight_copies(r))


def weight_copies(records: Records) -> FloatArray:
    """Weights used in turn, as the GEMM model counts them: infinitely many where the benchmark kept them cold."""
    return np.where(records.copies > 0, records.copies, np.where(records.cold, np.inf, 1.0)).astype(np.float64)


def free_constants(machine: Machine) -> tuple[str, ...]:
    """Constants a dense table can identify on a machine."""
    if machine.packs:
        return ("t0", "e_tc", "e_d", "b_hit", "pack")
    names = ["t0", "e_tc", "tau", "b_e", "e_d", "b_hit", "c_l2", "t_s", "b_s"]
    if not machine.persistent:
        names.append("b_l2")
    if machine.element_bytes < 2.0:
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
    """The constants ``names`` (by default :func:`free_constants`) from measurements.

    The search begins at ``start``, which has all constants, and again at :data:`STARTS` places round it; the fit of the
    least spread is taken. A prior of log spread ``prior`` is centred at ``start``. ``seed`` chooses :data:`ROWS` rows.
    L2 is no slower than DRAM. A constant on its bound stays there, one whose log the data leave wider than 0.5 is put
    back to its start; both are named in ``fixed``.
    """
    if len(data) > ROWS:
        data = data.take(np.sort(np.random.default_rng(seed).choice(len(data), ROWS, replace=False)))
    target = np.log(data.seconds * 1e6)
    ranges = {name: CONSTANTS[name] for name in names or free_constants(machine)}
    if "b_hit" in ranges:
        ranges["b_hit"] = replace(ranges["b_hit"], low=machine.bandwidth_bytes_per_s)
    weak = min(0.5, 0.45 * prior) if prior >= WEAK else 0.5
    search: dict[str, Any] = {"prior": prior, "center": start, "data_only": True, "x_scale": 0.1, "max_nfev": 80}

    def log_residual(values: Mapping[str, float]) -> FloatArray:
        return np.asarray(np.log(timed(data, machine, values).total_us) - target)

    def covariance(found: Minimum, _: Mapping[str, float]) -> tuple[FloatArray, float]:
        rows = found.rows[: len(data)]
        spread = float(np.sqrt(np.sum(rows**2) / max(len(data) - len(found.names), 1)))
        return gauss_newton(found.slopes, max(spread, 1e-9)), spread

    def fit(origin: Mapping[str, float]) -> ConstantsFit:
        return fit_logs(log_residual, origin, ranges, covariance, weak=weak, **search)

    def spread(found: ConstantsFit) -> float:
        return float(np.mean(soft_l1(log_residual(found.values)) ** 2))

    if not machine.packs:
        rng = np.random.default_rng(0)
        places = [{n: start[n] * np.exp(rng.normal(0.0, 0.3)) for n in ranges} for _ in range(STARTS)]
        return min((fit({**start, **place}) for place in ({}, *places)), key=spread)
    best = min((fit({**start, "pack_m": at}) for at in PACK_FROM), key=lambda tried: tried.spread)
    return replace(best, fixed={**best.fixed, "pack_m": f"the best of {', '.join(f'{at:g}' for at in PACK_FROM)}"})
