"""The taxonomy paper's bench (arXiv 2606.09080), predicted: its table, its equivalences, where time goes, its kernels.

Use :func:`table_2` for speedups of families beside the published ones, :func:`equal_depths`, :func:`figure_2`,
:func:`outside_gemms` and :func:`kernel_charts` for the rest. The published numbers are those of
``calibration/measurements/published_paper.csv``, quoted second-hand from a reading note of the paper; what its bench
runs is read off its own code (github.com/EIT-NLP/LLM-Pruning, PruningInferSim: batch 1, 8, 16, 32 at 1024 tokens,
logits of all positions, a CUDA graph). Nothing is fitted to a cell of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.measurements import published
from simulator.arrays import Array
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.predict.result import Result
from simulator.predict.table import table
from simulator.pruning import prune
from simulator.uncertainty.forward import forward_passes, operator_times
from simulator.workload import ROLES, Kind, Part, Workload
from simulator.workload_batch import WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

MODEL, HARDWARE, ENGINE = "llama-3.1-8b", "rtx_pro_6000", "reference"
BATCHES, SEQ = (1, 8, 16, 32), 1024
PHASES = ("prefill", "decode")
PRINTED = 0.005
"""Half of the last digit that is printed of a published speedup."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "gate/up/down": ("gate", "up", "down"),
    "attention": ("attention",),
    "q/k/v/o": ("q", "k", "v", "o"),
    "lm_head": ("lm_head",),
}
"""Parts of the figure -> roles; all else is elementwise, and the gaps between kernels are "graph execution"."""


@dataclass(frozen=True)
class Cell:
    """A speedup of the table: the mean over the batches, with the mean ends of its intervals; published or NaN."""

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
        return self.predicted / self.published - 1.0

    @property
    def inside(self) -> bool:
        """Whether the published value lies in the interval, as far as its digits tell."""
        return self.lower - PRINTED <= self.published <= self.upper + PRINTED


