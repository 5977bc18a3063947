"""Measurements and a datasheet to a calibrated GEMM section: constants, residual, intervals, and what could not be
known.

Use :func:`fit_gemm` for a device's own measurements (``prior`` lends the profile of a sibling or another stack to a
small sample); :class:`Problem` is a fit with something left out. :mod:`calibration.fit.anchor` moves a shipped profile
to a local stack without a fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from calibration.fit import residual as ridge
from calibration.fit.core import CLOSE, WEAK, Shapes, fit_constants, timed
from calibration.fit.errors import accuracy_of, few_groups, spread_of
from calibration.fit.residual import Axes, Block
from calibration.fit.solver import ConstantsFit, FittedPart, folds
from simulator.arrays import FloatArray
from simulator.cost.gemm_model import CoreTime, Machine, machine_core, quantised
from simulator.cost.residual_grid import Residual, residual_arrays, residual_of
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.profile import HardwareProfile, Provenance, Section
from simulator.uncertainty.gemm import uncertainty_of

FINE_ROWS, FINE_GROUPS = 1500, 30
"""Rows and (n, k) pairs from which the stack's own lattices are fitted; below, they learn noise."""
FOLDS, FEW_FOLDS = 5, 10
"""Parts of the (n, k) pairs, each predicted from the others; more on few rows, where a fifth would be missed."""
REFIT_ROWS = 200
"""Rows up to which the constants are fitted anew for each fold: on more they hardly move."""
FIT_ROWS, PRIOR_ROWS = 20, 10


def starting_constants(hw: HardwareProfile, dtype: str, prior: Section | None = None) -> dict[str, float]:
    """Where a fit begins: the prior's constants, else the architecture's."""
    values = {name: constant.default(hw.architecture) for name, constant in CONSTANTS.items()}
    machine = Machine.of(hw, dtype)
    values["b_hit"] = max(values["b_hit"], machine.bandwidth_bytes_per_s)
    if machine.element_bytes < 2.0:
        values |= {"e_tc": values["e_tc_8bit"], "t0": values["t0_8bit"]}
    elif machine.weight_bytes < machine.element_bytes:
        values |= quantised(values, machine.weight_bytes / machine.element_bytes)
    if prior is not None:
        values |= {name: prior[name] for name in prior.constants if name in values}
    return values


@dataclass(frozen=True)
class Problem:
    """What is to be fitted, the same from fold to fold."""

    machine: Machine
    start: Mapping[str, float]
    axes: tuple[Axes, ...]  # of the stack's own lattices
    prior: Section | None = None
    seed: int = 0
    free: tuple[str, ...] | None = None  # constants to fit; by default all that a table can identify
    smooth: bool = True  # whether the lattice over m, n, k is fitted

    @cached_property
    def lent(self) -> Residual | None:
        """The prior's residual."""
        return None if self.prior is None else residual_of(self.prior.arrays)

    def constants(self, data: Shapes) -> ConstantsFit:
        """Fitted constants."""
        spread = WEAK if self.prior is None else CLOSE
        return fit_constants(data, self.machine, self.start, self.free, spread, self.seed)

    def lattices(self, data: Shapes, values: Mapping[str, float]) -> tuple[list[Block], FloatArray, CoreTime]:
        """Lattices to fit, the log residual they are fitted to (after the prior's), and the analytic parts."""
        core, parts = machine_core(self.machine, values), timed(data, self.machine, values)
        target = np.log(data.seconds * 1e6 / parts.total_us)
        if self.lent is not None:
            target = target - self.lent.at(data.m, data.n, data.k, parts, core)
            smooth, own = ridge.STIFF, ridge.OWN
        else:
            few = len(data) < FINE_ROWS
            smooth = ridge.ALONE if few or not self.axes else ridge.SUPPLE
            own = ridge.FEW_OWN if few else ridge.OWN
        return ridge.blocks(data, parts, core, self.axes, smooth, own)[0 if self.smooth else 1 :], target, parts

    def unseen(self, data: Shapes, lattices: list[Block], target: FloatArray) -> FloatArray:
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

    def fit(self, data: Shapes, provenance: Provenance | None = None) -> FittedPart:
        """The section of measured shapes."""
        constants = self.constants(data)
        lattices, target, parts = self.lattices(data, constants.values)
        residual, measured = ridge.residual_from(lattices, ridge.solve(lattices, target), data.m), data.m
        if self.prior is not None and self.lent is not None:  # local data add to the prior's smooth lattice
            smooth, *own = self.lent.lattices
            smooth = replace(smooth, values=smooth.values + residual.lattices[0].values)
            residual, measured = replace(self.lent, lattices=(smooth, *own)), self.prior.arrays["measured_m"]
        unseen = self.unseen(data, lattices, target)
        known = np.isfinite(unseen)
        errors, seen = unseen[known], data.take(known)
        spread = 1.0
        if known.any():
            chosen = CoreTime(**{f.name: getattr(parts, f.name)[known] for f in fields(parts)})
            core, pairs = machine_core(self.machine, constants.values), int(data.groups.max()) + 1
            spread = spread_of(errors, uncertainty_of(core, seen.m, seen.n, seen.k, chosen)) * few_groups(pairs)
        arrays = residual_arrays(residual, measured) if lattices else {}
        sizes = np.log2(np.stack([data.m, data.n, data.k], axis=1))
        arrays["measured"] = np.stack([sizes.min(axis=0), sizes.max(axis=0)])
        scores = accuracy(errors, seen.m)
        section = Section(constants.fitted(), arrays, spread, scores, provenance, "calibrated")
        return FittedPart(section, constants, len(data), unseen)


def fit_gemm(
    data: Shapes,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    prior: Section | None = None,
    provenance: Provenance | None = None,
    seed: int = 0,
    fine: bool = False,
) -> FittedPart:
    """Calibrate the GEMM model on measured GEMMs of one number format (a label of a section: "bf16", "int4_wo") and the
    datasheet facts of ``hw``, whose own section is not used.

    ``prior`` is the section of a sibling device or another stack: its constants centre the search, its lattices are the
    residual's starting point. Without one, with ``fine`` (and on a CPU), lattices of the stack's own kernel choice are
    fitted beside the smooth one. ValueError for fewer than 20 rows, 10 with a prior.
    """
    if len(data) < (FIT_ROWS if prior is None else PRIOR_ROWS):
        few = f"a GEMM fit needs at least {FIT_ROWS} shapes, got {len(data)}"
        raise ValueError(f"{few}; to move a shipped profile to this stack, anchor it")
    machine = Machine.of(hw, dtype)
    axes: tuple[Axes, ...] = ()
    if prior is None and (fine or machine.packs):
        many = len(data) >= FINE_ROWS and int(data.groups.max()) + 1 >= FINE_GROUPS
        axes = ridge.terms_of(machine, many)
    return Problem(machine, starting_constants(hw, dtype, prior), axes, prior, seed).fit(data, provenance)


def accuracy(log_ratio: FloatArray, m: FloatArray) -> dict[str, float]:
    """Errors from log predicted over measured times (see :func:`accuracy_of`), and "mape_..." by range of m."""
    if not len(log_ratio):
        return {}
    error = np.expm1(log_ratio)
    out = accuracy_of(error)
    for label, rows in (("m_1_16", m <= 16), ("m_17_256", (m > 16) & (m <= 256)), ("m_257_up", m > 256)):
        if rows.any():
            out[f"mape_{label}"] = float(np.abs(error[rows]).mean())
    return out
