"""Predicted against published: speedups, dense latencies and GEMM ratios that papers and projects measured, where
conditions are known.

Use :func:`compare_speedups`, :func:`compare_dense` and :func:`compare_gemms` for the numbers; ``docs/published.md``
holds the :func:`tables`. The measured values ship as ``calibration/measurements/published_*.csv``, each row with its
source and with what had to be assumed; :data:`NOT_USED` counts what was left out, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from calibration.judge.report import table
from calibration.measurements import published
from simulator.hardware.library import load_hardware
from simulator.kernels.gemm import gemm_time
from simulator.kernels.spread import ratio_half
from simulator.kernels.stream import cost
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.predict.quality import parse_options
from simulator.predict.speedup import speedups
from simulator.pruning import prune
from simulator.workload import Kernel, Workload

NOT_USED: Mapping[str, int] = {
    "GPU or batch not stated (LLM-Pruner, ShortGPT, FP8 2:4 in vLLM)": 11,
    "share of the attention computed not stated (MInference, A-Shape, InfLLM)": 51,
    "another batch for the pruned model, so no ratio at equal conditions (SliceGPT Table 11)": 2,
    "GPU without a profile (Quadro RTX 6000, RTX 5090 kernels)": 27,
    "not a language model (SAM)": 2,
}
"""Rows of published end-to-end speedups that are not compared, by reason."""

MISS = 0.10
"""A relative error beyond this is a miss, and its likely reason is printed."""


@dataclass(frozen=True)
class Comparison:
    """One published value, a ratio of times or seconds, beside the prediction of it."""

    what: str  # method, model and fraction
    where: str  # GPU, phase, batch, length and runtime
    measured: float
    predicted: float
    lower: float
    upper: float
    source: str
    assumed: str = ""  # what the source leaves open
    reason: str = ""  # the likely one of a miss

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool:
        """Whether the measured value lies in the predicted interval."""
        return self.lower <= self.measured <= self.upper


def median_error(rows: Sequence[Comparison]) -> float:
    """Median absolute relative error."""
    return round(median(abs(r.error) for r in rows), 12)


def compare_speedups() -> list[Comparison]:
    """Published speedups of pruned models, predicted under the same conditions."""
    return [_speedup(row) for row in published("speedups")]


def _speedup(row: Mapping[str, str]) -> Comparison:
    hw, config = load_hardware(row["hardware"]), load_model(row["model"])
    call: dict[str, Any] = {name: int(row[name] or 0) for name in ("batch", "seq", "new_tokens")}
    dense = lower(config, phase=row["phase"], weight_dtype=row["weight_dtype"] or None, **call)
    fraction, first = float(row["sparsity"]), row["first_layer"]
    asked = [fraction if i >= int(first) else 0.0 for i in range(config.layers)] if first else fraction
    pruned = prune(dense, row["family"], asked, **dict(parse_options(row["options"], row["family"])))
    scope = row["phase"]
    if row["scope"] == "projections":
        dense, pruned, scope = _projections(dense), _projections(pruned), "projections of a layer"
    (found,) = speedups(dense, [pruned], hw, row["runtime"])
    before, after = float(row["dense"]), float(row["pruned"])
    ratio = after / before if row["unit"].startswith("tokens") else before / after
    what = f"{row['method']}, {row['model']}, {100 * fraction:.3g} %{f' from layer {first}' if first else ''}"
    where = f"{row['gpu']}, {scope}, batch {row['batch']}, seq {row['new_tokens'] or row['seq']}, {row['runtime']}"
    notes = (row[name] for name in ("source", "assumed", "reason"))
    return Comparison(what, where, ratio, found.speedup, found.lower, found.upper, *notes)


def _projections(w: Workload) -> Workload:
    """Only the projections of the layers, without what pruning adds."""
    return w.take(w.is_role("q", "k", "v", "o", "gate", "up", "down") & (w.layer >= 0) & ~w.overhead)


def compare_dense() -> list[Comparison]:
    """Published times of dense models, predicted: what a wrong speedup cannot be blamed on."""
    out = []
    for row in published("dense_latency"):
        w = lower(load_model(row["model"]), phase=row["phase"], batch=int(row["batch"]), seq=int(row["seq"]))
        # FlashAttention-2 is what the vLLM tables ran
        stack = "vllm" if "FlashAttention-2" in row["framework"] else ""
        found = cost(w, load_hardware(row["hardware"], stack), row["runtime"])
        low, high = found.total_lower_s, found.total_upper_s
        what = f"{row['model']}, {row['framework']}"
        where = f"{row['gpu']}, {row['phase']}, batch {row['batch']}, seq {row['seq']}, {row['runtime']}"
        measured = float(row["seconds"])
        out.append(Comparison(what, where, measured, found.total_s, low, high, row["source"], row["assumed"]))
    return out


def compare_gemms(what: str = "2:4") -> list[Comparison]:
    """Published ratios of a dense GEMM's time to that of its "2:4" or its "narrower" version, predicted."""
    return [_gemm_ratio(row) for row in published("gemm_ratios") if row["what"] == what]