def table_2(
    hardware: Sequence[str] = (HARDWARE,),
    engine: Sequence[str] = (ENGINE,),
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """The paper's Table 2 on some devices in some engines; published values beside those of its own bench alone;
    ``progress`` as in :func:`simulator.table`.

    >>> cells = table_2()
    >>> len(cells), max(abs(c.error) for c in cells if c.family != "dynamic_depth") < 0.08
    (20, True)
    """
    rows = [r for r in published("paper") if r["what"] == "table 2"]
    known = {(r["family"], float(r["sparsity"]), r["phase"]): float(r["value"]) for r in rows}
    families = list(dict.fromkeys(family for family, _, _ in known))
    found: dict[tuple[str, str, str, float, str], list[Result]] = {}
    asked: dict[str, Any] = {"phase": PHASES, "batch": BATCHES, "seq": [SEQ], "engine": engine, "progress": progress}
    for r in table([MODEL], hardware, families, sorted({s for _, s, _ in known}), **asked):
        found.setdefault((r.hardware, r.engine, r.family, r.sparsity, r.phase), []).append(r)
    own = load_hardware(HARDWARE).label
    return [
        Cell(
            *(hw, name, family, s, phase),
            known[family, s, phase] if (hw, name) == (own, ENGINE) else float("nan"),
            *_means(records),
        )
        for (hw, name, family, s, phase), records in found.items()
    ]


def _means(records: Sequence[Result]) -> tuple[float, float, float, tuple[float, ...]]:
    ordered = sorted(records, key=lambda r: r.batch)
    ends = np.array([(r.speedup, r.speedup_lower, r.speedup_upper) for r in ordered]).mean(axis=0)
    return float(ends[0]), float(ends[1]), float(ends[2]), tuple(r.speedup for r in ordered)


@dataclass(frozen=True)
class EqualDepth:
    """The fraction of the layers to drop for the prefill speedup that a family has at 50 %."""

    family: str
    published: float
    by_table: float  # from the published speedups of both, NaN where the table lacks the family
    mean: float  # predicted over the table's batches
    batch_1: float  # predicted at batch 1


def equal_depths() -> list[EqualDepth]:
    """Section 5.3: families at 50 % and the depth pruning that they equal in prefill; hidden sizes are pruned as
    SliceGPT's, with its residual projections."""
    rows = [r for r in published("paper") if r["what"] == "section 5.3"]
    model = load_model(MODEL)
    asked: dict[str, Any] = {"phase": ["prefill"], "batch": BATCHES, "seq": [SEQ], "engine": [ENGINE]}
    fractions = [i / model.layers for i in range(model.layers)]
    depth = _by_batch(table([model], [HARDWARE], ["depth"], fractions, **asked))
    names = [r["family"] for r in rows if r["family"] != "width_cross"]
    found = _by_batch(table([model], [HARDWARE], names, [0.5], **asked))
    found |= _by_batch(table([model], [HARDWARE], method=["slicegpt"], sparsity=[0.5], **asked))
    speeds = np.array([depth["depth", s] for s in fractions])
    tables = {(c.family, c.sparsity): c.published for c in table_2() if c.phase == "prefill"}
    drawn = np.array([(s, tables["depth", s]) for s in (0.25, 0.5)])
    out = []
    for r in rows:
        own = np.array(found[r["family"], 0.5])
        mean, first = (_depth_of(speeds[:, at].mean(axis=1), fractions, own[at].mean()) for at in (slice(None), [0]))
        printed = tables.get((r["family"], 0.5), float("nan"))
        # the time that dropping layers saves is proportional to their number
        saved = float(np.mean((1.0 - 1.0 / drawn[:, 1]) / drawn[:, 0]))
        out.append(EqualDepth(r["family"], float(r["value"]), (1.0 - 1.0 / printed) / saved, mean, first))
    return out


def _by_batch(records: Iterable[Result]) -> dict[tuple[str, float], list[float]]:
    found: dict[tuple[str, float], list[float]] = {}
    for r in sorted(records, key=lambda r: r.batch):
        found.setdefault((r.family, r.sparsity), []).append(r.speedup)
    return found


def _depth_of(speeds: Array, fractions: Sequence[float], speedup: float) -> float:
    return float(np.interp(1.0 / speedup, 1.0 / speeds[::-1], np.array(fractions)[::-1]))


@dataclass(frozen=True)
class FigurePart:
    """A part of a pass: its time in the paper, and predicted."""

    phase: str
    part: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1.0


def figure_2() -> list[FigurePart]:
    """Parts of prefill and decode, and the whole.

    In prefill the paper's graph takes 4.5 % that no kernel shows and its head under 0.1 %; logits of all positions, as
    its code computes them, take what the graph does. So the two are compared together there.
    """
    rows = [r for r in published("paper") if r["what"] == "figure 2"]
    out = []
    for phase in dict.fromkeys(r["phase"] for r in rows):
        mine = [r for r in rows if r["phase"] == phase]
        (total,) = (float(r["value"]) for r in mine if r["metric"] == "seconds")
        shares = {r["part"]: float(r["value"]) for r in mine if r["metric"] == "share"}
        first = mine[0]
        batch, seq = int(first["batch"]), int(first["seq"])
        w = lower(load_model(first["model"]), phase=phase, batch=batch, seq=seq, engine="reference")
        p = forward_passes(WorkloadBatch.of([w]), load_hardware(first["hardware"]))
        role, spent = np.array(ROLES)[w.role], p.row_s
        known = {name: float(spent[np.isin(role, roles)].sum()) for name, roles in PARTS.items()}
        known["elementwise"] = float(spent[w.kind == Kind.ELEMENTWISE].sum())
        known["graph execution"] = float(p.gap_s[0])
        if phase == "prefill":
            shares["graph execution and lm_head"] = shares.pop("graph execution") + shares.pop("lm_head")
            known["graph execution and lm_head"] = known.pop("graph execution") + known.pop("lm_head")
        out += [FigurePart(phase, name, share * total, known[name]) for name, share in shares.items()]
        out.append(FigurePart(phase, "all", total, float(p.total_s[0])))
    return out


@dataclass(frozen=True)
class Growth:
    """Time outside GEMMs of a pruned pass over that of the dense one."""

    family: str
    phase: str
    published: float
    by_batch: tuple[float, ...]  # predicted


def outside_gemms() -> list[Growth]:
    """Section 5.4: what dynamic depth and low rank add outside GEMMs at 50 %; gaps between kernels count as outside."""
    rows = [r for r in published("paper") if r["what"] == "section 5.4"]
    hw, model, out = load_hardware(HARDWARE), load_model(MODEL), []
    for r in rows:
        ratios = []
        for batch in BATCHES:
            dense = lower(model, phase=r["phase"], batch=batch, seq=SEQ, engine=ENGINE)
            p = forward_passes(WorkloadBatch.of([dense, prune(dense, r["family"], float(r["sparsity"]))]), hw)
            outside = np.bincount(p.workloads.owner, p.row_s * (p.workloads.rows.kind != Kind.GEMM)) + p.gap_s
            ratios.append(float(outside[1] / outside[0]))
        out.append(Growth(r["family"], r["phase"], float(r["value"]), tuple(ratios)))
    return out


@dataclass(frozen=True)
class Chart:
    """A bar of the authors' kernel charts: the speedup of one operator at 50 % over the dense one, and predicted."""

    family: str
    part: str
    size: int  # tokens
    published: float
    predicted: float
    note: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1.0


def kernel_charts() -> list[Chart]:
    """The charts of the authors' kernels (RTX 5090), with the dense time that they print where they print one: the
    device has no kernel table, and a ratio is of their kernels, not of what is assumed of cuBLAS there."""
    rows = [r for r in published("paper") if r["what"] == "kernel"]
    hw = load_hardware(rows[0]["hardware"])
    cubes = {int(r["seq"]): float(r["value"]) for r in rows if r["family"] == "dense"}  # s by side
    out = []
    for r in rows:
        if r["family"] == "dense":
            continue
        tokens, value = int(r["seq"]), float(r["value"])
        if r["part"] == "queries":
            dense_s, pruned_s = _queries(tokens, hw)
        else:
            side = 4096 if "n and k of 4096" in r["note"] else tokens
            pruned_s = _product(r["family"], r["part"], tokens, side, hw)
            dense_s = cubes[tokens] if side == tokens else _between(cubes, 2.0 * tokens * side**2)
        out.append(Chart(r["family"], r["part"], tokens, value, dense_s / pruned_s, r["note"]))
    return out


def _between(cubes: Mapping[int, float], flops: float) -> float:
    """Time of a dense GEMM at the rate that printed ones have about its FLOPs."""
    work = 2.0 * np.array(list(cubes), dtype=np.float64) ** 3
    return float(flops / np.interp(np.log(flops), np.log(work), work / np.array(list(cubes.values()))))


_AROUND: Mapping[str, tuple[str, ...]] = {
    "M": ("gate", "gather", "select", "sort"),
    "N": ("gate", "gather", "select", "sort"),
    "K": ("down", "scatter", "select", "sort"),
}
"""Axis of a chart -> the GEMM of an MLP sublayer and what is added for it."""


def _product(family: str, part: str, m: int, side: int, hw: HardwareProfile) -> float:
    """Time of all that a kernel takes for one pruned GEMM, as a family has it in an MLP."""
    axis, kernel, *groups = part.replace(" groups of ", " ").split()
    layer = {"layer": 0, "layers": 1, "part": int(Part.MLP), "m": m, "n": side, "k": side}
    w = Workload.from_rows([{"role": "gate", **layer}, {"role": "down", **layer}])
    options: dict[str, Any] = {"channel_groups": side // int(groups[0])} if groups else {}
    pruned = prune(w, family, 0.5, kernel=kernel, **options)
    seconds = operator_times(pruned, hw)[0].seconds * pruned.count * pruned.is_role(*_AROUND[axis])
    return float(seconds.sum())


def _queries(tokens: int, hw: HardwareProfile) -> tuple[float, float]:
    """Time of prefill attention and of the same with half of its queries, their sorting included."""
    w = lower(load_model(MODEL), batch=1, seq=tokens, engine=ENGINE)
    pruned = prune(w, "dynamic_depth", 0.5)
    own = pruned.is_role("attention") | (pruned.is_role("select", "sort") & (pruned.part == Part.ATTENTION))
    times = [operator_times(x, hw)[0].seconds * x.count for x in (w, pruned)]
    return float(times[0][w.is_role("attention")].sum()), float(times[1][own].sum())
