"""From a dense and a pruned workload to a speedup: times, interval, bounds, and where the difference was lost.

Use :func:`speedup` for one pair, :func:`speedups` for many pruned versions of one dense workload on one device (one vectorised pass),
:func:`waterfall` for the named steps from the nominal 1/(1 - s) to the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simulator.kernels.elementwise import elementwise_time
from simulator.kernels.gemm import gemm_ladder
from simulator.kernels.optime import BOUNDS
from simulator.kernels.stack import Stack
from simulator.kernels.stream import cost_batch, ideal_roofline
from simulator.predict.compare import Pairs, compare
from simulator.workload import DTYPES, Kind, Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

F = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """One step of the loss waterfall: ``factor`` multiplies the speedup before it to ``speedup``."""

    name: str
    factor: float
    speedup: float
    note: str


@dataclass(frozen=True)
class Speedup:
    """The predicted speedup of a pruned workload over its dense one.

    Attributes
    ----------
    dense_s, pruned_s : float, s
        Time of a pass.
    speedup, lower, upper : float
        dense_s / pruned_s and its interval at ``level``.
    flop_bound, byte_bound, roofline_bound : float
        Ratio of FLOPs, of bytes, of summed per-operator datasheet rooflines; the pruning's own overheads left out.
    measured_bound : float or None
        Ratio of measured dense GEMM times at the two models' shapes, where they were measured.
    limit : str
        What holds most of the pruned time: one of :data:`simulator.kernels.optime.BOUNDS`.
    limit_share : float
        The share of the pruned time it holds.
    family : str
        Families applied, joined by "+".
    sparsity, realised_sparsity : float
        Asked for, and after rounding.
    calibrated : bool
        Every cost section used was fitted on the device's own measurements.
    """

    dense_s: float
    pruned_s: float
    speedup: float
    lower: float
    upper: float
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    measured_bound: float | None
    limit: str
    limit_share: float
    family: str
    sparsity: float
    realised_sparsity: float
    level: float
    calibrated: bool

    @property
    def efficiency(self) -> float:
        """(speedup - 1) / (roofline_bound - 1): the share of the possible gain that is granted; NaN where nothing was to be gained."""
        gain = self.roofline_bound - 1.0
        return (self.speedup - 1.0) / gain if gain > 1e-9 else float("nan")


def speedups(
    dense: Workload,
    pruned: Sequence[Workload],
    hw: HardwareProfile,
    runtime: str = "cuda_graph",
    level: float = 0.9,
    *,
    pairs: Pairs | None = None,
) -> list[Speedup]:
    """Speedups of many pruned workloads over one dense workload on one device.

    Parameters
    ----------
    dense : Workload
    pruned : sequence of Workload
        Versions of ``dense`` as :func:`simulator.prune` returns them.
    hw : HardwareProfile
    runtime : {"cuda_graph", "eager"}
    level : float
        Level of the intervals.
    pairs : Pairs, optional
        :func:`pairs_of` these workloads, where they are compared on several devices.

    Returns
    -------
    list of Speedup
    """
    pairs = pairs or pairs_of(dense, pruned)
    (c,) = compare(pairs, hw, (runtime,), level)
    out = []
    for i, w in enumerate(pruned, start=1):
        applied = w.meta.applied[len(dense.meta.applied) :]
        out.append(
            Speedup(
                dense_s=float(c.dense_s[i]),
                pruned_s=float(c.pruned_s[i]),
                speedup=float(c.speedup[i]),
                lower=float(c.lower[i]),
                upper=float(c.upper[i]),
                flop_bound=float(pairs.flop_bound[i]),
                byte_bound=float(pairs.byte_bound[i]),
                roofline_bound=float(c.roofline_bound[i]),
                measured_bound=None,
                limit=BOUNDS[int(c.limit[i])],
                limit_share=float(c.limit_share[i]),
                family="+".join(a.family for a in applied) or "none",
                sparsity=_together([a.sparsity for a in applied]),
                realised_sparsity=_together([a.realised for a in applied]),
                level=level,
                calibrated=bool(c.calibrated[i]),
            )
        )
    return out


def pairs_of(dense: Workload, pruned: Sequence[Workload]) -> Pairs:
    """Pruned workloads and their dense one, ready to be compared on many devices."""
    return Pairs(Stack.of([dense, *pruned]), np.zeros(1 + len(pruned), dtype=np.intp))


def speedup(
    dense: Workload, pruned: Workload, hw: HardwareProfile, runtime: str = "cuda_graph", level: float = 0.9
) -> Speedup:
    """Speedup of one pruned workload over its dense workload; see :func:`speedups`.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", batch=1, seq=2048)
    >>> s = simulator.speedup(dense, simulator.prune(dense, "depth", sparsity=0.25), simulator.load_hardware("h100"))
    >>> bool(1.2 < s.lower < s.speedup < s.upper < 1 / 0.75)
    True
    """
    return speedups(dense, [pruned], hw, runtime, level)[0]


def _together(values: Sequence[float]) -> float:
    """Fraction removed by several steps one after the other."""
    return float(1.0 - np.prod([1.0 - v for v in values])) if values else 0.0


NOTES = {
    "rounding": "rounded to whole layers, head groups and aligned widths",
    "parts not pruned": "attention, lm_head, norms left alone: this gives the FLOP bound",
    "memory-bound operators": "operators limited by bytes, not FLOPs: this gives the roofline bound",
    "zeros the kernel computes": "the kernel that runs does not skip the zeros, or fetches them",
    "tile quantisation": "shapes padded to whole tiles",
    "wave quantisation": "the last wave of tiles leaves SMs idle",
    "alignment": "widths that are no multiple of 8 (16-bit) leave the fast kernels",
    "kernel efficiency": "what kernels reach of the roofline at these shapes",
    "overhead operators": "routers, gathers, scatters, selections, projections that pruning adds",
    "launch or host time": "fixed time of each kernel, gaps, and the host's launch time",
}
"""What each step of the waterfall means."""


def waterfall(dense: Workload, pruned: Workload, hw: HardwareProfile, runtime: str = "cuda_graph") -> tuple[Step, ...]:
    """Named steps from the nominal speedup 1/(1 - s) to the predicted one; the factors multiply exactly.

    Each step makes the cost model of both workloads one effect more real and takes the ratio again.

    Parameters
    ----------
    dense, pruned : Workload
    hw : HardwareProfile
    runtime : {"cuda_graph", "eager"}

    Returns
    -------
    tuple of Step
        The first is "nominal" with factor and speedup 1/(1 - s); the last has the predicted speedup.
    """
    applied = pruned.meta.applied[len(dense.meta.applied) :]
    asked, realised = _together([a.sparsity for a in applied]), _together([a.realised for a in applied])
    costs = cost_batch([dense, pruned], hw, runtime)
    ideal = pruned.take(~pruned.overhead)
    ladders = [_ladder(w, c.seconds, hw) for w, c in ((dense, costs[0]), (pruned, costs[1]))]
    kept = ~pruned.overhead
    dense_total = {name: float(column @ dense.count) for name, column in ladders[0].items()}
    ideal_total = {name: float(column[kept] @ ideal.count) for name, column in ladders[1].items()}
    pruned_kernel = float(ladders[1]["kernel"] @ pruned.count)
    levels = [
        ("rounding", 1.0 / (1.0 - realised)),
        ("parts not pruned", float(dense.flops.sum() / ideal.flops.sum())),
        ("memory-bound operators", dense_total["ideal"] / ideal_total["ideal"]),
        ("zeros the kernel computes", dense_total["roofline"] / ideal_total["roofline"]),
        ("tile quantisation", dense_total["tile"] / ideal_total["tile"]),
        ("wave quantisation", dense_total["wave"] / ideal_total["wave"]),
        ("alignment", dense_total["alignment"] / ideal_total["alignment"]),
        ("kernel efficiency", dense_total["kernel"] / ideal_total["kernel"]),
        ("overhead operators", dense_total["kernel"] / pruned_kernel),
        ("launch or host time", costs[0].total_s / costs[1].total_s),
    ]
    before = 1.0 / (1.0 - asked)
    steps = [Step("nominal", before, before, f"1 / (1 - {asked:.3g}): what a fraction of {asked:.3g} removed suggests")]
    for name, value in levels:
        steps.append(Step(name, value / before, value, NOTES[name]))
        before = value
    return tuple(steps)


def _ladder(w: Workload, seconds: F, hw: HardwareProfile) -> dict[str, F]:
    """Seconds of every row as more and more effects are counted; operators that are not GEMMs step from roofline to kernel at once."""
    ideal = ideal_roofline(w, hw)
    floor = np.minimum(_launch_floor(w, hw), seconds)
    rungs = {name: ideal.copy() for name in ("ideal", "roofline", "tile", "wave", "alignment")}
    rungs["kernel"] = np.maximum(seconds - floor, np.minimum(ideal, seconds))
    gemm = np.flatnonzero(w.kind == Kind.GEMM)
    for code in np.unique(w.dtype[gemm].astype(np.int64) * len(DTYPES) + w.weight_dtype[gemm]):
        rows = gemm[w.dtype[gemm].astype(np.int64) * len(DTYPES) + w.weight_dtype[gemm] == code]
        ladder = gemm_ladder(
            w.m[rows],
            w.n[rows],
            w.k[rows],
            hw,
            dtype=DTYPES[code // len(DTYPES)],
            weight_dtype=DTYPES[code % len(DTYPES)],
            kernel=w.kernel[rows],
            density=w.density[rows],
        )
        for name in ("roofline", "tile", "wave", "alignment", "kernel"):
            rungs[name][rows] = ladder[name]
    return rungs


def _launch_floor(w: Workload, hw: HardwareProfile) -> F:
    """Fixed time of one kernel that is not a GEMM, s: that of an elementwise operator without bytes, or of attention by its constant."""
    floor = np.zeros(len(w))
    rows = w.kind == Kind.ELEMENTWISE
    if rows.any():
        nothing = np.zeros(int(rows.sum()))
        floor[rows] = elementwise_time(
            nothing, nothing, hw, role=w.role[rows], dtype=DTYPES[int(w.dtype[rows][0])]
        ).seconds
    for kind, operator in ((Kind.PREFILL_ATTENTION, "attention_prefill"), (Kind.DECODE_ATTENTION, "attention_decode")):
        rows = w.kind == kind
        if rows.any():
            floor[rows] = hw.section(operator, DTYPES[int(w.dtype[rows][0])])["t0_s"]
    return floor
