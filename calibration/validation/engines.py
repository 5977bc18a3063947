"""Evaluate engines end to end: published times, speedups and serving runs of whole models, by engine and GPU.

Use :func:`end_to_end` for every comparison and :func:`summaries` for one line per group;
``docs/generated/engines.md`` has the :func:`tables`. Rows of split "fit" are from sources on which engine parameters
were fitted (:mod:`calibration.validation.serving`; by hand where rows are few), rows of split "judge" from other
sources. Serving runs are evaluated with their model held out of the fit.
"""

from __future__ import annotations

from collections import Counter
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
from calibration.validation.serving import HeldOut, held_out_models
from simulator.arrays import FloatArray
from simulator.engines.engine import list_engines, load_engine
from simulator.engines.loading import FEATURES, Loading
from simulator.hardware.library import load_hardware
from simulator.units import percent

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
"""Published end-to-end speedups that are not in the tables, by reason."""


@dataclass(frozen=True)
class GroupSummary:
    """Agreement of a group of comparisons: shares and relative errors."""

    kind: str
    engine: str
    gpu: str  # "": all
    split: str
    rows: int
    median: float  # absolute error
    bias: float  # median error
    coverage: float
    half_width: float  # median


def end_to_end() -> dict[str, list[Comparison]]:
    """Return every comparison by kind (:data:`KINDS`)."""
    given = [c for c in compare_speedups(given=True) if "projections" not in c.where]
    return {"dense": compare_dense(), "speedup": compare_speedups(), "given": given, "serve": compare_serving()}


def summaries(comparisons: Mapping[str, Sequence[Comparison]], by_gpu: bool = True) -> list[GroupSummary]:
    """Return one line per kind, engine, split and GPU (or for all GPUs), without rows in custom modelling code."""
    groups: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for kind, rows in comparisons.items():
        for c in rows:
            if not c.own_code:
                groups.setdefault((kind, c.engine, c.split, c.gpu if by_gpu else ""), []).append(c)
    return [summary(rows, kind, engine, gpu, split) for (kind, engine, split, gpu), rows in groups.items()]


def summary(
    rows: Sequence[Comparison], kind: str = "", engine: str = "", gpu: str = "", split: str = ""
) -> GroupSummary:
    """Return the line of some comparisons."""
    return GroupSummary(
        kind=kind,
        engine=engine,
        gpu=gpu,
        split=split,
        rows=len(rows),
        median=median_error(rows),
        bias=median(c.error for c in rows),
        coverage=float(np.mean([c.inside for c in rows])),
        half_width=median(c.half_width for c in rows),
    )


