"""Calibration of recurrences and convolutions by the common method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibration.fit import solver
from calibration.fit.residual import Regularisation
from calibration.fit.section import Fit, blank_grid, floats
from calibration.fit.solver import ConstantsFit
from simulator.arrays import IndexArray
from simulator.operators.base import ELEMENT_BYTES, Calls, Machine, ResidualGrid, Values
from simulator.operators.delta_net import DeltaNets
from simulator.operators.short_conv import Convolutions
from simulator.operators.state_space import Recurrences

PRIOR = 1.5  # log standard deviation of constants around their defaults
STATE = "fp32"  # number format of states
OCTAVES = 3.0  # between nodes of the residual
# constants that measured rows do not identify
_OTHERS = {"e_scan": "a recurrence of Mamba, which is not measured"}
_PROMPT = ("prompt_s", "chunk_s", "e_tc")


@dataclass(frozen=True)
class RecurrentFit(Fit):
    calls: Any  # Convolutions, Recurrences or DeltaNets
    architecture: str

    FEWEST = 8  # operators of both kinds: steps and prompts
    REGULARISATION = Regularisation(0.3, 1.0, 0.3)

    def groups(self, by: str = "") -> IndexArray:
        """Return the number of each row: rows are held out one by one."""
        return np.arange(len(self))

    def constants(self, start: Values | None = None) -> ConstantsFit:
        known = self.registry
        prompts = np.any(self.calls.tokens > self.calls.batch)
        fixed = _OTHERS | dict.fromkeys(() if prompts else _PROMPT, solver.ABSENT)
        fixed = {name: why for name, why in fixed.items() if name in known}
        start = start or self.defaults(self.architecture)
        return self.search(start, known, PRIOR, fixed=fixed, max_nfev=100)

    def blank(self) -> ResidualGrid:
        position = self.calls.estimate(self.defaults(self.architecture)).position
        return blank_grid(position, (OCTAVES,) * len(position))


def recurrent_calls(operator: str, r: Any, machine: Machine) -> Calls:
    """Return measured recurrences or convolutions; ``machine`` has the bytes of :data:`STATE`."""
    if operator == "short_conv":
        return Convolutions(machine, *floats(r, "m", "batch", "n", "window"))
    sizes = floats(r, "m", "batch", "heads", "kv_heads")
    if operator == "state_space":
        return Recurrences(machine, *sizes, *floats(r, "n", "head_dim", "block"))
    sizes += [*floats(r, "head_dim", "n", "window"), np.zeros(len(r))]  # no decay by channel
    return DeltaNets(machine, *sizes)


def recurrent_fit(operator: str, records: Any, machine: Machine, architecture: str) -> RecurrentFit:
    machine = replace(machine, weight_bytes=ELEMENT_BYTES[STATE])
    return RecurrentFit(recurrent_calls(operator, records, machine), records.seconds, architecture)
