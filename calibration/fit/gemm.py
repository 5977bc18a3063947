"""Measurements and a datasheet to a calibrated GEMM section: constants, residual, intervals, and what could not be
known.

Use :func:`fit_gemm` for a device's own measurements (``prior`` lends the profile of a sibling or another stack to a
small sample), :func:`anchor_gemm` to move a shipped section to a local stack with 20-100 shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import residual as ridge
from calibration.fit.conformal import accuracy_of, bands, pair_bands
from calibration.fit.core import CLOSE, WEAK, Shapes, fit_constants, shapes, timed
from calibration.fit.residual import Axes, Block
from calibration.fit.solver import ConstantsFit, FittedPart, folds
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.profile import HardwareProfile, Interval, Provenance, Section
from simulator.kernels.gemm_core import CoreTime, Machine, machine_core
from simulator.kernels.lattice import Residual, residual_arrays, residual_of, smooth_arrays

F = NDArray[np.float64]

FINE_ROWS, FINE_GROUPS = 1500, 30
"""Rows and (n, k) pairs from which the stack's own lattices are fitted; below, they learn noise (DESIGN section 10)."""
FOLDS, FEW_FOLDS = 5, 10
"""Parts of the (n, k) pairs, each predicted from the others; more on few rows, where a fifth would be missed."""
REFIT_ROWS = 200
"""Rows up to which the constants are fitted anew for each fold: on more they hardly move."""
FIT_ROWS, ANCHOR_ROWS = 20, 10


def starting_constants(hw: HardwareProfile, dtype: str, prior: Section | None = None) -> dict[str, float]:
    """Where a fit begins: the prior's constants, else the architecture's."""
    values = {name: constant.default(hw.architecture) for name, constant in CONSTANTS.items()}
    if dtype in ("fp8", "int8"):
        values |= {"e_tc": values["e_tc_8bit"], "t0": values["t0_8bit"]}
    if prior is not None:
        values |= {name: prior[name] for name in prior.constants if name in values}
    return values


@dataclass(frozen=True)
class _Problem:
    """What a fit keeps from fold to fold."""

    machine: Machine
    start: Mapping[str, float]
    spread: float
    axes: tuple[Axes, ...]
    prior: Residual | None
    seed: int

    def constants(self, data: Shapes) -> ConstantsFit:
        return fit_constants(data, self.machine, self.start, prior=self.spread, seed=self.seed)

    def lattices(self, data: Shapes, values: Mapping[str, float]) -> tuple[list[Block], F, CoreTime]:
        """Lattices to fit, the log residual they are fitted to (after the prior's), and the analytic parts."""
        core, parts = machine_core(self.machine, values), timed(data, self.machine, values)
        target = np.log(data.seconds * 1e6 / parts.total_us)
        if self.prior is not None:
            target = target - self.prior.at(data.m, data.n, data.k, parts, core)
            smooth, own = ridge.STIFF, ridge.OWN
        else:
            few = len(data) < FINE_ROWS
            smooth, own = (ridge.FEW, ridge.FEW_OWN) if few else (ridge.SUPPLE, ridge.OWN)
        return ridge.blocks(data, parts, core, self.axes, data.m, smooth, own), target, parts

    def unseen(self, data: Shapes, lattices: list[Block], target: F) -> F:
        """Log predicted over measured of each row, from a fit to the other folds; on few rows the constants are fitted
        anew too."""
        out = np.full(len(data), np.nan)
        few = ridge.FewRows.of(lattices) if len(data) <= ridge.FEW_ROWS else None
        for train, test in folds(data.groups, FEW_FOLDS if few else FOLDS, np.random.default_rng(self.seed)):
            if len(train) < 10:
                continue
            if few is None:
                found = ridge.evaluate(lattices, ridge.solve(lattices, target, train), test)
            else:
                if len(data) <= REFIT_ROWS:
                    lattices, target, _ = self.lattices(data, self.constants(data.take(train)).values)
                    few = ridge.FewRows.of(lattices)
                found = few.at(few.dual(target, train), train, test)
            out[test] = found - target[test]
        return out