def _gemm_ratio(row: Mapping[str, str]) -> Comparison:
    hw = load_hardware(row["hardware"])
    m, n, k, few_n, few_k = (np.array([int(row[name])]) for name in ("m", "n", "k", "pruned_n", "pruned_k"))
    kernel, density = (Kernel.SPARSE24, 0.5) if row["what"] == "2:4" else (Kernel.DENSE, 1.0)
    # these benchmarks time one GEMM again and again, so its weights may stay in the L2 cache
    common: dict[str, Any] = {"dtype": row["dtype"], "cold": False, "doubt": True}
    dense = gemm_time(m, n, k, hw, **common)
    pruned = gemm_time(m, few_n, few_k, hw, kernel=np.array([kernel]), density=density, **common)
    ratio = float(dense.seconds[0] / pruned.seconds[0])
    assert dense.doubt is not None
    assert pruned.doubt is not None
    spread = float(np.exp(ratio_half(dense.doubt, pruned.doubt))[0])
    shape = f"{row['m']}x{row['n']}x{row['k']}"
    if row["what"] != "2:4":
        shape += f" to {row['m']}x{row['pruned_n']}x{row['pruned_k']}"
    if row["gemms"] != "1":
        shape += f", {row['gemms']} GEMMs"
    measured = float(row["dense_us"]) / float(row["pruned_us"])
    where = f"{row['gpu']}, {row['dtype']}"
    bounds = (ratio / spread, ratio * spread)
    return Comparison(shape, where, measured, ratio, *bounds, row["source"], reason=row["reason"])


def tables() -> list[str]:
    """Tables of ``docs/published.md``: profiles, median errors, every comparison, misses, what the sources leave
    open."""
    speed, dense = compare_speedups(), compare_dense()
    sparse, narrow = compare_gemms("2:4"), compare_gemms("narrower")
    names = ("speedups of pruned models", "times of dense models", "2:4 GEMMs, ratio", "narrower GEMMs, ratio")
    counts = [
        [name, str(len(rows)), f"{100 * median_error(rows):.1f} %", f"{sum(r.inside for r in rows)} of {len(rows)}"]
        for name, rows in zip(names, (speed, dense, sparse, narrow), strict=True)
    ]
    ratios = (*speed, *sparse, *narrow)
    misses = [[c.what, c.where, f"{100 * c.error:+.0f} %", c.reason] for c in ratios if abs(c.error) > MISS]
    assumed = dict.fromkeys((c.source, c.assumed) for c in (*speed, *dense) if c.assumed)
    hardware = {r["hardware"] for name in ("speedups", "dense_latency", "gemm_ratios") for r in published(name)}
    operators = ("gemm", "attention_prefill", "attention_decode", "elementwise")
    states = [[name, *(load_hardware(name).section(o, "bf16").status for o in operators)] for name in sorted(hardware)]
    return [
        table(["profile", *operators], states, left=range(5)),
        table(["what", "rows", "median absolute error", "inside the 90 % interval"], counts),
        _compared(speed),
        _compared(dense, _seconds),
        _compared(sparse),
        _compared(narrow),
        table(["what", "where", "error", "likely reason"], misses, left=(0, 1, 3)),
        table(["source", "assumed"], list(assumed), left=(0, 1)),
        table(["rows", "why"], [[str(count), why] for why, count in NOT_USED.items()], left=(1,)),
    ]


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _compared(rows: Iterable[Comparison], text: Callable[[float], str] = _times) -> str:
    cells = []
    for c in rows:
        interval = f"{text(c.lower)} to {text(c.upper)}"
        numbers = (text(c.measured), text(c.predicted), interval, f"{100 * c.error:+.1f} %")
        cells.append([c.what, c.where, *numbers, c.source])
    header = ["what", "where", "measured", "predicted", "interval", "error", "source"]
    return table(header, cells, left=(0, 1, 6))
