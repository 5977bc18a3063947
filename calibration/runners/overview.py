"""Draw ``docs/measured.png``, the first picture of the README: ``python -m calibration.runners.overview``.

It shows all measurements of whole models that ship, published or executed here, next to their predictions.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from calibration.evidence.paper import table_2
from calibration.evidence.published import compare_dense, compare_serving, compare_speedups
from calibration.runners.recorded import recorded_rows
from simulator.figures.layout import fixed_ticks
from simulator.figures.measured import time_text
from simulator.figures.style import COLORS, paper_style, save_figure

DOCS = Path(__file__).resolve().parents[2] / "docs"
Groups = Mapping[str, list[tuple[float, float]]]  # measured and predicted values by legend entry


def speedups() -> Groups:
    """Return speedups of pruned models."""
    published = compare_speedups()
    files = [DOCS / "cpu" / "comparison.csv", DOCS / "cpu" / "plans.csv"]
    decoders = [row for file in files for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())]
    return {
        "executed, Transformers": [(r.compared.measured, r.compared.predicted) for r in recorded_rows()],
        "executed, our decoder and plans": [(float(r["measured"]), float(r["predicted"])) for r in decoders],
        "published, taxonomy paper": [(c.published, c.predicted) for c in table_2()],
        "published, other": [(c.measured, c.predicted) for c in published if not c.own_code],
        "published, custom code": [(c.measured, c.predicted) for c in published if c.own_code],
    }


def overview() -> Figure:
    """Return predicted against measured values: speedups, times of dense models, and times per token of servers."""
    names = {"hf": "Transformers", "compile": "torch.compile", "vllm": "vLLM", "sglang": "SGLang"}
    names |= {"trtllm": "TensorRT-LLM", "reference": "taxonomy paper's bench"}
    panels = {"speedups of pruned models": ("speedup", speedups())}
    dense = ("times of dense models", "time of a pass or request", compare_dense())
    for what, label, times in (dense, ("runs of servers", "time per output token", compare_serving())):
        engines = {names[key]: [(c.measured, c.predicted) for c in times if c.engine == key] for key in names}
        panels[what] = label, {name: found for name, found in engines.items() if found}
    with paper_style():
        figure = Figure(figsize=(7.2, 3.4), layout="constrained", dpi=200)
        for ax, (what, (label, groups)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            every = np.concatenate([np.array(rows) for rows in groups.values()])
            ends = np.array([every.min() / 1.15, every.max() * 1.15])
            ax.fill_between(ends, ends / 1.1, ends * 1.1, color="0.85", linewidth=0, label="within 10 %")
            ax.plot(ends, ends, color="black", linewidth=0.6)
            for color, (name, rows) in zip(COLORS, groups.items(), strict=False):
                ax.plot(*np.array(rows).T, "o", color=color, markersize=2.2, alpha=0.6, markeredgewidth=0, label=name)
            error = 100 * np.median(np.abs(every[:, 1] / every[:, 0] - 1))
            ax.set_title(f"{len(every):,} {what}\nmedian error {error:.1f} %")
            ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"measured {label}", ylabel="predicted")
            ax.set_box_aspect(1)
            for axis in (ax.xaxis, ax.yaxis):
                if label == "speedup":
                    fixed_ticks(axis, [0.7, 1, 1.5, 2, 3], lambda value, _: f"{value:g}x")
                else:
                    ticks = [10.0**e for e in range(-3, 3) if ends[0] < 10.0**e < ends[1]]
                    fixed_ticks(axis, ticks, lambda seconds, _: time_text(1e6 * seconds))
            ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), fontsize=6, markerscale=1.5, frameon=False)
    return figure


if __name__ == "__main__":
    save_figure(overview(), DOCS / "measured.png")
