"""The benchmark of the taxonomy paper (arXiv 2606.09080): its table, equal depths, time by part and kernels, predicted.

The published numbers are in ``calibration/measurements/published_paper.csv``, quoted from a reading note of the paper.
The conditions are those of the paper's code (github.com/EIT-NLP/LLM-Pruning, PruningInferSim): batch 1, 8, 16, 32 at
1024 tokens, logits of all positions, a CUDA graph. Nothing is fitted to a cell of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.measurements import published
from simulator.arrays import Array
from simulator.codes import ROLES, Kind, Part
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.result import Result
from simulator.prediction.table import table
from simulator.pruning import prune
from simulator.uncertainty.forward import forward_passes, operator_times
from simulator.workload import Workload, WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

MODEL, HARDWARE, ENGINE = "llama-3.1-8b", "rtx_pro_6000", "reference"
BATCHES, SEQ, PHASES = (1, 8, 16, 32), 1024, ("prefill", "decode")
PRINTED = 0.005  # half a unit of the last printed digit of a published speedup

PARTS: Mapping[str, tuple[str, ...]] = {
    "gate/up/down": ("gate", "up", "down"),
    "attention": ("attention",),
    "q/k/v/o": ("q", "k", "v", "o"),
    "lm_head": ("lm_head",),
}
"""Parts of Figure 2 -> roles; other kernels are elementwise, gaps between kernels are "graph execution"."""


@dataclass(frozen=True)
class Cell:
    """A speedup of the table: the mean over the batches, the mean ends of the intervals, the published value or NaN."""

    hardware: str
    engine: str
    family: str
    sparsity: float
    phase: str
    published: float
    predicted: float
    lower: float
    upper: float
    by_batch: tuple[float, ...]

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.published - 1.0

    @property
    def inside(self) -> bool:
        """Whether the published value lies in the interval, within its rounding."""
        return self.lower - PRINTED <= self.published <= self.upper + PRINTED


def table_2(
    hardware: Sequence[str] = (HARDWARE,),
    engine: Sequence[str] = (ENGINE,),
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Return the paper's Table 2 on some devices in some engines; published values only for the paper's device and
    engine."""
    rows = [r for r in published("paper") if r["what"] == "table 2"]
    known = {(r["family"], float(r["sparsity"]), r["phase"]): float(r["value"]) for r in rows}
    families = list(dict.fromkeys(family for family, _, _ in known))
    found: dict[tuple[str, str, str, float, str], list[Result]] = {}
    asked: dict[str, Any] = {"phase": PHASES, "batch": BATCHES, "seq": [SEQ], "engine": engine, "progress": progress}
    for r in table([MODEL], hardware, families, sorted({s for _, s, _ in known}), **asked):
        found.setdefault((r.hardware, r.engine, r.family, r.sparsity, r.phase), []).append(r)
    own, out = (load_hardware(HARDWARE).label, ENGINE), []
    for key, results in found.items():
        results.sort(key=lambda r: r.batch)
        ends = np.array([(r.speedup, r.speedup_lower, r.speedup_upper) for r in results]).mean(axis=0).tolist()
        values: list[Any] = [known[key[2:]] if key[:2] == own else float("nan"), *ends]
        out.append(Cell(*key, *values, tuple(r.speedup for r in results)))  # type: ignore[call-arg]
    return out


@dataclass(frozen=True)
class EqualDepth:
    """Fraction of the layers to drop for the prefill speedup of a family at 50 %."""

    family: str
    published: float
    by_table: float  # from the published speedups of the family and of depth; NaN without the family in the table
    mean: float  # predicted over the table's batches
    batch_1: float  # predicted at batch 1


