"""Fit selective scans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.fit import solver
from calibration.fit.residual import Regularisation
from calibration.fit.section import Fit
from simulator.arrays import IndexArray
from simulator.operators.base import ResidualGrid
from simulator.operators.selective_scan import CONSTANTS, Scans


@dataclass(frozen=True)
class ScanFit(Fit):
    """Measured selective scans of one device."""

    calls: Scans

    REGULARISATION = Regularisation(first=0.1, second=0.1, size=0.1)

    def groups(self, question: str = "") -> IndexArray:
        """Number of each row's layer: a fold holds out whole layers."""
        return solver.numbered(self.calls.batch, self.calls.heads, self.calls.features)

    def constants(self, start: Mapping[str, float] | None = None) -> solver.ConstantsFit:
        start = start or {name: constant.default("*") for name, constant in CONSTANTS.items()}
        return self.search(start, CONSTANTS, prior=1.0)

    def blank(self) -> ResidualGrid:
        """Return a grid over log2 of tokens, heads and features, nodes two octaves apart."""
        c = self.calls
        axes = np.log2(c.tokens), np.log2(c.batch * c.heads), np.log2(c.features)
        shape = [int(np.ceil(np.ptp(axis) / 2.0)) + 1 for axis in axes]
        return ResidualGrid(
            tuple(float(axis.min()) for axis in axes), (2.0, 2.0, 2.0), np.zeros(shape)
        )
