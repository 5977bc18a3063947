"""From a dense and a pruned workload to a speedup: times, interval, bounds, and where the difference was lost.

Use :func:`speedup` for one pair, :func:`speedups` for many pruned versions of one dense workload on one device (one
vectorised pass), :func:`waterfall` for the named steps from the nominal 1/(1 - s) to the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.arguments import instance, listed
from simulator.arrays import FloatArray
from simulator.cost.base import BOTTLENECKS
from simulator.cost.elementwise import elementwise
from simulator.cost.forward import ForwardPass, by_formats, section_of
from simulator.cost.gemm_shapes import Options
from simulator.display import Displayed, as_plain, bars_html, by_column
from simulator.predict.applied import applied, as_pruned, one_setting
from simulator.predict.compare import Comparison, Pairs, compare, known
from simulator.predict.gain import gain, gain_html
from simulator.uncertainty.forward import forward_passes
from simulator.uncertainty.operators import gemm_steps, operator_time
from simulator.workload import Kind, Workload
from simulator.workload_batch import WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile


@dataclass(frozen=True)
class Step:
    """One step of the loss waterfall: ``factor`` multiplies the speedup before it to ``speedup``; both are ratios.

    >>> Step("launch", 0.98, 1.27, "fixed time of each kernel").factor
    0.98
    """

    name: str
    factor: float
    speedup: float
    note: str


class Waterfall(Displayed, tuple[Step, ...]):
    """The steps from the nominal speedup to the predicted one, in order: a tuple of :class:`Step`."""

    def _title(self) -> str:
        return f"{self[0].speedup:.2f}x promised, {self[-1].speedup:.2f}x predicted, {len(self) - 1} steps between"

    def _columns(self) -> Mapping[str, Any]:
        """A row a step."""
        return by_column(self.to_dict()["steps"])

    def _html(self) -> str:
        return bars_html([("promised", self[0].speedup), *((step.name, step.speedup) for step in self[1:])])

    def to_dict(self) -> dict[str, Any]:
        """``steps``, a dictionary each."""
        return {"steps": as_plain(tuple(self))}


@dataclass(frozen=True, repr=False)
class Speedup(Displayed):
    """The predicted speedup of a pruned workload over its dense one; times in s, the rest are ratios.

    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="prefill")
    >>> s = simulator.speedup(dense, simulator.prune(dense, "depth", 0.25), simulator.load_hardware("h100"))
    >>> print(repr(s)[:15], s.to_dict()["bottleneck"])
    <Speedup: 1.32x compute
    """

    dense_s: float  # of a pass
    dense_lower: float  # intervals at `level`
    dense_upper: float
    pruned_s: float
    pruned_lower: float
    pruned_upper: float
    speedup: float  # dense_s / pruned_s
    lower: float
    upper: float
    flop_bound: float  # ratio of FLOPs, the pruning's own overheads left out, as in the next two
    byte_bound: float  # of bytes
    roofline_bound: float  # of summed datasheet rooflines of the operators
    measured_bound: float | None  # of measured dense GEMM times at the two models' shapes, where they were measured
    bottleneck: str  # what holds most of the pruned time, one of BOUNDS
    bottleneck_share: float  # and the share it holds
    family: str  # families applied, joined by "+"
    sparsity: float  # asked for
    realised_sparsity: float  # after rounding
    level: float
    calibrated: bool  # every cost section used was fitted on the device's own measurements
    tokens_per_s: float | None  # of the pruned model, new ones, on all devices; None where the phase has none
    ttft_s: float | None  # time to the first token
    tpot_s: float | None  # time for each further one
    dense_tokens_per_s: float | None
    dense_ttft_s: float | None
    dense_tpot_s: float | None

    @property
    def efficiency(self) -> float:
        """Share of the possible gain that is granted, (speedup - 1) / (roofline_bound - 1); NaN where there is none."""
        possible = self.roofline_bound - 1.0
        return (self.speedup - 1.0) / possible if possible > 1e-9 else float("nan")

    def _title(self) -> str:
        return gain(self, self.lower, self.upper)

    def _html(self) -> str:
        return gain_html(self, self.lower, self.upper)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, times in s, and ``efficiency``."""
        return super().to_dict() | {"efficiency": self.efficiency}


