"""Measurements and a datasheet to a calibrated GEMM section: constants, residual, intervals, and what could not be known.

Use :func:`fit_gemm` for a device's own measurements (``prior`` lends the profile of a sibling or another stack to a small sample),
:func:`anchor_gemm` to
move a shipped section to a local stack with 20-100 shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.conformal import bands, pair_bands
from calibration.fit.core import CLOSE, WEAK, ConstantsFit, Shapes, fit_constants, machine_of, shapes, timed
from calibration.fit.residual import (
    FEW,
    FEW_OWN,
    FEW_ROWS,
    OWN,
    STIFF,
    SUPPLE,
    Block,
    FewRows,
    add_residuals,
    blocks,
    evaluate,
    residual_from,
    solve,
    terms_of,
)
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.profile import Fitted, HardwareProfile, Provenance, Section
from simulator.kernels.gemm_core import Core, CoreTime, Machine, machine_core
from simulator.kernels.lattice import Residual, residual_arrays, residual_of, smooth_arrays

F = NDArray[np.float64]

FINE_ROWS, FINE_GROUPS = 1500, 30
"""Rows and (n, k) pairs from which the stack's own lattices are fitted; below, they learn noise (DESIGN section 10)."""
FOLDS, FEW_FOLDS = 5, 10
"""Parts of the (n, k) pairs, each predicted from the others; more on few rows, where a fifth would be missed."""
REFIT_ROWS = 200
"""Rows up to which the constants are fitted anew for each fold: on more they hardly move."""
FIT_ROWS, ANCHOR_ROWS = 20, 10


@dataclass(frozen=True)
class GemmFit:
    """A fitted section and its report.

    Attributes
    ----------
    section : Section
    constants : ConstantsFit
    unseen : array
        Log of predicted over measured, each row predicted by a fit to other (n, k) pairs.
    data : Shapes
    """

    section: Section
    constants: ConstantsFit
    unseen: F
    data: Shapes


def starting_constants(hw: HardwareProfile, dtype: str, prior: Section | None = None) -> dict[str, float]:
    """Where a fit begins: the prior's constants, else the architecture's."""
    values = {name: constant.default(hw.architecture) for name, constant in CONSTANTS.items()}
    if dtype in ("fp8", "int8"):
        values |= {"e_tc": values["e_tc_8bit"], "t0": values["t0_8bit"]}
    if prior is not None:
        values |= {name: prior[name] for name in prior.constants if name in values}
    return values


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
    fine: bool | None = None,
    intervals: bool = True,
    provenance: Provenance | None = None,
    seed: int = 0,
) -> GemmFit:
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
        Of a sibling device or another stack: its constants centre the search, its lattices are the residual's starting point.
    fine : bool, optional
        Fit the stack's own lattices too; by default from :data:`FINE_ROWS` rows of :data:`FINE_GROUPS` pairs on.
    intervals : bool
        Predict every row from other (n, k) pairs, for intervals and accuracy; costs :data:`FOLDS` fits.
    provenance : Provenance, optional
    seed : int

    Returns
    -------
    GemmFit

    Raises
    ------
    ValueError
        For bad arrays, or fewer than 20 rows.
    """
    machine = machine_of(hw, dtype)
    data = shapes(m, n, k, seconds, machine, copies)
    if len(data) < (ANCHOR_ROWS if prior is not None else FIT_ROWS):
        raise ValueError(
            f"a GEMM fit needs at least {FIT_ROWS} shapes, got {len(data)}; to move a shipped profile to this stack, anchor it"
        )
    start = starting_constants(hw, dtype, prior)
    groups = data.groups
    own = fine if fine is not None else prior is None and len(data) >= FINE_ROWS and groups.max() + 1 >= FINE_GROUPS
    axes = () if prior is not None else terms_of(machine, own)
    stage = _Stage(
        machine,
        start,
        CLOSE if prior is not None else WEAK,
        axes,
        None if prior is None else residual_of(prior.arrays),
        seed,
    )
    constants, core, parts, lattices, target = stage.prepare(data)
    values = solve(lattices, target)
    unseen = stage.unseen(data, lattices, target, _folds(groups, seed)) if intervals else np.full(len(data), np.nan)
    residual = residual_from(lattices, values, data.m)
    if stage.residual is not None:
        residual = add_residuals(stage.residual, residual)
        measured = prior.arrays["measured_m"] if prior is not None and "measured_m" in prior.arrays else data.m
    else:
        measured = data.m
    known = np.isfinite(unseen)
    return GemmFit(
        Section(
            MappingProxyType(_fitted(constants)),
            MappingProxyType(residual_arrays(residual, measured)),
            (
                *bands(unseen[known], data.m[known], _take(parts, known), core, int(groups.max()) + 1, prior),
                *pair_bands(unseen[known], data.take(known)),
            )
            if known.any()
            else (),
            MappingProxyType(accuracy(unseen[known], data.m[known])),
            provenance,
            "calibrated",
        ),
        constants,
        unseen,
        data,
    )


@dataclass(frozen=True)
class _Stage:
    """What a fit keeps from fold to fold."""

    machine: Machine
    start: Mapping[str, float]
    spread: float
    axes: Sequence[tuple[str, ...]]
    residual: Residual | None
    seed: int

    def prepare(self, data: Shapes) -> tuple[ConstantsFit, Core, CoreTime, list[Block], F]:
        constants = fit_constants(data, self.machine, self.start, prior=self.spread, seed=self.seed)
        core = machine_core(self.machine, constants.values)
        lattices, target, parts = self.lattices(data, constants)
        return constants, core, parts, lattices, target

    def lattices(self, data: Shapes, constants: ConstantsFit) -> tuple[list[Block], F, CoreTime]:
        """Lattices to fit and the log residual they are fitted to, after the prior's."""
        core = machine_core(self.machine, constants.values)
        parts = timed(data, self.machine, constants.values)
        target = np.log(data.seconds * 1e6 / parts.total_us)
        if self.residual is not None:
            target = target - self.residual.at(data.m, data.n, data.k, parts, core)
        smooth, own = (
            (STIFF, OWN) if self.residual is not None else (FEW, FEW_OWN) if len(data) < FINE_ROWS else (SUPPLE, OWN)
        )
        return blocks(data, parts, core, self.axes, data.m, smooth, own), target, parts

    def unseen(self, data: Shapes, lattices: list[Block], target: F, fold: NDArray[np.intp]) -> F:
        """Log predicted over measured of each row, from a fit to the other folds; on few rows the constants are fitted anew too."""
        out = np.full(len(data), np.nan)
        few = FewRows.of(lattices) if len(data) <= FEW_ROWS else None
        for i in range(int(fold.max()) + 1):
            train, test = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
            if not len(test) or len(train) < 10:
                continue
            if few is None:
                out[test] = evaluate(lattices, solve(lattices, target, train), test) - target[test]
                continue
            if len(data) <= REFIT_ROWS:
                constants = fit_constants(data.take(train), self.machine, self.start, prior=self.spread, seed=self.seed)
                lattices, target, _ = self.lattices(data, constants)
                few = FewRows.of(lattices)
            out[test] = few.at(few.dual(target, train), train, test) - target[test]
        return out


