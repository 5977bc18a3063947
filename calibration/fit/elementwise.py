"""Calibration of elementwise operators: floor, bandwidth share, L2 gain by class, and the L2 share, from measured
times.

Use :func:`fit_elementwise` on :class:`Moves`. A class without rows keeps its default and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import solver
from calibration.fit.errors import accuracy_of, spread_of
from calibration.fit.residual import Stiffness, fit_lattice
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum, Table
from simulator.arrays import FloatArray
from simulator.cost.elementwise import class_place, class_residual, elementwise_core, uncertainty_of
from simulator.cost.residual_grid import ResidualGrid
from simulator.hardware.constants import CLASSES
from simulator.hardware.constants import ELEMENTWISE_CONSTANTS as CONSTANTS
from simulator.hardware.profile import Provenance, Section

SPREAD = 0.7
"""Log spread of a class's constants round those of all classes."""
STIFFNESS = Stiffness(0.0, (0.0, 0.1), 0.1)
"""Of the residual along (class, log2 bytes): nothing joins two classes; chosen on seeds 10-19 of the protocol."""
FOLDS = 5
FACTORS = ("t0", "e", "l2", "l2_share")
"""Kinds of constants, by the beginning of their names."""


@dataclass(frozen=True)
class Moves(Table):
    """Measured operators of one device: bytes read and written, index into :data:`CLASSES`, time, and its datasheet."""

    bytes_: FloatArray
    code: NDArray[np.intp]
    seconds: FloatArray
    l2_bytes: float
    bandwidth: float  # bytes/s
    architecture: str

    def core(self, values: Mapping[str, float]) -> FloatArray:
        """Core time, s."""
        return elementwise_core(self.bytes_, self.code, self.l2_bytes, self.bandwidth, values)[0]

    def log_residual(self, values: Mapping[str, float]) -> FloatArray:
        """Log of core over measured time."""
        return np.asarray(np.log(self.core(values)) - np.log(self.seconds))

    def constants(self) -> ConstantsFit:
        """Constants of the classes that have rows, round what all classes have in common."""
        default = {name: constant.default(self.architecture) for name, constant in CONSTANTS.items()}

        def scaled(factor: Mapping[str, float]) -> dict[str, float]:
            """The constants of all classes, each kind times one factor."""
            moved = {}
            for name in CONSTANTS:
                kind = name if name in FACTORS else name.split("_")[0]
                moved[name] = float(np.clip(default[name] * factor[kind], CONSTANTS[name].low, CONSTANTS[name].high))
            return moved

        one = dict.fromkeys(FACTORS, 1.0)
        wide = dict.fromkeys(FACTORS, SimpleNamespace(low=np.exp(-4.0), high=np.exp(4.0)))
        common = solver.minimise(
            lambda x: self.log_residual({**default, **scaled(x)}), one, wide, FACTORS, prior=1.0
        ).values
        start = {**default, **scaled(common)}

        def covariance(found: Minimum, values: Mapping[str, float]) -> tuple[FloatArray, float]:
            raw = solver.slopes(self.log_residual, values, found.names, 1e-4)
            every = np.concatenate([raw, solver.HUBER / SPREAD * np.eye(len(found.names))])
            freedom = max(len(self) - len(found.names), 1)
            spread = float(np.sqrt(np.sum(np.minimum(found.rows**2, (3 * solver.HUBER) ** 2)) / freedom))
            return solver.gauss_newton(every, spread), spread

        known = [name for i, name in enumerate(CLASSES) if np.any(self.code == i)]
        own = {f"{kind}_{name}" for name in known for kind in ("t0", "e", "l2")}
        fixed = {n: solver.ABSENT for n in CONSTANTS if n.removesuffix("_s") not in {*own, "l2_share"}}
        # what the classes have in common is a prior worth one row: a class of three rows must not run away
        search: dict[str, Any] = {"prior": SPREAD, "center": start, "max_nfev": 100}
        return solver.fit_logs(self.log_residual, start, CONSTANTS, covariance, fixed=fixed, **search)

    def residual(self, values: Mapping[str, float]) -> ResidualGrid:
        """Residual over log2 bytes by class, nodes an octave apart."""
        place = class_place(self.bytes_, self.code)
        first, last = float(np.floor(place[1].min())), float(np.ceil(place[1].max()))
        blank = np.zeros((len(CLASSES) + 1, int(last - first) + 1))  # one class more: see class_lattice
        return fit_lattice(
            ResidualGrid((0.0, first), (1.0, 1.0), blank), place, -self.log_residual(values), STIFFNESS, rounds=3
        )

    def predict(self, section: Section) -> FloatArray:
        """Times a fitted section gives, s."""
        residual = class_residual(section.arrays)
        assert residual is not None
        values = {name: constant.value for name, constant in section.constants.items()}
        return np.asarray(self.core(values) * np.exp(residual(class_place(self.bytes_, self.code))))


def fit_elementwise(moves: Moves, *, seed: int = 0, provenance: Provenance | None = None) -> FittedPart:
    """Fit the elementwise section of one device; folds, by ``seed``, leave out sizes, not rows. ValueError with fewer
    than 20 usable rows (finite, positive, and not twice as fast as L2 could be)."""
    bytes_, seconds = moves.bytes_, moves.seconds
    known = np.isfinite(seconds) & (seconds > 0) & np.isfinite(bytes_) & (bytes_ > 0)
    r = moves.take(known & (seconds > bytes_ / (20.0 * moves.bandwidth)))
    if len(r) < 20:
        raise ValueError(f"elementwise: expected at least 20 usable rows, got {len(r)} of {len(moves)}")
    constants = r.constants()
    errors = np.zeros(len(r))
    for train, test in solver.folds(solver.numbered(r.bytes_), FOLDS, np.random.default_rng(seed)):
        rest, left = r.take(train), r.take(test)
        values = rest.constants().values
        errors[test] = left.log_residual(values) + rest.residual(values)(class_place(left.bytes_, left.code))
    relative = np.expm1(errors)
    accuracy = accuracy_of(relative)
    del accuracy["bias"]
    if (long := r.seconds > 1e-5).any():
        accuracy["mape_over_10us"] = float(np.abs(relative[long]).mean())
    residual = r.residual(constants.values)
    arrays = {"start": np.array(residual.start[1]), "values": residual.values[:-1]}
    _, floor, memory, hit = elementwise_core(r.bytes_, r.code, r.l2_bytes, r.bandwidth, constants.values)
    spread = spread_of(errors, uncertainty_of(floor, memory, hit, r.bytes_, r.code))
    section = Section(constants.fitted(), arrays, spread, accuracy, provenance, "calibrated")
    return FittedPart(section, constants, len(r), errors)
