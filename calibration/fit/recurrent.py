"""Calibration of recurrences and convolutions by the common method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibration.fit import solver
from calibration.fit.residual import Regularisation
from calibration.fit.section import Fit
from calibration.fit.solver import ConstantsFit
from simulator.arrays import Array, FloatArray, IndexArray
from simulator.operators import CONSTANTS
from simulator.operators.base import Calls, Machine, ResidualGrid, Values
from simulator.operators.delta_net import DeltaNets
from simulator.operators.short_conv import Convolutions
from simulator.operators.state_space import Recurrences

PRIOR = 1.5  # log standard deviation of constants around their defaults
OCTAVES = 3.0  # between nodes of the residual
# constants that measured rows do not identify
_OTHERS = {"e_scan": "a recurrence of Mamba, which is not measured"}
_PROMPT = ("prompt_s", "chunk_s", "e_tc")


@dataclass(frozen=True)
class RecurrentFit(Fit):
    calls: Calls
    architecture: str
    prompt: Array  # whether each sequence has several tokens

    FEWEST = 8  # operators of both kinds: steps and prompts
    REGULARISATION = Regularisation(0.3, 1.0, 0.3)

    def take(self, rows: Any) -> RecurrentFit:
        return replace(super().take(rows), prompt=self.prompt[rows])

    def groups(self, by: str = "") -> IndexArray:
        """Return the number of each row: rows are held out one by one."""
        return np.arange(len(self))

    def constants(self, start: Values | None = None) -> ConstantsFit:
        known, start = CONSTANTS[self.calls.operator], start or self._defaults
        absent = () if self.prompt.any() else _PROMPT
        fixed = _OTHERS | dict.fromkeys(absent, solver.ABSENT)
        fixed = {name: why for name, why in fixed.items() if name in known}
        return self.search(start, known, PRIOR, fixed=fixed, max_nfev=100)

    def blank(self) -> ResidualGrid:
        position = self.calls.estimate(self._defaults).position
        ends = np.array([(np.min(x), np.max(x)) for x in position])
        start = np.floor(ends[:, 0] / OCTAVES) * OCTAVES
        shape = np.ceil((ends[:, 1] - start) / OCTAVES - 1e-9).astype(int) + 1
        return ResidualGrid(tuple(start.tolist()), (OCTAVES,) * len(shape), np.zeros(shape))

    @property
    def _defaults(self) -> Values:
        known = CONSTANTS[self.calls.operator]
        return {name: one.default(self.architecture) for name, one in known.items()}


def _columns(records: Any, *names: str) -> list[FloatArray]:
    return [np.asarray(getattr(records, name), dtype=np.float64) for name in names]


def _convolutions(machine: Machine, r: Any) -> Calls:
    return Convolutions(machine, *_columns(r, "m", "batch", "n", "window"))


def _recurrences(machine: Machine, r: Any) -> Calls:
    names = ("m", "batch", "heads", "kv_heads", "n", "head_dim", "block")
    return Recurrences(replace(machine, weight_bytes=4.0), *_columns(r, *names))


def _delta_nets(machine: Machine, r: Any) -> Calls:
    names = ("m", "batch", "heads", "kv_heads", "head_dim", "n", "window")
    no_channel_decay = np.zeros(len(r))
    sizes = [*_columns(r, *names), no_channel_decay]
    return DeltaNets(replace(machine, weight_bytes=4.0), *sizes)


CALLS: Mapping[str, Callable[[Machine, Any], Calls]] = {
    "short_conv": _convolutions,
    "state_space": _recurrences,
    "delta_net": _delta_nets,
}


def recurrent_fit(operator: str, records: Any, machine: Machine, architecture: str) -> RecurrentFit:
    prompt = np.asarray(records.m > records.batch)
    return RecurrentFit(CALLS[operator](machine, records), records.seconds, architecture, prompt)