def equal_depths() -> list[EqualDepth]:
    """Return families at 50 % and the depth pruning with the same prefill speedup (section 5.3).

    Hidden sizes are pruned as by SliceGPT, with its residual projections.
    """
    rows = [r for r in published("paper") if r["what"] == "section 5.3"]
    model = load_model(MODEL)
    bench = partial(table, [model], [HARDWARE], phase=["prefill"], batch=BATCHES, seq=[SEQ], engine=[ENGINE])
    fractions = [i / model.layers for i in range(model.layers)]
    depth = _by_batch(bench(family=["depth"], sparsity=fractions))
    speedups = _by_batch(bench(family=[r["family"] for r in rows if r["family"] != "width_cross"], sparsity=[0.5]))
    speedups |= _by_batch(bench(method=["slicegpt"], sparsity=[0.5]))
    by_depth = np.array([depth["depth", s] for s in fractions])
    tables = {(c.family, c.sparsity): c.published for c in table_2() if c.phase == "prefill"}
    # the time that dropping layers saves is proportional to their number
    saved = float(np.mean([(1.0 - 1.0 / tables["depth", s]) / s for s in (0.25, 0.5)]))

    def depth_of(speeds: Array, speedup: float) -> float:
        return float(np.interp(1.0 / speedup, 1.0 / speeds[::-1], np.array(fractions)[::-1]))

    out = []
    for r in rows:
        speeds = np.array(speedups[r["family"], 0.5])
        mean, first = (depth_of(by_depth[:, at].mean(axis=1), speeds[at].mean()) for at in (slice(None), [0]))
        printed = tables.get((r["family"], 0.5), float("nan"))
        out.append(EqualDepth(r["family"], float(r["value"]), (1.0 - 1.0 / printed) / saved, mean, first))
    return out


def _by_batch(records: Iterable[Result]) -> dict[tuple[str, float], list[float]]:
    out: dict[tuple[str, float], list[float]] = {}
    for r in sorted(records, key=lambda r: r.batch):
        out.setdefault((r.family, r.sparsity), []).append(r.speedup)
    return out


@dataclass(frozen=True)
class FigurePart:
    """A part of a pass: its time in the paper and its predicted time."""

    phase: str
    part: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_s / self.measured_s - 1.0


def figure_2() -> list[FigurePart]:
    """Return the parts of prefill and decode, and the whole.

    In prefill the paper attributes 4.5 % to the graph and under 0.1 % to the head. Its code computes logits of all
    positions, which take as long as the part of the graph. In prefill, graph and head are therefore compared together.
    """
    rows, out = [r for r in published("paper") if r["what"] == "figure 2"], []
    for phase in dict.fromkeys(r["phase"] for r in rows):
        parts = [r for r in rows if r["phase"] == phase]
        (total,) = (float(r["value"]) for r in parts if r["metric"] == "seconds")
        shares, first = {r["part"]: float(r["value"]) for r in parts if r["metric"] == "share"}, parts[0]
        batch, seq = int(first["batch"]), int(first["seq"])
        w = lower(load_model(first["model"]), phase=phase, batch=batch, seq=seq, engine="reference")
        p = forward_passes(WorkloadBatch.of([w]), load_hardware(first["hardware"]))
        role = np.array(ROLES)[w.role]
        predicted = {name: float(p.row_s[np.isin(role, roles)].sum()) for name, roles in PARTS.items()}
        predicted["elementwise"] = float(p.row_s[w.kind == Kind.ELEMENTWISE].sum())
        predicted["graph execution"] = float(p.gap_s[0])
        for times in (shares, predicted) if phase == "prefill" else ():
            times["graph execution and lm_head"] = times.pop("graph execution") + times.pop("lm_head")
        out += [FigurePart(phase, name, share * total, predicted[name]) for name, share in shares.items()]
        out.append(FigurePart(phase, "all", total, float(p.total_s[0])))
    return out


@dataclass(frozen=True)
class Growth:
    """Time outside GEMMs of a pruned pass over the time outside GEMMs of the dense pass."""

    family: str
    phase: str
    published: float
    by_batch: tuple[float, ...]  # predicted


