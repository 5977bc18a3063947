"""The benchmark of the taxonomy paper (arXiv 2606.09080): its table, equal depths, time by part and kernels, predicted.

The published numbers (``calibration/measurements/published_paper.csv``) are quoted from a reading note of the paper.
The conditions are those of its code (github.com/EIT-NLP/LLM-Pruning, PruningInferSim): batch 1, 8, 16, 32 at 1024
tokens, logits of all positions, a CUDA graph. Nothing is fitted to a cell of the table. Rows are dictionaries, as
``prunesim paper --json`` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.measurements import published
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.result import Result
from simulator.prediction.table import table
from simulator.pruning import prune
from simulator.uncertainty.forward import forward_passes, operator_times
from simulator.workload import ROLES, Kind, Part, Workload
from simulator.workload_batch import WorkloadBatch

Row = dict[str, Any]

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
    known = {(r["family"], float(r["sparsity"]), r["phase"]): float(r["value"]) for r in _published("table 2")}
    families = list(dict.fromkeys(family for family, _, _ in known))
    found: dict[tuple[str, str, str, float, str], list[Result]] = {}
    asked: dict[str, Any] = {"phase": PHASES, "batch": BATCHES, "seq": [SEQ], "engine": engine, "progress": progress}
    for r in table([MODEL], hardware, families, sorted({s for _, s, _ in known}), **asked):
        found.setdefault((r.hardware, r.engine, r.family, r.sparsity, r.phase), []).append(r)
    own, out = (load_hardware(HARDWARE).label, ENGINE), []
    for key, results in found.items():
        results.sort(key=lambda r: r.batch)
        predicted, low, high = np.mean([(r.speedup, r.speedup_lower, r.speedup_upper) for r in results], axis=0)
        printed = known[key[2:]] if key[:2] == own else float("nan")
        by_batch = tuple(r.speedup for r in results)
        out.append(Cell(*key, printed, float(predicted), float(low), float(high), by_batch))
    return out


def _published(what: str) -> list[Mapping[str, str]]:
    return [r for r in published("paper") if r["what"] == what]


def equal_depths() -> list[Row]:
    """Return families at 50 % and the fraction of layers to drop for the same prefill speedup (section 5.3): published;
    by the published table (NaN without the family there); predicted, as a mean over the batches and at batch 1."""
    rows, model = _published("section 5.3"), load_model(MODEL)
    bench = partial(table, [model], [HARDWARE], phase=["prefill"], batch=BATCHES, seq=[SEQ], engine=[ENGINE])
    fractions = np.arange(model.layers) / model.layers
    families = [r["family"] for r in rows if r["family"] != "width_cross"]  # which is pruned as by SliceGPT
    found: dict[tuple[str, float], dict[int, float]] = {}
    for r in (
        *bench(family=["depth"], sparsity=fractions.tolist()),
        *bench(family=families, sparsity=[0.5]),
        *bench(method=["slicegpt"], sparsity=[0.5]),
    ):
        found.setdefault((r.family, r.sparsity), {})[r.batch] = r.speedup
    speedups = {key: np.array([by_batch[b] for b in BATCHES]) for key, by_batch in found.items()}
    by_depth = np.array([speedups["depth", s] for s in fractions])
    tables = {(c.family, c.sparsity): c.published for c in table_2() if c.phase == "prefill"}
    # the time that dropping layers saves is proportional to their number
    saved = float(np.mean([(1.0 - 1.0 / tables["depth", s]) / s for s in (0.25, 0.5)]))
    out = []
    for row in rows:
        family, numbers = row["family"], {"published": float(row["value"])}
        numbers["by_table"] = (1.0 - 1.0 / tables.get((family, 0.5), float("nan"))) / saved
        for name, at in (("mean", slice(None)), ("batch_1", slice(1))):
            times, time = 1.0 / by_depth[::-1, at].mean(axis=1), 1.0 / speedups[family, 0.5][at].mean()
            numbers[name] = float(np.interp(time, times, fractions[::-1]))
        out.append({"family": family, **numbers})
    return out


def figure_2() -> list[Row]:
    """Return the times of the parts of prefill and decode, and of the whole.

    In prefill the paper attributes 4.5 % to the graph and under 0.1 % to the head. Its code computes logits of all
    positions, which take as long as the part of the graph. In prefill, graph and head are therefore compared together.
    """
    rows, out = _published("figure 2"), list[Row]()
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
        both = {name: (share * total, predicted[name]) for name, share in shares.items()}
        both["all"] = total, float(p.total_s[0])
        out += [{"phase": phase, "part": name, "measured_s": m, "predicted_s": t} for name, (m, t) in both.items()]
    return out


def outside_gemms() -> list[Row]:
    """Return the time outside GEMMs, with the gaps between kernels, of dynamic depth and low rank at 50 % over that of
    the dense pass (section 5.4), predicted by batch."""
    hw, model, out = load_hardware(HARDWARE), load_model(MODEL), []
    for r in _published("section 5.4"):
        ratios = []
        for batch in BATCHES:
            dense = lower(model, phase=r["phase"], batch=batch, seq=SEQ, engine=ENGINE)
            p = forward_passes(WorkloadBatch.of([dense, prune(dense, r["family"], float(r["sparsity"]))]), hw)
            outside = np.bincount(p.workloads.owner, p.row_s * (p.workloads.rows.kind != Kind.GEMM)) + p.gap_s
            ratios.append(float(outside[1] / outside[0]))
        out.append({"family": r["family"], "phase": r["phase"], "published": float(r["value"]), "by_batch": ratios})
    return out


def kernel_charts() -> list[Row]:
    """Return the charts of the authors' kernels (RTX 5090): speedups of one operator at 50 % by number of tokens.

    The device has no kernel table, so published dense times are used where they exist; between them the rate of a dense
    GEMM is interpolated.
    """
    rows = _published("kernel")
    hw, out = load_hardware(rows[0]["hardware"]), []
    cubes = {float(r["seq"]): float(r["value"]) for r in rows if r["family"] == "dense"}  # s by side
    sides, seconds = np.array(list(cubes)), np.array(list(cubes.values()))
    for r in (r for r in rows if r["family"] != "dense"):
        tokens, side = int(r["seq"]), 4096 if "n and k of 4096" in r["note"] else int(r["seq"])
        if r["part"] == "queries":
            dense = lower(load_model(MODEL), phase="prefill", batch=1, seq=tokens, engine=ENGINE)
            pruned = prune(dense, "dynamic_depth", 0.5)  # half of the queries of attention, and their sorting
            rows_ = pruned.is_role("attention") | (pruned.is_role("select", "sort") & (pruned.part == Part.ATTENTION))
            dense_s = _seconds(dense, dense.is_role("attention"), hw)
        else:
            axis, kernel, *groups = r["part"].replace(" groups of ", " ").split()
            options: dict[str, Any] = {"channel_groups": side // int(groups[0])} if groups else {}
            layer = {"layer": 0, "layers": 1, "part": int(Part.MLP), "m": tokens, "n": side, "k": side}
            w = Workload.from_rows([{"role": "gate", **layer}, {"role": "down", **layer}])
            pruned = prune(w, r["family"], 0.5, kernel=kernel, **options)
            around = ("down", "scatter") if axis == "K" else ("gate", "gather")
            rows_ = pruned.is_role(*around, "select", "sort")  # one GEMM and the operators that the family adds
            flops = 2.0 * tokens * side**2
            rate = np.interp(np.log(flops), np.log(2.0 * sides**3), 2.0 * sides**3 / seconds)
            dense_s = cubes[tokens] if side == tokens else float(flops / rate)
        numbers = {"published": float(r["value"]), "predicted": dense_s / _seconds(pruned, rows_, hw)}
        out.append({"family": r["family"], "part": r["part"], "size": tokens, **numbers, "note": r["note"]})
    return out


def _seconds(w: Workload, rows: NDArray[np.bool_], hw: HardwareProfile) -> float:
    return float((operator_times(w, hw)[0].seconds * w.count)[rows].sum())