def anchor_gemm(
    section: Section,
    m: Any,
    n: Any,
    k: Any,
    seconds: Any,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    copies: Any = None,
    provenance: Provenance | None = None,
) -> GemmFit:
    """Move a section to a local stack with few shapes: constants near its own ones, and a stiff correction of its smooth lattice.

    The stack's own lattices stay if the local shapes, each predicted from the others, are predicted no worse with them.

    Parameters
    ----------
    section : Section
        Shipped one of this device or a sibling.
    m, n, k, seconds : array
        10 local shapes or more; 20 to 100 do.
    hw, dtype, copies, provenance
        As in :func:`fit_gemm`.

    Returns
    -------
    GemmFit

    Raises
    ------
    ValueError
        For fewer shapes.
    """
    machine = machine_of(hw, dtype)
    data = shapes(m, n, k, seconds, machine, copies)
    if len(data) < ANCHOR_ROWS:
        raise ValueError(f"re-anchoring needs at least {ANCHOR_ROWS} shapes, got {len(data)}")
    smooth = replace(section, arrays=MappingProxyType(smooth_arrays(section.arrays)))
    tried = []
    for base in (section, smooth) if len(section.arrays.get("terms", ())) > 1 else (section,):
        found = fit_gemm(
            data.m,
            data.n,
            data.k,
            data.seconds,
            hw,
            dtype=dtype,
            copies=data.copies,
            prior=base,
            fine=False,
            provenance=provenance,
        )
        tried.append((float(np.abs(np.expm1(found.unseen)).mean()), found))
    return min(tried, key=lambda t: t[0])[1]


def _folds(groups: NDArray[np.intp], seed: int) -> NDArray[np.intp]:
    order = np.random.default_rng(seed).permutation(groups.max() + 1)
    return np.asarray(order[groups] % (FEW_FOLDS if len(groups) <= FEW_ROWS else FOLDS))


def _fitted(fit: ConstantsFit) -> dict[str, Fitted]:
    out = {}
    for name, value in fit.values.items():
        error = fit.std_errors.get(name)
        out[name] = Fitted(
            float(value), error, "fitted" if error is not None else "fixed" if name in fit.fixed else "default"
        )
    return out


def _take(parts: CoreTime, rows: Any) -> CoreTime:
    return CoreTime(**{name: getattr(parts, name)[rows] for name in parts.__dataclass_fields__})


def accuracy(log_ratio: F, m: F) -> dict[str, float]:
    """MAPE, median and 95th percentile of the relative error and its signed mean, in percent, all m and by range of m."""
    if not len(log_ratio):
        return {}
    error = 100.0 * np.expm1(log_ratio)
    out = {
        "mape": np.abs(error).mean(),
        "median": np.median(np.abs(error)),
        "p95": np.quantile(np.abs(error), 0.95),
        "bias": error.mean(),
    }
    for label, rows in (("m_1_16", m <= 16), ("m_17_256", (m > 16) & (m <= 256)), ("m_257_up", m > 256)):
        if rows.any():
            out[f"mape_{label}"] = np.abs(error[rows]).mean()
    return {name: float(v) for name, v in out.items()}