def speedups(
    dense: Workload,
    pruned: Sequence[Workload],
    hw: HardwareProfile,
    level: float = 0.9,
    *,
    dense_s: float | None = None,
    pairs: Pairs | None = None,
) -> list[Speedup]:
    """Speedups of many pruned versions of a dense workload (as :func:`simulator.prune` returns them) on one device.

    Parameters
    ----------
    dense, pruned : Workload, sequence of Workload
        Of one setting: phase, batch, lengths, engine and devices.
    hw : HardwareProfile
        The device; what it lacks (a number format, 2:4 tensor cores) is an InputError, as are workloads that are not
        of one setting.
    level : float
        Of the intervals, in (0, 1).
    dense_s : float, optional
        Measured time of the dense one, s: it moves and narrows all.
    pairs : Pairs, optional
        :func:`pairs_of` these workloads, where they are compared on several devices.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode")
    >>> pruned = [simulator.prune(dense, "depth", s) for s in (0.0, 0.25)]
    >>> [round(s.speedup, 2) for s in speedups(dense, pruned, simulator.load_hardware("h100"))]
    [1.0, 1.26]
    """
    pairs = pairs or pairs_of(dense, pruned)
    c, _ = compare(pairs, hw, level, dense_s)
    columns: dict[str, Any] = {f.name: known(getattr(c, f.name)) for f in fields(Comparison)}
    columns |= {"flop_bound": pairs.flop_bound.tolist(), "byte_bound": pairs.byte_bound.tolist()}
    columns |= {"bottleneck": [BOTTLENECKS[code] for code in columns["bottleneck"]]}
    out = []
    for i, w in enumerate(pruned, start=1):
        families, asked, realised = applied(dense.meta, as_pruned(dense, w).meta)
        steps: dict[str, Any] = {"family": families, "sparsity": asked, "realised_sparsity": realised}
        of_pair = {name: column[i] for name, column in columns.items()}
        out.append(Speedup(**of_pair, **steps, measured_bound=None, level=level))
    return out


def pairs_of(dense: Workload, pruned: Sequence[Workload]) -> Pairs:
    """Pruned workloads and their dense one, ready to be compared on many devices; all of one setting."""
    for w in (dense, *listed("pruned", pruned)):
        instance("dense" if w is dense else "pruned", w, Workload, "simulator.lower")
    for w in pruned:
        one_setting(dense, w)
    return Pairs(WorkloadBatch.of([dense, *pruned]), np.zeros(1 + len(pruned), dtype=np.intp))


def speedup(
    dense: Workload, pruned: Workload, hw: HardwareProfile, level: float = 0.9, *, dense_s: float | None = None
) -> Speedup:
    """Speedup of one pruned workload over its dense workload on a device ``hw``; ``level``, ``dense_s`` and what is an
    InputError are as for :func:`speedups`. The pruned one may be of a model of its own, such as a checkpoint's, lowered
    in the same setting: what was pruned is then what tells the two apart.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", batch=1, seq=2048)
    >>> s = simulator.speedup(dense, simulator.prune(dense, "depth", sparsity=0.25), simulator.load_hardware("h100"))
    >>> bool(1.15 < s.lower < s.speedup < s.upper < 1 / 0.75)
    True
    """
    return speedups(dense, [pruned], hw, level, dense_s=dense_s)[0]


NOTES = {
    "rounding": "rounded to whole layers, head groups and aligned widths",
    "parts not pruned": "attention, lm_head, norms left alone: gives the FLOP bound",
    "memory-bound operators": "limited by bytes, not FLOPs: gives the roofline bound",
    "zeros the kernel computes": "the kernel computes the zeros, or fetches them",
    "tile quantisation": "shapes padded to whole tiles",
    "wave quantisation": "the last wave of tiles leaves SMs idle",
    "alignment": "widths off 8 (16-bit) leave the fast kernels",
    "kernel efficiency": "what kernels reach of the roofline at these shapes",
    "overhead operators": "routers, gathers, selections, projections pruning adds",
    "launch": "fixed time of each kernel, and the gaps between kernels",
    "host time": "launches and scheduling of the host, where they show",
}
"""What each step of the waterfall means."""