def fit_gemm(
    m: Any,
    n: Any,
    k: Any,
    seconds: Any,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    copies: Any = None,
    prior: Section | None = None,
    provenance: Provenance | None = None,
    seed: int = 0,
) -> FittedPart:
    """Calibrate the GEMM model.

    Parameters
    ----------
    m, n, k, seconds : array
        Measured dense GEMMs.
    hw : HardwareProfile
        Datasheet facts; its own GEMM section is not used.
    dtype : str
    copies : array or float, optional
        Weights each measurement used in turn; by default the rule of the published tables. ``inf``: cold.
    prior : Section, optional
        Of a sibling device or another stack: its constants centre the search, its lattices are the residual's starting
        point. Without one, the stack's own lattices are fitted too.
    provenance, seed

    Raises
    ------
    ValueError
        For bad arrays, or fewer than 20 rows.
    """
    machine = Machine.of(hw, dtype)
    data = shapes(m, n, k, seconds, machine, copies)
    if len(data) < (ANCHOR_ROWS if prior is not None else FIT_ROWS):
        few = f"a GEMM fit needs at least {FIT_ROWS} shapes, got {len(data)}"
        raise ValueError(f"{few}; to move a shipped profile to this stack, anchor it")
    start, pairs = starting_constants(hw, dtype, prior), int(data.groups.max()) + 1
    if prior is None:
        own = ridge.terms_of(machine, len(data) >= FINE_ROWS and pairs >= FINE_GROUPS)
        problem = _Problem(machine, start, WEAK, own, None, seed)
    else:
        problem = _Problem(machine, start, CLOSE, (), residual_of(prior.arrays), seed)
    constants = problem.constants(data)
    lattices, target, parts = problem.lattices(data, constants.values)
    residual, measured = ridge.residual_from(lattices, ridge.solve(lattices, target), data.m), data.m
    if prior is not None and problem.prior is not None:
        residual, measured = ridge.add_residuals(problem.prior, residual), prior.arrays["measured_m"]
    unseen = problem.unseen(data, lattices, target)
    known = np.isfinite(unseen)
    errors, seen = unseen[known], data.take(known)
    intervals: tuple[Interval, ...] = ()
    if known.any():
        chosen = CoreTime(**{f.name: getattr(parts, f.name)[known] for f in fields(parts)})
        intervals = bands(errors, seen.m, chosen, machine_core(machine, constants.values), pairs, prior)
        intervals += pair_bands(errors, seen)
    arrays, scores = residual_arrays(residual, measured), accuracy(errors, seen.m)
    section = Section(constants.fitted(), arrays, intervals, scores, provenance, "calibrated")
    return FittedPart(section, constants, len(data), unseen)


def anchor_gemm(
    section: Section, m: Any, n: Any, k: Any, seconds: Any, hw: HardwareProfile, **known: Any
) -> FittedPart:
    """Move a section to a local stack with few shapes: constants near its own ones, and a stiff correction of its
    smooth lattice.

    The stack's own lattices stay if the local shapes, each predicted from the others, are predicted no worse with them.

    Parameters
    ----------
    section : Section
        Shipped one of this device or a sibling.
    m, n, k, seconds : array
        10 local shapes or more; 20 to 100 do.
    hw : HardwareProfile
    **known
        ``dtype``, ``copies`` and ``provenance``, as in :func:`fit_gemm`.

    Raises
    ------
    ValueError
        For fewer shapes.
    """
    rows = len(shapes(m, n, k, seconds, Machine.of(hw, known.get("dtype", "bf16"))))
    if rows < ANCHOR_ROWS:
        raise ValueError(f"re-anchoring needs at least {ANCHOR_ROWS} shapes, got {rows}")
    bases = [section]
    if len(section.arrays.get("terms", ())) > 1:
        bases.append(replace(section, arrays=smooth_arrays(section.arrays)))
    tried = [fit_gemm(m, n, k, seconds, hw, prior=base, **known) for base in bases]
    return min(tried, key=lambda fit: float(np.abs(np.expm1(fit.unseen)).mean()))


def accuracy(log_ratio: F, m: F) -> dict[str, float]:
    """Errors from log predicted over measured times (see :func:`accuracy_of`), and "mape_..." by range of m."""
    if not len(log_ratio):
        return {}
    out = accuracy_of(log_ratio)
    for label, rows in (("m_1_16", m <= 16), ("m_17_256", (m > 16) & (m <= 256)), ("m_257_up", m > 256)):
        if rows.any():
            out[f"mape_{label}"] = float(np.abs(np.expm1(log_ratio[rows])).mean())
    return out
