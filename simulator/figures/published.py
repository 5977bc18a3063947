"""Draw published or measured speedups next to predicted speedups with their intervals, one panel per setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from simulator.figures.layout import in_a_row, laid_out, legend_below, panel_list
from simulator.figures.style import BLACK, INK, PALE_INK, label, paper_style, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Beside:
    """Speedups of one setting, one row per family."""

    title: str
    family: Sequence[str]
    published: ArrayLike
    predicted: ArrayLike
    lower: ArrayLike
    upper: ArrayLike


def published_figure(panels: Sequence[Beside], *, observed: str = "published") -> Figure:
    """Draw predicted speedups as marks on their intervals, published or measured ones (``observed``) as bars across.

    NaN leaves a row empty.
    """
    from matplotlib.lines import Line2D

    with paper_style():
        columns, names = in_a_row(len(panels)), panels[0].family
        height = 0.15 * len(names) * max((name.count("\n") + 1 for name in names), default=1)
        figure, axes, _ = panel_list(len(panels), max(1.15, height), 0.45, columns)
        handles = [
            Line2D([], [], color=INK, marker="o", markersize=4.5, linewidth=1.6, label="predicted, with its interval"),
            Line2D([], [], color=BLACK, marker="|", linestyle="none", markersize=6, label=observed),
        ]
        for i, (ax, p) in enumerate(zip(axes, panels)):
            published, predicted, lower, upper = (
                np.asarray(v, dtype=float) for v in (p.published, p.predicted, p.lower, p.upper)
            )
            rows = np.arange(len(p.family))[::-1]
            ax.axvline(1.0, color=PALE_INK, linewidth=0.6, zorder=0)
            for y, name, value, low, high in zip(rows, p.family, predicted, lower, upper):
                style = style_of(name)
                ax.plot([low, high], [y, y], color=style.color, linewidth=1.6, solid_capstyle="butt", alpha=0.6)
                ax.plot([value], [y], **style.marks(linestyle="none", markersize=4.5))
            ax.vlines(published, rows - 0.34, rows + 0.34, color=BLACK, linewidth=1.0, zorder=5)
            ax.set_yticks(rows, [label(name) for name in p.family] if i % columns == 0 else [""] * len(rows))
            ax.set(ylim=(-0.7, len(rows) - 0.3), title=p.title)
        legend_below(figure, handles, 1, "speedup")
        return laid_out(figure)