def outside_gemms() -> list[Growth]:
    """Return the growth of the time outside GEMMs at 50 % of dynamic depth and low rank (section 5.4), with the gaps
    between kernels."""
    hw, model, out = load_hardware(HARDWARE), load_model(MODEL), []
    for r in (r for r in published("paper") if r["what"] == "section 5.4"):
        ratios = []
        for batch in BATCHES:
            dense = lower(model, phase=r["phase"], batch=batch, seq=SEQ, engine=ENGINE)
            p = forward_passes(WorkloadBatch.of([dense, prune(dense, r["family"], float(r["sparsity"]))]), hw)
            outside = np.bincount(p.workloads.owner, p.row_s * (p.workloads.rows.kind != Kind.GEMM)) + p.gap_s
            ratios.append(float(outside[1] / outside[0]))
        out.append(Growth(r["family"], r["phase"], float(r["value"]), tuple(ratios)))
    return out


@dataclass(frozen=True)
class KernelChart:
    """A speedup in the authors' kernel charts: one operator at 50 % against the dense one, published and predicted."""

    family: str
    part: str
    size: int  # tokens
    published: float
    predicted: float
    note: str

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.published - 1.0


def kernel_charts() -> list[KernelChart]:
    """Return the charts of the authors' kernels (RTX 5090).

    The device has no kernel table, so published dense times are used where they exist; between them the rate of a dense
    GEMM is interpolated.
    """
    rows = [r for r in published("paper") if r["what"] == "kernel"]
    hw, out = load_hardware(rows[0]["hardware"]), []
    cubes = {float(r["seq"]): float(r["value"]) for r in rows if r["family"] == "dense"}  # s by side
    sides, seconds = np.array(list(cubes)), np.array(list(cubes.values()))
    for r in (r for r in rows if r["family"] != "dense"):
        tokens = int(r["seq"])
        if r["part"] == "queries":
            dense_s, pruned_s = _queries(tokens, hw)
        else:
            side = 4096 if "n and k of 4096" in r["note"] else tokens
            pruned_s, flops = _product(r["family"], r["part"], tokens, side, hw), 2.0 * tokens * side**2
            rate = np.interp(np.log(flops), np.log(2.0 * sides**3), 2.0 * sides**3 / seconds)
            dense_s = cubes[tokens] if side == tokens else float(flops / rate)
        out.append(KernelChart(r["family"], r["part"], tokens, float(r["value"]), dense_s / pruned_s, r["note"]))
    return out


def _product(family: str, part: str, m: int, side: int, hw: HardwareProfile) -> float:
    """Return the time of one pruned GEMM of an MLP with the operators that the family adds for it."""
    axis, kernel, *groups = part.replace(" groups of ", " ").split()
    layer = {"layer": 0, "layers": 1, "part": int(Part.MLP), "m": m, "n": side, "k": side}
    w = Workload.from_rows([{"role": "gate", **layer}, {"role": "down", **layer}])
    options: dict[str, Any] = {"channel_groups": side // int(groups[0])} if groups else {}
    pruned = prune(w, family, 0.5, kernel=kernel, **options)
    around = ("down", "scatter") if axis == "K" else ("gate", "gather")
    return float(
        (operator_times(pruned, hw)[0].seconds * pruned.count * pruned.is_role(*around, "select", "sort")).sum()
    )


def _queries(tokens: int, hw: HardwareProfile) -> tuple[float, float]:
    """Return the time of prefill attention, and of prefill attention with half of its queries and their sorting."""
    w = lower(load_model(MODEL), phase="prefill", batch=1, seq=tokens, engine=ENGINE)
    pruned = prune(w, "dynamic_depth", 0.5)
    own = pruned.is_role("attention") | (pruned.is_role("select", "sort") & (pruned.part == Part.ATTENTION))
    times = [operator_times(x, hw)[0].seconds * x.count for x in (w, pruned)]
    return float(times[0][w.is_role("attention")].sum()), float(times[1][own].sum())