def waterfall(dense: Workload, pruned: Workload, hw: HardwareProfile, *, dense_s: float | None = None) -> Waterfall:
    """Named steps from the nominal speedup 1/(1 - s) to the predicted one; the factors multiply exactly.

    ``dense``, ``pruned``, ``hw``, ``dense_s`` and what is an InputError are as for :func:`speedup`. Each step makes the
    cost model of both workloads one effect more real and takes the ratio again. The first is "nominal" with factor and
    speedup 1/(1 - s); the last has the predicted speedup.

    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", engine="hf")
    >>> pruned = simulator.prune(dense, "width", 0.25)
    >>> steps = waterfall(dense, pruned, simulator.load_hardware("h100"))
    >>> min(steps, key=lambda step: step.factor).name
    'host time'
    """
    pairs = pairs_of(dense, [pruned])
    _, asked, realised = applied(dense.meta, as_pruned(dense, pruned).meta)
    workloads, p = pairs.workloads, forward_passes(pairs.workloads, hw)
    rungs, added = _ladder(p), workloads.rows.overhead & (workloads.owner > 0)

    def ratio(column: FloatArray) -> float:
        of_dense, of_pruned = workloads.total(column)
        return float(of_dense / of_pruned)

    values = [
        1.0 / max(1.0 - realised, 1e-9),  # all layers may be gone
        *(ratio(np.where(added, 0.0, c)) for c in (workloads.flops, *rungs.values())),
    ]
    ends = p.total_s if dense_s is None else compare(pairs, hw, dense_s=dense_s)[0].pruned_s
    values += [ratio(rungs["kernel"]), float(p.device_s[0] / p.device_s[1]), float(ends[0] / ends[1])]
    before = 1.0 / (1.0 - asked)
    steps = [Step("nominal", before, before, f"1 / (1 - {asked:.3g}): what a fraction of {asked:.3g} removed suggests")]
    for (name, note), value in zip(NOTES.items(), values, strict=True):
        steps.append(Step(name, value / before, value, note))
        before = value
    return Waterfall(steps)


def _ladder(p: ForwardPass) -> dict[str, FloatArray]:
    """Seconds of rows as more and more effects are counted; what is no GEMM steps from roofline to kernel at once."""
    w, ideal = p.workloads.rows, p.ideal_s
    rungs = {name: ideal.copy() for name in ("ideal", "roofline", "tile", "wave", "alignment")}
    rungs["kernel"] = np.maximum(p.row_s - np.minimum(_fixed(p), p.row_s), np.minimum(ideal, p.row_s))
    for rows, dtype, weight in by_formats(w, Kind.GEMM):
        options = Options(dtype, weight, w.kernel[rows], density=w.density[rows], block=w.block[rows])
        for name, seconds in gemm_steps(w.m[rows], w.n[rows], w.k[rows], p.hw, options).items():
            if name in rungs:
                rungs[name][rows] = seconds * w.count[rows]
    return rungs


def _fixed(p: ForwardPass) -> FloatArray:
    """Time of rows that are no GEMM without their work, s: elementwise without bytes, a constant of attention."""
    w, out = p.workloads.rows, np.zeros(len(p.workloads.rows))
    for kind in (Kind.ELEMENTWISE, Kind.PREFILL_ATTENTION, Kind.DECODE_ATTENTION):
        for rows, dtype, _ in by_formats(w, kind):
            if kind == Kind.ELEMENTWISE:
                empty = elementwise(0.0, 0.0, p.hw, role=w.role[rows], dtype=dtype)
                out[rows] = operator_time(empty, p.hw).seconds
            else:
                out[rows] = p.hw.section(section_of(w, rows[0]), dtype)["t0_s"]
    return out * w.count
