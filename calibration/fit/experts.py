"""Calibration of routed experts of one number format and stack, from times of whole layers or of a grouped product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.fit import solver
from calibration.fit.residual import Regularisation
from calibration.fit.section import Fit
from calibration.fit.solver import ConstantsFit
from simulator.arrays import FloatArray, IndexArray
from simulator.codes import ROLES
from simulator.operators.base import Machine
from simulator.operators.experts import ALIGNED, PARTS, Layers
from simulator.operators.experts import EXPERTS_CONSTANTS as CONSTANTS
from simulator.operators.residual_grid import ResidualGrid

PRIOR = 1.5  # log standard deviation of the constants around their defaults
ROWS = 4000  # rows that the constants are fitted on; more do not change them
OCTAVES = (1.0, 2.0, 2.0)  # octaves between the nodes of the residual
PART_ROLES = np.array([-1, *(ROLES.index(name) for name in PARTS[1:])])  # role of a record by index into PARTS


@dataclass(frozen=True)
class ExpertsFit(Fit):
    """Measured expert layers of one device, or their single products, with tokens distributed by a rule."""

    calls: Layers
    architecture: str

    FEWEST = 300  # about two models
    # along (tokens per expert, width, experts); the best of 21 on held-out models (seeds 10-12) of eight tables: an
    # error of 6.5 %, against 9.0 % without a residual
    REGULARISATION = Regularisation(0.1, 0.3, 0.1)
    ROUNDS = 4

    def groups(self, by: str = "") -> IndexArray:
        """Return the model of each row: hidden size, experts, and experts per token. Single products are timed for
        several numbers of devices that share the experts: the ratio of experts to experts per token identifies them."""
        c, whole = self.calls, self.calls.whole
        return solver.numbered(c.k, c.experts / np.where(whole, 1.0, c.active), np.where(whole, c.active, 0.0))

    def constants(self, start: Mapping[str, float] | None = None) -> ConstantsFit:
        if start is None:
            start = {name: constant.default(self.architecture) for name, constant in CONSTANTS.items()}
        few = self.sample(ROWS)
        c, whole = few.calls, few.calls.whole
        classes = {("align",): c.n % ALIGNED > 0, ("l2_gain", "l2_share"): c.warm, ("product_s",): ~whole}
        classes[("t0_s", "expert_s", "e_io")] = whole
        absent = [name for names, rows in classes.items() if not np.any(rows) for name in names]
        fixed = dict.fromkeys(absent, solver.ABSENT)
        return few.search(start, CONSTANTS, PRIOR, fixed=fixed, moot=solver.NO_GAIN, max_nfev=60, x_scale=0.1)

    def blank(self) -> ResidualGrid:
        c = self.calls
        position = np.log2(c.m * c.active / c.experts), np.log2(c.n), np.log2(c.experts)
        step = np.array(OCTAVES)
        ends = np.array([(np.min(x), np.max(x)) for x in position])
        start = np.floor(ends[:, 0] / step) * step
        shape = np.ceil((ends[:, 1] - start) / step - 1e-9).astype(int) + 1
        return ResidualGrid(tuple(start.tolist()), tuple(step.tolist()), np.zeros(shape))

    def accuracy(self, errors: FloatArray, values: Mapping[str, float]) -> dict[str, float]:
        analytical = float(np.abs(np.expm1(self.log_residual(values))).mean())
        return super().accuracy(errors, values) | {"core_mape": analytical}


def layers_of(records: Any, machine: Machine, architecture: str) -> ExpertsFit:
    names = ("m", "n", "k", "experts", "active", "skew", "seconds")
    m, n, k, experts, active, skew, seconds = (np.asarray(getattr(records, x), dtype=np.float64) for x in names)
    layers = Layers(machine, m, n, k, experts, active, skew, warm=~np.asarray(records.cold), part=experts_part(records))
    return ExpertsFit(layers, seconds, architecture)


def experts_part(records: Any) -> IndexArray:
    """Return the index into :data:`simulator.operators.experts.PARTS` of expert records."""
    return np.asarray(np.argmax(np.asarray(records.role)[:, None] == PART_ROLES, axis=1))
