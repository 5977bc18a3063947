"""Divide a dense and a pruned pass by operator, with the cause of each operator's speedup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from simulator.arrays import Array, FloatArray
from simulator.codes import EXPERTS, ROLES, Kind
from simulator.operators import BY_CODE
from simulator.operators.base import BOTTLENECKS
from simulator.prediction.explain import Explanation, effects, filled_waves
from simulator.uncertainty.forward import PredictedPass
from simulator.units import percent
from simulator.workload import Workload

# role -> operator in the table
_OPERATORS: Mapping[str, str] = {
    **dict.fromkeys(("q", "k", "v", "qkv"), "qkv"),
    **dict.fromkeys(("gate", "up", "gate_up", "down"), "MLP"),
    "o": "o",
    "attention": "attention",
    "lm_head": "head",
}
_CAUSES: Mapping[str, str] = {
    "roofline": "the kernel computes or fetches zeros",
    "tile": "shapes are padded to whole tiles",
    "wave": "the last wave of tiles leaves SMs idle",
    "alignment": "widths off multiples of 8 (16-bit) use slower kernels",
    "kernel": "efficiency of the kernels at these shapes",
    "fixed": "fixed time of each kernel",
}
"""Effect -> cause of a speedup that differs from its roofline bound."""

LEAST = 0.001  # share of a pass from which gaps and host are shown
# log of a speedup from which a cause is named; bandwidth varies more between shapes
NOTABLE, NOTABLE_OF_BYTES = 0.015, 0.03
_BYTES = "bound by memory: reaches {} of its bandwidth"


@dataclass(frozen=True)
class OperatorSpeedup:
    """Times of an operator in both passes, and why their ratio is not its roofline bound."""

    name: str
    dense_s: float
    pruned_s: float
    bound: float  # ratio of the rooflines; NaN without one
    cause: str


def by_operator(e: Explanation) -> list[OperatorSpeedup]:
    """Return the operators of both passes, then gaps between kernels and the host. Times add up to
    those of the result."""
    p = e.passes
    scale = e.seconds / p.total_s
    divided = _Divided(
        p, effects(p) | {"fixed": p.row_s}, filled_waves(p), _names(p.workloads.rows)
    )
    found = [divided.operator(name, scale) for name in dict.fromkeys(divided.names.tolist())]
    found.sort(key=lambda one: -one.dense_s)
    gaps = p.device_s - p.workloads.total(p.row_s)
    for name, spent in (("gaps", gaps), ("host", p.total_s - p.device_s)):
        if spent.max() > LEAST * p.total_s.max():
            dense_s, pruned_s = (scale * spent).tolist()
            found.append(OperatorSpeedup(name, dense_s, pruned_s, np.nan, _OUTSIDE[name]))
    return found


@dataclass(frozen=True)
class _Divided:
    """A dense and a pruned pass by operator."""

    passes: PredictedPass
    steps: Mapping[str, FloatArray]  # seconds of rows with cumulative effects
    filled: FloatArray  # waves of rows
    names: Array  # operators of rows

    def operator(self, name: str, scale: FloatArray) -> OperatorSpeedup:
        """Return an operator, with its times multiplied by ``scale``."""
        workloads, mine = self.passes.workloads, self.names == name
        times = {
            step: workloads.total(np.where(mine, values, 0.0))
            for step, values in self.steps.items()
        }
        rows = [np.where((workloads.owner == i) & mine, self.passes.row_s, -1.0) for i in range(2)]
        longest = [int(np.argmax(of_model)) for of_model in rows]
        code = self.passes.bottleneck_of_row[longest]
        of_bytes = bool((code == BOTTLENECKS.index("memory")).all())
        # the blocks of attention share the bandwidth, those of a product hardly change it
        waves = self.filled[longest] * (name == "attention" or not of_bytes)
        cause = _cause(times, waves, of_bytes)
        ideal = times["ideal"]
        bound = float(ideal[0] / ideal[1]) if ideal.min() > 0.0 else np.nan
        dense_s, pruned_s = (scale * times["fixed"]).tolist()
        return OperatorSpeedup(name, dense_s, pruned_s, bound, cause)


_OUTSIDE = {
    "gaps": "between kernels; fewer kernels save them",
    "host": "not hidden by the device; only fewer launches save it",
}


def _names(rows: Workload) -> Array:
    """Return the operator of each row."""
    by_role = np.array([_OPERATORS.get(role, role) for role in ROLES], dtype=object)
    names = by_role[rows.role]
    for kind in np.unique(rows.kind).tolist():
        if kind == Kind.COLLECTIVE:
            names[rows.kind == kind] = "collectives"
        elif kind == EXPERTS or kind > EXPERTS or kind == Kind.ELEMENTWISE:
            names[rows.kind == kind] = BY_CODE[kind].titles[0]
    names[rows.overhead] = "added work"
    return names


def _cause(times: Mapping[str, FloatArray], longest: FloatArray, of_bytes: bool) -> str:
    """Return why an operator's speedup differs from its roofline bound; ``longest`` are the waves
    of its longest rows, ``of_bytes`` whether memory is the bottleneck of both."""
    if min(map(np.min, times.values())) <= 0.0:
        return ""
    logs = dict(_logs(times))
    step = max(logs, key=lambda name: abs(logs[name]))
    if abs(logs[step]) < (NOTABLE_OF_BYTES if of_bytes else NOTABLE):
        same = abs(times["fixed"][0] / times["fixed"][1] - 1.0) < 1e-6
        return "not pruned" if same else ""
    cause = _CAUSES[step]
    if of_bytes and step not in ("roofline", "fixed"):
        cause = _BYTES.format("less" if logs[step] < 0.0 else "more")
    if step not in ("kernel", "wave") or longest.min() <= 0.0:
        return cause
    whole = np.ceil(longest)
    share = longest / whole
    # whether the difference in fill explains at least half of the loss or gain
    if np.log(share[1] / share[0]) / logs[step] < 0.5:
        return cause
    dense, pruned = (
        f"{percent(part)} of {many:.0f} {'waves' if many > 1.0 else 'wave'}"
        for part, many in zip(share, whole)
    )
    return f"fills {pruned} (dense: {dense})"


def _logs(times: Mapping[str, FloatArray]) -> Iterator[tuple[str, float]]:
    """Yield the log of the factor of each effect on the speedup, in order."""
    before = times["ideal"]
    for name in _CAUSES:
        yield name, float(np.log(times[name][0] / times[name][1] * before[1] / before[0]))
        before = times[name]
