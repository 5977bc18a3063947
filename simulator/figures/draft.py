"""Draw speculative decoding: the speedup by batch at some acceptances, and the acceptance from
which a draft pays."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from simulator.figures import layout
from simulator.figures.style import (
    GREY,
    INK,
    PAGE_IN,
    device_title,
    engine_title,
    paper_style,
    style_of,
)
from simulator.models.library import model_title
from simulator.prediction.draft import Draft, Drafts


def draft_figure(found: Drafts) -> Figure:
    batches = sorted({row.batch for row in found})
    with paper_style():
        figure = Figure(figsize=(PAGE_IN, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, share in enumerate(sorted({row.acceptance for row in found}, reverse=True)):
            rows = sorted((r for r in found.best() if r.acceptance == share), key=lambda r: r.batch)
            style = style_of("", i)
            y = [r.speedup for r in rows]
            left.plot(
                batches, y, label=f"{100 * share:.3g} % accepted", **style.marks(markersize=3)
            )
            left.fill_between(
                batches,
                [r.speedup_lower for r in rows],
                [r.speedup_upper for r in rows],
                color=style.color,
                alpha=0.12,
            )
            for r in rows:
                left.annotate(
                    str(r.drafted),
                    (r.batch, r.speedup),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=5,
                )
        left.axhline(1.0, color=INK, linewidth=0.7)
        left.legend(fontsize=6, frameon=False)
        left.set_ylabel("speedup over plain decoding")
        left.set_title("speedup with the best number drafted (shown)", loc="left")
        pays = [_pays(found, batch) for batch in batches]
        values = np.array(
            [[_or(p, f"pays_from{end}") for p in pays] for end in ("", "_lower", "_upper")]
        )
        right.plot(batches, values[0], **style_of("", 0).marks(markersize=3))
        right.fill_between(batches, values[1], values[2], color=style_of("", 0).color, alpha=0.15)
        right.set_ylim(0.0, 1.0)
        right.set_title("acceptance from which the draft pays", loc="left")
        for ax in (left, right):
            ax.set_xscale("log", base=2)
            layout.fixed_ticks(ax.xaxis, batches, lambda value, _: f"{value:.0f}")
            ax.set_xlabel("batch")
            ax.grid(color=GREY, alpha=0.2)
        many = f"{found.devices} x " if found.devices > 1 else ""
        where = (
            f"{many}{device_title(found.hardware)}, {engine_title(found.engine)}, seq {found.seq}"
        )
        figure.suptitle(
            f"{model_title(found.draft)} as a draft for {model_title(found.target)}: {where}",
            fontsize=7,
        )
        return layout.laid_out(figure)


def _pays(found: Drafts, batch: int) -> Draft:
    """Return the row of a batch that pays from the lowest acceptance; where none pays, any row."""
    rows = [row for row in found.rows if row.batch == batch]
    return min(rows, key=lambda row: 2.0 if row.pays_from is None else row.pays_from)


def _or(row: Draft, name: str) -> Any:
    found = getattr(row, name)
    return (0.0 if name.endswith("lower") else 1.0) if found is None else found
