"""Calibration of GEMMs of one number format. A ``prior`` is the section of a related GPU or of
another stack; with it a small sample is enough."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calibration.fit import residual as ridge
from calibration.fit.residual import ResidualBlock
from calibration.fit.section import FOLDS, Fit, few_groups
from calibration.fit.solver import (
    ConstantsFit,
    FittedPart,
    Minimum,
    fit_logs,
    folds,
    gauss_newton,
    numbered,
    soft_l1,
)
from calibration.records.screening import rotated_copies
from calibration.records.timing_table import Records
from simulator.arrays import BoolArray, FloatArray, IndexArray
from simulator.codes import DTYPE_BYTES
from simulator.hardware.profile import HardwareProfile, Section
from simulator.operators.base import Constant, Machine, ResidualGrid, RowResidual, Values
from simulator.operators.gemm import EDGE, Products
from simulator.operators.gemm import GEMM_CONSTANTS as CONSTANTS
from simulator.operators.gemm_model import weight_only_constants

ROWS = 6000  # rows that the constants are fitted on; more do not change them
# rows from which a CPU may rearrange weights: the best value is kept
PACK_FROM = (2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
STARTS = 3  # additional random starts of the search
# log standard deviation of priors: an architecture's defaults; a related GPU or another stack
WEAK, CLOSE = 1.0, 0.15
# folds of the (n, k) pairs on few rows: five folds would leave too few rows for the fits
FEW_FOLDS = 10
# rows up to which the constants are fitted again for each fold: on more they hardly change
REFIT_ROWS = 200
FIT_ROWS, PRIOR_ROWS = 20, 10  # rows that a fit needs, without and with a prior
STEP = 0.1  # log time by which more tokens may be faster where a residual comes from another table


@dataclass(frozen=True)
class GemmFit(Fit):
    calls: Products
    start: Values = field(default_factory=dict)  # start of the search
    prior: Section | None = None
    seed: int = 0

    REGULARISATION = ridge.ALONE

    def groups(self, by: str = "") -> IndexArray:
        return numbered(self.calls.n, self.calls.k)

    def blank(self) -> ResidualGrid:
        return self._blocks()[0].grid

    @property
    def position(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        c = self.calls
        return np.log2(c.m), np.log2(c.n), np.log2(c.k)

    def constants(self, start: Values | None = None) -> ConstantsFit:
        """Return the best of several searches: one from ``start``, which has all constants,
        :data:`STARTS` around it."""
        start = start or self.start
        prior = WEAK if self.prior is None else CLOSE
        few, ranges = self.sample(ROWS, self.seed), self._ranges()

        def covariance(minimum: Minimum, _: Values) -> tuple[FloatArray, float]:
            rows = minimum.rows[: len(few)]
            residual_sd = float(np.sqrt(np.sum(rows**2) / max(len(few) - len(minimum.names), 1)))
            return gauss_newton(minimum.slopes, max(residual_sd, 1e-9)), residual_sd

        search: dict[str, Any] = {
            "prior": prior,
            "center": start,
            "data_only": True,
            "x_scale": 0.1,
            "max_nfev": 80,
            "weak": min(0.5, 0.45 * prior) if prior >= WEAK else 0.5,
        }
        if len(few) <= REFIT_ROWS:  # more rows leave the processor's caches
            search["together"] = lambda many: (
                np.log(few.calls.seconds_of(many)) - np.log(few.seconds)
            )

        def fit(**changed: float) -> ConstantsFit:
            return fit_logs(
                few.log_residual,
                {**start, **changed},
                ranges,
                covariance,
                fixed=self._unseen(),
                **search,
            )

        if self.calls.machine.packs:
            best = min((fit(pack_m=m) for m in PACK_FROM), key=lambda tried: tried.residual_sd)
            why = f"best of {', '.join(f'{m:g}' for m in PACK_FROM)}"
            return replace(best, fixed={**best.fixed, "pack_m": why})
        rng = np.random.default_rng(0)
        others = [
            {n: start[n] * np.exp(rng.normal(0.0, 0.3)) for n in ranges} for _ in range(STARTS)
        ]
        return min(
            (fit(**other) for other in ({}, *others)),
            key=lambda tried: float(np.mean(soft_l1(few.log_residual(tried.values)) ** 2)),
        )

    def _ranges(self) -> dict[str, Constant]:
        """Return the constants that a dense table identifies on this machine; the random starts of
        the search depend on their order."""
        machine = self.calls.machine
        names: tuple[str, ...] = ("t0", "e_tc", "tau", "b_e", "e_d", "b_hit", "c_l2", "t_s", "b_s")
        if machine.packs:
            names = ("t0", "e_tc", "e_d", "b_hit", "pack")
        else:
            shares = ("row_share", "wave_share")
            names = (*names, *(shares if machine.persistent else ("b_l2",)))
        ranges = {name: CONSTANTS[name] for name in names}
        return ranges | {"b_hit": replace(ranges["b_hit"], low=machine.bandwidth_bytes_per_s)}

    def _unseen(self) -> dict[str, str]:
        """Return the constants that no row shows."""
        c, machine = self.calls, self.calls.machine
        if self.prior is None or machine.element_bytes >= 2.0:
            return {}
        moved = machine.weight_bytes * c.n * c.k + machine.element_bytes * c.m * (c.n + c.k)
        compute_s = 2.0 * c.m * c.n * c.k / machine.peak_flop_per_s
        if np.any(compute_s > moved / machine.bandwidth_bytes_per_s):
            return {}
        return {"e_tc": "no row is compute-bound; value of the prior"}

    @property
    def _before(self) -> ResidualGrid | None:
        return None if self.prior is None else ResidualGrid.from_arrays(self.prior.arrays)

    def _blocks(self) -> list[ResidualBlock]:
        regularisation = ridge.ALONE if self.prior is None else ridge.CORRECTION
        return ridge.gemm_blocks(self.position, self.calls.machine.packs, regularisation)

    def target(self, values: Values) -> FloatArray:
        """Return the log residual that the grid is fitted to, without the prior's residual."""
        target, before = -self.log_residual(values), self._before
        return target if before is None else target - replace(before, inset=EDGE)(self.position)

    def held_out(self, blocks: list[ResidualBlock], target: FloatArray) -> FloatArray:
        """Return log predicted over measured by fits to the other folds; on few rows they fit the
        constants again."""
        out = np.full(len(self), np.nan)
        few = ridge.FewRows.of(blocks) if len(self) <= ridge.FEW_ROWS else None
        for train, test in folds(
            self.groups(), FEW_FOLDS if few else FOLDS, np.random.default_rng(self.seed)
        ):
            if len(train) < 10:
                continue
            if few is None:
                found = ridge.evaluate(
                    [b.take(test) for b in blocks], ridge.solve(blocks, target, train)
                )
            else:
                if len(self) <= REFIT_ROWS:
                    target = self.target(self.take(train).constants().values)
                found = few.at(few.dual(target, train), train, test)
            out[test] = found - target[test]
        return out

    def limited(self, grid: ResidualGrid, values: Values) -> ResidualGrid:
        """Return a residual of another table without steps that these rows do not show. More tokens
        do not take less time (on the RTX 4090, 128 tokens took 0.68 of the time of 64), and cold
        weights are not read faster than in any of these rows."""
        axes = [
            start + step * np.arange(n)
            for start, step, n in zip(grid.start, grid.step, grid.values.shape)
        ]
        m, n, k = (2.0 ** x.ravel() for x in np.meshgrid(*axes, indexing="ij"))
        cold = Products(self.calls.machine, m, n, k, np.full(len(m), np.inf))
        analytical = np.log(cold.seconds(values)).reshape(grid.values.shape)
        time, read = analytical + grid.values, np.isinf(self.calls.copies)
        best = np.max(_weights_s(self.calls)[read] / self.seconds[read], initial=0.0)
        if best > 0.5:  # else no row is memory-bound
            time = np.maximum(time, np.log(_weights_s(cold) / best).reshape(time.shape))
        later = np.minimum.accumulate(time[::-1], axis=0)[::-1]
        return replace(grid, values=np.minimum(time, later + STEP) - analytical)

    def section(self) -> FittedPart:
        constants = self.constants()
        blocks, target = self._blocks(), self.target(constants.values)
        nodes = ridge.solve(blocks, target)
        grid = replace(blocks[0].grid, values=nodes[0].reshape(blocks[0].grid.values.shape))
        if (before := self._before) is not None:  # local data add to the prior's residual
            grid = self.limited(replace(grid, values=grid.values + before.values), constants.values)
        arrays = replace(grid, values=grid.values.astype(np.float32)).arrays()
        if len(nodes) > 1:
            known = np.unique(self.calls.m)
            arrays |= RowResidual(known, nodes[1][: len(known)]).arrays()
        sizes = np.stack(self.position, axis=1)
        arrays["measured"] = np.stack([sizes.min(axis=0), sizes.max(axis=0)])
        scale, scores = self._scores(self.held_out(blocks, target), constants.values)
        section = Section(constants.fitted(), arrays, scale, scores, status="calibrated")
        return FittedPart(section, constants, len(self))

    def _scores(self, held_out: FloatArray, values: Values) -> tuple[float, dict[str, float]]:
        known = np.isfinite(held_out)
        if not known.any():
            return 1.0, {}
        errors, seen = held_out[known], self.take(known)
        scale = seen.scale(errors, values) * few_groups(int(self.groups().max()) + 1)
        return scale, seen.accuracy(errors, values)

    def accuracy(self, errors: FloatArray, values: Values) -> dict[str, float]:
        m = self.calls.m
        ranges = {"m_1_16": m <= 16, "m_17_256": (m > 16) & (m <= 256), "m_257_up": m > 256}
        size = np.abs(np.expm1(errors))
        by_range = {
            f"mape_{name}": float(size[rows].mean()) for name, rows in ranges.items() if rows.any()
        }
        return super().accuracy(errors, values) | by_range


