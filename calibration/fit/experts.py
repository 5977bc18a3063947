"""Calibration of routed experts: constants, residual lattice and spread of one number format of one stack, from
measured times of whole layers.

Use :func:`layers_of` on records, then :func:`fit_experts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import solver
from calibration.fit.errors import accuracy_of, spread_of
from calibration.fit.residual import Stiffness, fit_lattice
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum, Table
from simulator.arrays import FloatArray
from simulator.cost.base import Machine
from simulator.cost.experts import ALIGNED, Parts, dealt_load, experts_core, experts_place, uncertainty_of
from simulator.cost.residual_grid import ResidualGrid
from simulator.hardware.constants import EXPERTS_CONSTANTS as CONSTANTS
from simulator.hardware.profile import Provenance, Section

FEWEST = 300
"""Rows that a fit needs: some two models."""
PRIOR = 1.5
"""Log spread of the constants round their defaults."""
ROWS = 4000
"""Rows the constants are fitted on; more do not move them."""
STIFFNESS = Stiffness(0.1, 0.3, 0.1)
"""Of the residual along (tokens an expert, width, experts); chosen with its coordinates among 21 on models left out
(seeds 10-12), eight tables of four GPUs and three stacks: 6.5 % against 9.0 without it."""
OCTAVES = (1.0, 2.0, 2.0)
"""Between its nodes."""
FOLDS = 5


@dataclass(frozen=True)
class Layers(Table):
    """Measured expert layers of one device; tokens dealt out by rule, weights warm."""

    machine: Machine
    m: FloatArray
    n: FloatArray
    k: FloatArray
    experts: FloatArray
    active: FloatArray
    skew: FloatArray
    seconds: FloatArray

    @property
    def groups(self) -> NDArray[np.intp]:
        """Number of each row's model: hidden size, experts, and experts a token."""
        return solver.numbered(self.k, self.experts, self.active)

    @property
    def place(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        return experts_place(self.m, self.n, self.experts, self.active)

    def parts(self, values: Mapping[str, float]) -> Parts:
        """Core times, s, from constants by name."""
        sizes = self.m, self.n, self.k, self.experts, self.active
        load = dealt_load(self.m, self.experts, self.active, self.skew)
        return experts_core(load, *sizes, self.machine, values, warm=True)

    def log_residual(self, values: Mapping[str, float]) -> FloatArray:
        """Log of core over measured time."""
        return np.asarray(np.log(self.parts(values).total / self.seconds))

    def constants(self, start: Mapping[str, float]) -> ConstantsFit:
        """Constants round ``start``."""
        few = self
        if len(self) > ROWS:
            few = self.take(np.sort(np.random.default_rng(0).choice(len(self), ROWS, replace=False)))
        sizes = few.m, few.n, few.k, few.experts, few.active
        load = dealt_load(few.m, few.experts, few.active, few.skew)

        def log_residual(values: Mapping[str, float]) -> FloatArray:
            return np.asarray(np.log(experts_core(load, *sizes, few.machine, values, warm=True).total / few.seconds))

        def covariance(found: Minimum, values: Mapping[str, float]) -> tuple[FloatArray, float]:
            raw = solver.slopes(log_residual, values, found.names, 1e-4)
            every = np.concatenate([raw, solver.HUBER / PRIOR * np.eye(len(found.names))])
            spread = float(np.sqrt(np.mean(np.minimum(found.rows**2, (3 * solver.HUBER) ** 2))))
            return solver.gauss_newton(every, spread), spread

        fixed = {} if (few.n % ALIGNED).any() else {"align": solver.ABSENT}
        moot = {"l2_gain": ("l2_share", "without meaning where L2 gains nothing")}
        search: dict[str, Any] = {"prior": PRIOR, "center": start, "max_nfev": 60, "x_scale": 0.1}
        return solver.fit_logs(log_residual, start, CONSTANTS, covariance, fixed=fixed, moot=moot, **search)

    def residual(self, values: Mapping[str, float]) -> ResidualGrid:
        """What constants leave."""
        place, step = self.place, np.array(OCTAVES)
        ends = np.array([(np.min(x), np.max(x)) for x in place])
        start = np.floor(ends[:, 0] / step) * step
        shape = np.ceil((ends[:, 1] - start) / step - 1e-9).astype(int) + 1
        blank = ResidualGrid(tuple(start.tolist()), tuple(step.tolist()), np.zeros(shape))
        return fit_lattice(blank, place, -self.log_residual(values), STIFFNESS, rounds=4)


def layers_of(records: Any, machine: Machine) -> Layers:
    """Records of experts (an object with columns of these names) as a fit takes them."""
    names = ("m", "n", "k", "experts", "active", "skew", "seconds")
    return Layers(machine, *(np.asarray(getattr(records, name), dtype=np.float64) for name in names))


def fit_experts(
    layers: Layers, architecture: str, *, seed: int = 0, provenance: Provenance | None = None
) -> FittedPart:
    """Fit the experts section of one number format of one stack; folds, by ``seed``, leave out whole models.

    ValueError with fewer than :data:`FEWEST` rows.
    """
    if len(layers) < FEWEST:
        raise ValueError(f"experts: expected at least {FEWEST} rows, got {len(layers)}")
    constants = layers.constants({name: constant.default(architecture) for name, constant in CONSTANTS.items()})
    errors = np.zeros(len(layers))
    for train, test in solver.folds(layers.groups, FOLDS, np.random.default_rng(seed)):
        rest, left = layers.take(train), layers.take(test)
        values = rest.constants(constants.values).values
        errors[test] = left.log_residual(values) + rest.residual(values)(left.place)
    arrays = layers.residual(constants.values).arrays()
    accuracy = accuracy_of(np.expm1(errors))
    accuracy["core_mape"] = float(np.abs(np.expm1(layers.log_residual(constants.values))).mean())
    uncertainty = uncertainty_of(layers.parts(constants.values), layers.place, layers.n, layers.skew)
    parts = constants.fitted(), arrays, spread_of(errors, uncertainty), accuracy, provenance
    return FittedPart(Section(*parts, status="calibrated"), constants, len(layers), errors)
