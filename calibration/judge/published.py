"""Predicted against published: speedups, dense latencies and GEMM ratios that papers and projects measured, where conditions are known.

Use :func:`compare_speedups`, :func:`compare_dense` and :func:`compare_gemms` for the numbers, :func:`published_table` (or
``python -m calibration.judge.published``) for the Markdown of the documentation. The measured values ship in ``calibration/judge/published_tables/*.csv``,
each row with its source and with what had to be assumed; :data:`NOT_USED` counts what was left out, and why.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from simulator.hardware.library import load_hardware
from simulator.kernels.gemm import gemm_time
from simulator.kernels.stream import cost
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.predict.quality import parse_options
from simulator.predict.speedup import speedups
from simulator.pruning import prune
from simulator.workload import Kernel, Workload

FOLDER = Path(__file__).with_name("published_tables")

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
    """One published value beside the prediction of it.

    Attributes
    ----------
    what, where : str
        Method, model and fraction; GPU, phase, batch, length and runtime.
    measured, predicted, lower, upper : float
        A ratio of times, or seconds.
    source, assumed, reason : str
        Where the value is from, what the source leaves open, the likely reason of a miss.
    calibrated : bool
        Whether the profile was fitted on the device's own measurements.
    """

    what: str
    where: str
    measured: float
    predicted: float
    lower: float
    upper: float
    source: str
    assumed: str
    reason: str
    calibrated: bool = False

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool:
        """Whether the measured value lies in the predicted interval."""
        return self.lower <= self.measured <= self.upper


def median_error(rows: Sequence[Comparison]) -> float:
    """Median absolute relative error.

    >>> median_error([Comparison("", "", 1.0, 1.1, 1, 2, "", "", ""), Comparison("", "", 2.0, 2.0, 1, 2, "", "", "")])
    0.05
    """
    return round(median(abs(r.error) for r in rows), 12)


def read(name: str) -> list[dict[str, str]]:
    """Rows of a shipped file.

    >>> len(read("speedups")) > 10
    True
    """
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- speedups of models ------------------------------------------------------------------------------------------------------------


def compare_speedups() -> list[Comparison]:
    """Published speedups of pruned models, predicted under the same conditions.

    Examples
    --------
    >>> all(c.predicted > 0.8 for c in compare_speedups())
    True
    """
    return [_speedup(row) for row in read("speedups")]


def _speedup(row: Mapping[str, str]) -> Comparison:
    hw, config = load_hardware(row["hardware"]), load_model(row["model"])
    batch, seq, fraction = int(row["batch"]), int(row["seq"]), float(row["sparsity"])
    dense = lower(
        config,
        phase=row["phase"],
        batch=batch,
        seq=seq,
        new_tokens=int(row["new_tokens"] or 0),
        weight_dtype=row["weight_dtype"] or None,
    )
    asked: Any = fraction
    if row["first_layer"]:
        asked = [fraction if i >= int(row["first_layer"]) else 0.0 for i in range(config.layers)]
    pruned = prune(dense, row["family"], asked, **dict(parse_options(row["options"], row["family"])))
    if row["scope"] == "projections":
        dense, pruned = _projections(dense), _projections(pruned)
    (found,) = speedups(dense, [pruned], hw, row["runtime"])
    values = float(row["dense"]), float(row["pruned"])
    measured = values[1] / values[0] if row["unit"].startswith("tokens") else values[0] / values[1]
    scope = "projections of a layer" if row["scope"] == "projections" else row["phase"]
    layers = f" from layer {row['first_layer']}" if row["first_layer"] else ""
    return Comparison(
        f"{row['method']}, {row['model']}, {100 * fraction:.3g} %{layers}",
        f"{row['gpu']}, {scope}, batch {batch}, seq {row['new_tokens'] or seq}, {row['runtime']}",
        measured,
        found.speedup,
        found.lower,
        found.upper,
        row["source"],
        row["assumed"],
        row["reason"],
        found.calibrated,
    )


def _projections(w: Workload) -> Workload:
    """Only the projections of the layers, without what pruning adds."""
    return w.take(w.is_role("q", "k", "v", "o", "gate", "up", "down") & (w.layer >= 0) & ~w.overhead)


# -- dense latencies ---------------------------------------------------------------------------------------------------------------


def compare_dense() -> list[Comparison]:
    """Published times of dense models, predicted: what a wrong speedup cannot be blamed on."""
    out = []
    for row in read("dense_latency"):
        hw = load_hardware(row["hardware"])
        w = lower(load_model(row["model"]), phase=row["phase"], batch=int(row["batch"]), seq=int(row["seq"]))
        found = cost(w, hw, row["runtime"])
        share = [float(side @ w.count) / found.device_s for side in (found.lower, found.upper)]
        out.append(
            Comparison(
                f"{row['model']}, {row['framework']}",
                f"{row['gpu']}, {row['phase']}, batch {row['batch']}, seq {row['seq']}, {row['runtime']}",
                float(row["seconds"]),
                found.total_s,
                found.total_s * share[0],
                found.total_s * share[1],
                row["source"],
                row["assumed"],
                "",
            )
        )
    return out


# -- GEMMs -------------------------------------------------------------------------------------------------------------------------


def compare_gemms(what: str = "2:4") -> list[Comparison]:
    """Published ratios of a dense GEMM's time to that of its 2:4 or its narrower version, predicted.

    Parameters
    ----------
    what : {"2:4", "narrower"}

    Returns
    -------
    list of Comparison

    Examples
    --------
    >>> len(compare_gemms("narrower"))
    8
    """
    out = []
    for row in read("gemm_ratios"):
        if row["what"] != what:
            continue
        hw = load_hardware(row["hardware"])
        m, n, k, few_n, few_k = (int(row[c]) for c in ("m", "n", "k", "pruned_n", "pruned_k"))
        sparse = what == "2:4"
        kernel, density = (Kernel.SPARSE24, 0.5) if sparse else (Kernel.DENSE, 1.0)
        # these benchmarks time one GEMM again and again, so its weights may stay in the L2 cache
        dense = gemm_time(np.array([m]), np.array([n]), np.array([k]), hw, dtype=row["dtype"], cold=False)
        narrow, kernels = (np.array([m]), np.array([few_n]), np.array([few_k])), np.array([kernel])
        pruned = gemm_time(*narrow, hw, dtype=row["dtype"], kernel=kernels, density=density, cold=False)
        ratio = float(dense.seconds[0] / pruned.seconds[0])
        # halves of the intervals: errors of a GEMM and of its pruned neighbour are half correlated
        spread = float(np.sqrt(pruned.upper[0] / pruned.lower[0]))
        shape = (
            f"{m}x{n}x{k}"
            + ("" if sparse else f" to {m}x{few_n}x{few_k}")
            + (f", {row['gemms']} GEMMs" if row["gemms"] != "1" else "")
        )
        out.append(
            Comparison(
                shape,
                f"{row['gpu']}, {row['dtype']}",
                float(row["dense_us"]) / float(row["pruned_us"]),
                ratio,
                ratio / spread,
                ratio * spread,
                row["source"],
                "",
                row["reason"],
            )
        )
    return out


# -- Markdown ----------------------------------------------------------------------------------------------------------------------


def published_table() -> str:
    """Markdown of every comparison with the median errors, the misses and their likely reasons, and what was left out."""
    speed, dense = compare_speedups(), compare_dense()
    sparse, narrow = compare_gemms("2:4"), compare_gemms("narrower")
    parts = [
        "# Predicted against published\n",
        f"Written by `python -m calibration.judge.published`. Profiles, part by part: {'; '.join(_states())}.\n",
        "Intervals are those of the software stack that a profile was fitted on. These rows are from other stacks, where the same GPU's",
        "times differ by 5 to 15 %, and many of them from eager frameworks: fewer than 90 % of them can lie inside.\n",
        "| what | rows | median absolute error | inside the 90 % interval |\n| --- | ---: | ---: | ---: |",
        _summary("speedups of pruned models", speed),
        _summary("times of dense models", dense),
        _summary("2:4 GEMMs, ratio", sparse),
        _summary("narrower GEMMs, ratio", narrow),
        "\n## Speedups of pruned models\n",
        _rows(speed, lambda v: f"{v:.2f}x"),
        "\n## Times of dense models\n",
        _rows(dense, _seconds),
        "\n## 2:4 against dense GEMMs\n",
        "One efficiency for each GPU architecture was fitted to published 2:4 ratios, these among them: no test on unseen data.\n",
        _rows(sparse, lambda v: f"{v:.2f}x"),
        "\n## Narrower against dense GEMMs\n",
        _rows(narrow, lambda v: f"{v:.2f}x"),
        "\n## Misses (over 10 %) and their likely reason\n",
        *_misses([*speed, *sparse, *narrow]),
        "\n## What the sources leave open\n",
        *(f"- {line}" for line in _assumed([*speed, *dense])),
        "\n## Not compared\n",
        *(f"- {count} rows: {why}" for why, count in NOT_USED.items()),
    ]
    return "\n".join(parts) + "\n"


def _states() -> list[str]:
    """What is calibrated, borrowed or default in the profiles that the rows use, and where it is from."""
    out = []
    for name in sorted({r["hardware"] for file in ("speedups", "dense_latency", "gemm_ratios") for r in read(file)}):
        hw = load_hardware(name)
        operators = ("gemm", "attention_prefill", "attention_decode", "elementwise")
        parts = [f"{operator} {hw.section(operator, 'bf16').status}" for operator in operators]
        out.append(f"{name}: {', '.join(parts)}")
    return out


def _summary(name: str, rows: Sequence[Comparison]) -> str:
    return f"| {name} | {len(rows)} | {100 * median_error(rows):.1f} % | {sum(r.inside for r in rows)} of {len(rows)} |"


def _rows(rows: Iterable[Comparison], text: Callable[[float], str]) -> str:
    lines = [
        "| what | where | measured | predicted | interval | error | source |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for c in rows:
        interval = f"{text(c.lower)} to {text(c.upper)}"
        cells = (c.what, c.where, text(c.measured), text(c.predicted), interval, f"{100 * c.error:+.1f} %", c.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _assumed(rows: Iterable[Comparison]) -> list[str]:
    return list(dict.fromkeys(f"{c.source}: {c.assumed}" for c in rows if c.assumed))


def _misses(rows: Iterable[Comparison]) -> list[str]:
    lines = [
        f"- {c.what} ({c.where}): {100 * c.error:+.0f} %: {c.reason or 'no reason known'}"
        for c in rows
        if abs(c.error) > MISS
    ]
    return lines or ["- none"]


if __name__ == "__main__":
    sys.stdout.write(published_table())