def _weights_s(c: Products) -> FloatArray:
    return np.asarray(c.n * c.k * c.machine.weight_bytes / c.machine.bandwidth_bytes_per_s)


def products(m: Any, n: Any, k: Any, seconds: Any, machine: Machine, copies: Any = None) -> GemmFit:
    """``copies`` is the number of rotated weights, ``inf`` for cold weights (by default as in the
    published tables)."""
    m, n, k, seconds = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (m, n, k, seconds))
    if copies is None:
        copies = rotated_copies(machine.weight_bytes * n * k, machine.l2_bytes)
    copies = np.array(np.broadcast_to(np.asarray(copies, dtype=np.float64), m.shape))
    return GemmFit(Products(machine, m, n, k, copies), seconds)


def misaligned(r: Records, hw: HardwareProfile) -> BoolArray:
    """Return which products have rows of n or k elements that are not multiples of 16 bytes, for
    which a GPU has slower kernels. The fit of dense products has no such kernels."""
    size = DTYPE_BYTES[r.dtype]
    odd = (r.n * size % 16.0 != 0.0) | (r.k * size % 16.0 != 0.0)
    return np.asarray(r.is_operator("gemm") & odd & (hw.architecture != "cpu"))


def products_of(records: Records, machine: Machine) -> GemmFit:
    r = records.select(records.is_operator("gemm"))
    return products(r.m, r.n, r.k, r.seconds, machine, weight_copies(r))