def of_end_to_end(comparisons: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """Return the errors and coverage of the published times and speedups that nothing was fitted on, and the engine and
    GPU with the largest error."""
    judged = {k: [c for c in rows if c.split == "judge" and not c.own_code] for k, rows in comparisons.items()}
    parts = []
    for kind, name in (("dense", "times of dense models"), ("speedup", "speedups of pruned models")):
        s = summary(judged[kind])
        parts.append(f"{name}: median error {percent(s.median)}, {percent(s.coverage)} of {s.rows} in their interval")
    lines = [s for s in summaries({"dense": judged["dense"], "speedup": judged["speedup"]}) if s.rows > 1]
    worst = max(lines, key=lambda s: s.median)
    return [
        f"On published rows that no parameter was fitted to, {'; '.join(parts)}.",
        f"Worst, of groups of several rows: {worst.engine} on {worst.gpu} with {percent(worst.median)} "
        f"({KINDS[worst.kind]}).",
    ]


def tables() -> list[str]:
    """Return the tables of ``docs/generated/engines.md`` in their order."""
    all_rows, sparse, narrow = end_to_end(), compare_gemms("2:4"), compare_gemms("narrower")
    evaluated = {kind: [c for c in rows if c.split == "judge"] for kind, rows in all_rows.items()}
    common = {kind: [c for c in rows if not c.own_code] for kind, rows in all_rows.items()}
    large = [c for c in (*common["dense"], *common["speedup"], *sparse, *narrow) if abs(c.error) > MISS]
    assumed = dict.fromkeys((c.source, c.assumed) for kind in ("dense", "speedup") for c in all_rows[kind] if c.assumed)
    reasons = [row["left_out"] for name in ("dense", "speedups", "serving") for row in published(name)]
    excluded = {**Counter(filter(None, reasons)), **NOT_USED}
    overall = [summary([c for c in rows if not c.own_code], kind) for kind, rows in evaluated.items() if rows]
    measured = [c for c in evaluated["dense"] if load_hardware(c.gpu).section("gemm", "bf16").status != "default"]
    overall.append(summary(measured, "measured"))
    held_out = held_out_models()
    by_engine = summaries({k: v for k, v in all_rows.items() if k != "serve"}, by_gpu=False)
    return [
        _summary_table(overall, ("kind",)),
        _summary_table(by_engine, ("kind", "engine", "split")),
        loads_table(),
        _held_out_table(held_out),
        _load_table(held_out),
        _summary_table(summaries({"serve": all_rows["serve"]}), ("engine", "gpu")),
        _figure_2(),
        _comparison_table(all_rows["dense"], _seconds),
        _comparison_table(common["speedup"]),
        _comparison_table(common["given"]),
        _comparison_table([c for c in evaluated["given"] if c.own_code]),
        _comparison_table(sparse),
        _comparison_table(narrow),
        table(["what", "where", "error", "likely reason"], [_large_error(c) for c in large], left=(0, 1, 3)),
        table(["source", "assumed"], list(assumed), left=(0, 1)),
        table(["rows", "why"], [[str(n), why] for why, n in excluded.items()], left=(1,)),
    ]


def _summary_table(lines: Iterable[GroupSummary], names: Sequence[str]) -> str:
    order = list(KINDS)
    lines = sorted(lines, key=lambda x: [order.index(x.kind), *(getattr(x, name) for name in names)])
    header = [*names, "rows", "median error", "bias", "coverage", "half-width"]
    cells = [
        [
            *(KINDS.get(getattr(line, name), getattr(line, name)) for name in names),
            str(line.rows),
            f"{100 * line.median:.1f} %",
            f"{100 * line.bias:+.1f} %",
            f"{100 * line.coverage:.0f} %",
            f"{100 * line.half_width:.0f} %",
        ]
        for line in lines
    ]
    return table(header, cells, left=range(len(names)))


def loads_table() -> str:
    """Return which features of a checkpoint each stock engine loads; the benchmark's engine is no server."""
    engines = [engine for engine in map(load_engine, list_engines()) if engine.name != "reference"]

    def cell(found: Loading) -> str:
        types = ", ".join(found.model_types) if len(found.model_types) <= 3 else f"{len(found.model_types)} model types"
        multiple = f"multiples of {found.multiple}" if found.multiple > 1 else ""
        return "; ".join(filter(None, (types, multiple))) or "yes" if found.value else "no"

    cells = [[text, *(cell(engine.loads[name]) for engine in engines)] for name, text in FEATURES.items()]
    return table(["checkpoint with", *(engine.name for engine in engines)], cells, left=range(len(engines) + 1))


def _held_out_table(groups: Sequence[HeldOut]) -> str:
    header = ["engine", "held-out model", "GPU", "format", "rows"]
    header += ["TPOT: median error", "bias", "request: median error"]
    cells = []
    for engine in dict.fromkeys(x.engine for x in groups):
        members = [x for x in groups if x.engine == engine]
        for x in members:
            errors = f"{100 * x.tpot_error:.1f} %", f"{100 * x.tpot_bias:+.1f} %", f"{100 * x.request_error:.1f} %"
            cells.append([engine, x.model, x.hardware, x.dtype, str(len(x.log_ratio)), *errors])
        cells.append(
            [engine, "all dense models", "", "", *_errors([x.log_ratio for x in members if not x.experts]), ""]
        )
    return table(header, cells, left=range(4))


def _errors(log_ratios: Sequence[FloatArray]) -> tuple[str, str, str]:
    """Return rows, median absolute error and bias of logs of ratios."""
    error = np.expm1(np.concatenate(log_ratios))
    return str(len(error)), f"{100 * np.median(np.abs(error)):.1f} %", f"{100 * np.median(error):+.1f} %"


PROMPTS: Mapping[str, tuple[float, float]] = {
    "128": (0, 200), "256": (200, 400), "512": (400, 600), "1,000 to 1,024": (600, 1500),
    "2,000 to 2,048": (1500, 3000), "4,000 to 4,096": (3000, 6000), "8,000 to 8,192": (6000, np.inf),
}  # fmt: skip
"""Prompt lengths of the serving runs -> ends of the range."""

LOADS: Mapping[str, tuple[float, float]] = {
    "below 0.03": (0, 0.03), "0.03 to 0.1": (0.03, 0.1), "0.1 to 0.3": (0.1, 0.3), "0.3 to 0.75": (0.3, 0.75),
    "0.75 to 1.5": (0.75, 1.5), "above 1.5": (1.5, np.inf),
}  # fmt: skip
"""Concurrency per new token: prompts that arrive with a decode step -> ends of the range."""


def _load_table(groups: Sequence[HeldOut]) -> str:
    """Return the errors of the time per token by prompt length and by prompts per decode step."""
    cells = []
    for engine, experts in dict.fromkeys((x.engine, x.experts) for x in groups):
        members = [x for x in groups if (x.engine, x.experts) == (engine, experts)]
        for axis, ranges in (("prompt tokens", PROMPTS), ("concurrency / new tokens", LOADS)):
            for name, (low, high) in ranges.items():
                values = [
                    x.group.seq if ranges is PROMPTS else x.group.concurrency / x.group.new_tokens for x in members
                ]
                some = [x.log_ratio[(v >= low) & (v < high)] for x, v in zip(members, values, strict=True)]
                if sum(map(len, some)):
                    cells.append([engine, "experts" if experts else "dense", axis, name, *_errors(some)])
    return table(["engine", "models", "group", "range", "rows", "median error", "bias"], cells, left=range(4))


def _figure_2() -> str:
    cells = [[p.phase, p.part, _seconds(p.measured_s), _seconds(p.predicted_s), _percent(p.error)] for p in figure_2()]
    return table(["phase", "part", "measured", "predicted", "error"], cells, left=(0, 1))


def _large_error(c: Comparison) -> list[str]:
    return [c.what, c.where, _percent(c.error), c.reason or "not known"]


def _percent(value: float) -> str:
    return f"{100 * value:+.0f} %"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _comparison_table(rows: Iterable[Comparison], text: Callable[[float], str] = _times) -> str:
    cells = []
    for c in rows:
        interval = f"{text(c.lower)} to {text(c.upper)}"
        numbers = (text(c.measured), text(c.predicted), interval, f"{100 * c.error:+.1f} %")
        cells.append([c.engine or "GEMMs", c.what, c.where, *numbers, c.source])
    header = ["engine", "what", "where", "measured", "predicted", "interval", "error", "source"]
    return table(header, cells, left=(0, 1, 2, 7))


def scatter(comparisons: Mapping[str, Sequence[Comparison]]) -> Figure:
    """Draw predicted against measured dense times and times per token, one panel per engine."""
    from simulator.figures.measured import Cloud, scatter_figure
    from simulator.figures.style import engine_title

    rows = [*comparisons["dense"], *comparisons["serve"]]
    clouds = []
    for engine in sorted({c.engine for c in rows}):
        points = [c for c in rows if c.engine == engine]
        clouds.append(
            Cloud(engine_title(engine), [c.measured for c in points], [c.predicted for c in points], what="times")
        )
    return scatter_figure(clouds)
