"""Calibration of elementwise operators: floor, bandwidth share and L2 gain by class, and the L2 share.

Use :func:`calibration.fit.section.fit_section` with :class:`ElementwiseFit`. A class without rows keeps its default and
is marked so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import solver
from calibration.fit.residual import Regularisation
from calibration.fit.section import Fit
from calibration.fit.solver import ConstantsFit
from simulator.arrays import FloatArray, IndexArray
from simulator.operators.elementwise import CLASSES, Moves
from simulator.operators.elementwise import ELEMENTWISE_CONSTANTS as CONSTANTS
from simulator.operators.residual_grid import ResidualGrid

PRIOR = 0.7
"""Log standard deviation of a class's constants around those of all classes."""
FACTORS = ("t0", "e", "l2", "l2_share")
"""Kinds of constants, by the beginning of their names."""


@dataclass(frozen=True)
class ElementwiseFit(Fit):
    """Measured elementwise operators of one device."""

    calls: Moves

    # along (class, log2 bytes); classes are independent; chosen on seeds 10-19 of the protocol
    REGULARISATION = Regularisation(0.0, (0.0, 0.1), 0.1)

    def groups(self, by: str = "") -> IndexArray:
        return solver.numbered(self.calls.bytes_)

    def usable(self) -> ElementwiseFit:
        """Return the rows with a valid time and a rate below a limit of L2."""
        bytes_, seconds = self.calls.bytes_, self.seconds
        known = np.isfinite(seconds) & (seconds > 0) & np.isfinite(bytes_) & (bytes_ > 0)
        return self.take(known & (seconds > bytes_ / (20.0 * self.calls.bandwidth)))

    def constants(self, start: Mapping[str, float] | None = None) -> ConstantsFit:
        """Return constants of the classes with rows, around factors that all classes have in common."""
        default = {name: constant.default(self.calls.architecture) for name, constant in CONSTANTS.items()}

        def scaled(factor: Mapping[str, float]) -> dict[str, float]:
            """Return the constants of all classes, each kind times one factor."""
            moved = {}
            for name in CONSTANTS:
                kind = name if name in FACTORS else name.split("_")[0]
                moved[name] = float(np.clip(default[name] * factor[kind], CONSTANTS[name].low, CONSTANTS[name].high))
            return moved

        one = dict.fromkeys(FACTORS, 1.0)
        wide = dict.fromkeys(FACTORS, SimpleNamespace(low=np.exp(-4.0), high=np.exp(4.0)))
        common = solver.minimise(lambda x: self.log_residual({**default, **scaled(x)}), one, wide, FACTORS, prior=1.0)
        center = {**default, **scaled(common.values)}
        known = [name for i, name in enumerate(CLASSES) if np.any(self.calls.code == i)]
        own = {f"{kind}_{name}" for name in known for kind in ("t0", "e", "l2")}
        # the common factors are a prior with the weight of one row: a class of three rows must not move far
        return solver.fit_logs(
            self.log_residual,
            center,
            CONSTANTS,
            self.covariance(PRIOR),
            fixed={n: solver.ABSENT for n in CONSTANTS if n.removesuffix("_s") not in {*own, "l2_share"}},
            prior=PRIOR,
            center=center,
            max_nfev=100,
        )

    def blank(self) -> ResidualGrid:
        """Return a grid over log2 bytes by class, nodes an octave apart."""
        octaves = np.log2(np.maximum(self.calls.bytes_, 1.0))
        first, last = float(np.floor(octaves.min())), float(np.ceil(octaves.max()))
        values = np.zeros((len(CLASSES) + 1, int(last - first) + 1))  # one class more: see class_residual
        return ResidualGrid((0.0, first), (1.0, 1.0), values)

    def arrays(self, residual: ResidualGrid) -> dict[str, NDArray[Any]]:
        return {"start": np.array(residual.start[1]), "values": residual.values[:-1]}

    def accuracy(self, errors: FloatArray, values: Mapping[str, float]) -> dict[str, float]:
        found = super().accuracy(errors, values)
        del found["bias"]
        if (long := self.seconds > 1e-5).any():
            found["mape_over_10us"] = float(np.abs(np.expm1(errors[long])).mean())
        return found