def weight_copies(records: Records) -> FloatArray:
    """Return the number of rotated weights, infinite where the benchmark kept weights cold."""
    return np.where(records.copies > 0, records.copies, np.where(records.cold, np.inf, 1.0)).astype(
        np.float64
    )


def starting_constants(
    hw: HardwareProfile, dtype: str, prior: Section | None = None
) -> dict[str, float]:
    values = {name: constant.default(hw.architecture) for name, constant in CONSTANTS.items()}
    machine = Machine.of(hw, dtype)
    values["b_hit"] = max(values["b_hit"], machine.bandwidth_bytes_per_s)
    if machine.weight_bytes < machine.element_bytes:
        values |= weight_only_constants(values, machine.weight_bytes / machine.element_bytes)
    if prior is not None:
        values |= {name: prior[name] for name in prior.constants if name in values}
    return values


def fit_gemm(
    data: GemmFit,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    prior: Section | None = None,
    seed: int = 0,
) -> FittedPart:
    """Fit measured GEMMs of one number format (a label of a section: "bf16", "int4_wo"). ValueError
    for few rows."""
    if len(data) < (FIT_ROWS if prior is None else PRIOR_ROWS):
        few = f"a GEMM fit needs at least {FIT_ROWS} shapes, got {len(data)}"
        raise ValueError(f"{few}; with a shipped profile as prior (--prior), {PRIOR_ROWS} do")
    return replace(
        data, start=starting_constants(hw, dtype, prior), prior=prior, seed=seed
    ).section()
