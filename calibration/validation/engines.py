"""Engines end to end: published times, speedups and serving runs of whole models, summed up by engine and GPU.

Use :func:`end_to_end` for every comparison, :func:`summaries` for a line a group; ``docs/engines.md`` holds the
:func:`tables`. Rows of split "fit" are of sources that parameters of an engine were fitted on
(:mod:`calibration.validation.serving`, and by hand from the few rows there are), "judge" of others; serving runs are
judged with their model left out of the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from calibration.measurements import published
from calibration.validation.paper import figure_2
from calibration.validation.published import (
    MISS,
    Comparison,
    compare_dense,
    compare_gemms,
    compare_serving,
    compare_speedups,
    median_error,
)
from calibration.validation.report import table
from calibration.validation.serving import LeftOut, leave_models_out
from simulator.hardware.library import load_hardware

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: Mapping[str, str] = {
    "dense": "times of dense models",
    "measured": "of them on GPUs with kernel tables",
    "speedup": "speedups of pruned models",
    "given": "the same, given their dense time",
    "serve": "times per output token of serving runs",
}

NOT_USED: Mapping[str, int] = {
    "GPU or batch not stated (LLM-Pruner, ShortGPT, FP8 2:4 in vLLM)": 11,
    "share of the attention computed not stated (MInference, A-Shape, InfLLM)": 51,
    "another batch for the pruned model, so no ratio at equal conditions (SliceGPT Table 11)": 2,
    "GPU without a profile (Quadro RTX 6000, RTX 5090 kernels)": 27,
    "not a language model (SAM)": 2,
}
"""Rows of published end-to-end speedups that are not carried, by reason."""


@dataclass(frozen=True)
class Summary:
    """How well a group of comparisons agrees; shares and relative errors."""

    kind: str
    engine: str
    gpu: str  # "": all
    split: str
    rows: int
    median: float  # absolute error
    bias: float  # median error
    inside: float
    half: float  # median half-width of the interval


def end_to_end() -> dict[str, list[Comparison]]:
    """Every comparison by kind, those of :data:`KINDS`."""
    given = [c for c in compare_speedups(given=True) if "projections" not in c.where]
    return {"dense": compare_dense(), "speedup": compare_speedups(), "given": given, "serve": compare_serving()}


def summaries(found: Mapping[str, Sequence[Comparison]], by_gpu: bool = True) -> list[Summary]:
    """A line for each kind, engine, split and GPU (or for all GPUs), without rows whose pruned model ran in other
    modelling code."""
    groups: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for kind, rows in found.items():
        for c in rows:
            if not c.own_code:
                groups.setdefault((kind, c.engine, c.split, c.gpu if by_gpu else ""), []).append(c)
    return [summary(rows, kind, engine, gpu, split) for (kind, engine, split, gpu), rows in groups.items()]


def summary(rows: Sequence[Comparison], kind: str = "", engine: str = "", gpu: str = "", split: str = "") -> Summary:
    """The line of some comparisons."""
    inside, half = float(np.mean([c.inside for c in rows])), median(c.half for c in rows)
    return Summary(kind, engine, gpu, split, len(rows), median_error(rows), median(c.error for c in rows), inside, half)


def tables() -> list[str]:
    """Tables of ``docs/engines.md`` in their order."""
    found, sparse, narrow = end_to_end(), compare_gemms("2:4"), compare_gemms("narrower")
    judged = {kind: [c for c in rows if c.split == "judge"] for kind, rows in found.items()}
    own = [c for c in judged["given"] if c.own_code]
    left_out = leave_models_out()
    misses = [
        c for c in (*found["dense"], *found["speedup"], *sparse, *narrow) if abs(c.error) > MISS and not c.own_code
    ]
    assumed = dict.fromkeys((c.source, c.assumed) for kind in ("dense", "speedup") for c in found[kind] if c.assumed)
    lists = [row for name in ("dense", "speedups", "serving") for row in published(name) if row["left_out"]]
    counts = {why: sum(row["left_out"] == why for row in lists) for why in dict.fromkeys(r["left_out"] for r in lists)}
    overall = [summary([c for c in rows if not c.own_code], kind) for kind, rows in judged.items() if rows]
    measured = [c for c in judged["dense"] if load_hardware(c.gpu).section("gemm", "bf16").status != "default"]
    overall.append(summary(measured, "measured"))
    return [
        _summed(overall, ("kind",)),
        _summed(summaries({k: v for k, v in found.items() if k != "serve"}, by_gpu=False), ("kind", "engine", "split")),
        _left_out(left_out),
        _summed(summaries({"serve": found["serve"]}), ("engine", "gpu")),
        _figure_2(),
        _compared(found["dense"], _seconds),
        _compared([c for c in found["speedup"] if not c.own_code]),
        _compared([c for c in found["given"] if not c.own_code]),
        _compared(own),
        _compared(sparse),
        _compared(narrow),
        table(["what", "where", "error", "likely reason"], [_miss(c) for c in misses], left=(0, 1, 3)),
        table(["source", "assumed"], list(assumed), left=(0, 1)),
        table(["rows", "why"], [[str(n), why] for why, n in {**counts, **NOT_USED}.items()], left=(1,)),
    ]


def _summed(lines: Iterable[Summary], names: Sequence[str]) -> str:
    order = list(KINDS)
    lines = sorted(lines, key=lambda x: [order.index(x.kind), *(getattr(x, name) for name in names)])
    header = [*names, "rows", "median error", "bias", "inside the 90 % interval", "half-width"]
    cells = [
        [
            *(KINDS.get(getattr(line, name), getattr(line, name)) for name in names),
            str(line.rows),
            f"{100 * line.median:.1f} %",
            f"{100 * line.bias:+.1f} %",
            f"{100 * line.inside:.0f} %",
            f"{100 * line.half:.0f} %",
        ]
        for line in lines
    ]
    return table(header, cells, left=range(len(names)))


def _left_out(lines: Sequence[LeftOut]) -> str:
    header = ["engine", "model left out", "GPU", "format", "rows"]
    header += ["TPOT: median error", "bias", "request: median error"]
    cells = []
    for engine in dict.fromkeys(x.engine for x in lines):
        mine = [x for x in lines if x.engine == engine]
        for x in mine:
            errors = f"{100 * x.tpot_error:.1f} %", f"{100 * x.tpot_bias:+.1f} %", f"{100 * x.request_error:.1f} %"
            cells.append([engine, x.model, x.hardware, x.dtype, str(x.rows), *errors])
        error = np.expm1(np.concatenate([x.logs for x in mine]))
        both = f"{100 * np.median(np.abs(error)):.1f} %", f"{100 * np.median(error):+.1f} %"
        cells.append([engine, "all", "", "", str(len(error)), *both, ""])
    return table(header, cells, left=range(4))


def _figure_2() -> str:
    cells = [[p.phase, p.part, _seconds(p.measured_s), _seconds(p.predicted_s), _percent(p.error)] for p in figure_2()]
    return table(["phase", "part", "measured", "predicted", "error"], cells, left=(0, 1))


def _miss(c: Comparison) -> list[str]:
    return [c.what, c.where, _percent(c.error), c.reason or "not known"]


def _percent(value: float) -> str:
    return f"{100 * value:+.0f} %"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _compared(rows: Iterable[Comparison], text: Callable[[float], str] = _times) -> str:
    cells = []
    for c in rows:
        interval = f"{text(c.lower)} to {text(c.upper)}"
        numbers = (text(c.measured), text(c.predicted), interval, f"{100 * c.error:+.1f} %")
        cells.append([c.engine or "GEMMs", c.what, c.where, *numbers, c.source])
    header = ["engine", "what", "where", "measured", "predicted", "interval", "error", "source"]
    return table(header, cells, left=(0, 1, 2, 7))


def scatter(found: Mapping[str, Sequence[Comparison]]) -> Figure:
    """Predicted against measured dense times and times per token, a panel an engine."""
    from simulator.figures.scatter import Cloud, scatter_figure

    rows = [*found["dense"], *found["serve"]]
    clouds = []
    for engine in sorted({c.engine for c in rows}):
        mine = [c for c in rows if c.engine == engine]
        clouds.append(Cloud(engine, [c.measured for c in mine], [c.predicted for c in mine], what="times"))
    return scatter_figure(clouds)
