"""Draw maps of the fastest family over batch and sequence, with its colour, marker and speedup in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.figures import layout
from simulator.figures.style import BLACK, BLUE, GREY, PAGE_IN, in_order, label, paper_style, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_GAIN, UNCERTAIN, TOO_LARGE = "no speedup", "pale: winner uncertain", "blank: dense model exceeds memory"
"""Labels of legends."""

CERTAIN, PALE = 0.42, 0.14
"""Opacity of a cell whose winner is certain, and of a cell whose winner is not."""

_CELL_IN = 0.24
_SQUARE = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]


def crossover_figure(
    row: Sequence[str],
    column: Sequence[str],
    batch: ArrayLike,
    seq: ArrayLike,
    winner: Sequence[str],
    speedup: ArrayLike,
    certain: ArrayLike,
    fits: ArrayLike,
) -> Figure:
    """Draw the winners.

    One entry per cell: labels of the phase and the device (panels, in the order of their first occurrence), batch,
    tokens, the fastest family (empty if none is faster than the dense model) and its speedup, whether it is certain to
    be the fastest (else the cell is pale), and whether the dense model fits the device's memory (else the cell is
    blank). InputError if there are no cells or the arrays differ in length.
    """
    numbers = {"batch": batch, "seq": seq, "speedup": speedup, "certain": certain, "fits": fits}
    data = layout.columns_of("cells of the map", {"row": row, "column": column, "winner": winner}, numbers)
    batches, lengths = (sorted({int(v) for v in data[name]}) for name in ("batch", "seq"))
    with paper_style():
        shown = data["fits"].astype(bool)
        handles = _handles(in_order(data["winner"][shown]), not data["certain"][shown].all(), not shown.all())
        lines = layout.legend_lines(handles, PAGE_IN)
        around_in = 0.66 + 0.14 * lines
        figure, panels = layout.panel_grid(data["row"], data["column"], _CELL_IN * len(lengths), around_in)
        for (r, c), ax in panels.items():
            chosen = (data["row"] == r) & (data["column"] == c)
            _panel(ax, {name: values[chosen] for name, values in data.items()}, batches, lengths)
        layout.cells(panels, [str(b) for b in batches], [layout.short(n) for n in lengths])
        layout.name_panels(panels, {r: r for r in data["row"]})
        layout.legend_below(figure, handles, lines, "batch")
        return layout.laid_out(figure, "sequence (tokens)")


def _panel(ax: Axes, data: layout.FigurePoints, batches: list[int], lengths: list[int]) -> None:
    """Draw cells and markers as few collections: a map has hundreds of each."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    ax.set(xlim=(-0.5, len(batches) - 0.5), ylim=(-0.5, len(lengths) - 0.5))
    data = {name: values[data["fits"].astype(bool)] for name, values in data.items()}
    x = np.array([batches.index(int(b)) for b in data["batch"]], dtype=float)
    y = np.array([lengths.index(int(n)) for n in data["seq"]], dtype=float)
    winner, gains = data["winner"], data["winner"] != ""

    def draw(chosen: NDArray[np.bool_], **style: Any) -> None:
        if chosen.any():
            center = np.stack([x[chosen], y[chosen]], axis=1)
            ax.add_collection(PolyCollection(list(center[:, None, :] + np.array(_SQUARE)), **style))

    colors = [to_rgba(style_of(n).color, opacity(n, c)) for n, c in zip(winner[gains], data["certain"][gains])]
    draw(gains, facecolors=colors, edgecolors="white", linewidths=0.6)
    draw(~gains, facecolors="white", edgecolors="#B8B8B8", hatch="////", linewidths=0.0)
    for name in in_order(winner[gains]):
        own = winner == name
        ax.plot(x[own], y[own] + 0.22, **style_of(name).marks(linestyle="none", markersize=3.0, markeredgewidth=0.6))
    # numbers fit into their cells, and measuring hundreds of them for the layout is slow
    number: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 6, "in_layout": False}
    for i in np.flatnonzero(gains):
        ax.text(x[i], y[i] - 0.20, f"{data['speedup'][i]:.2f}", **number)


def opacity(name: str, certain: bool) -> float:
    """Return the opacity of a cell; black families have less, so that the numbers in their cells are readable."""
    return (CERTAIN if certain else PALE) * (0.6 if style_of(name).color == BLACK else 1.0)


def _handles(families: list[str], uncertain: bool, unfit: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    out: list[Any] = [Line2D([], [], **style_of(n).marks(linestyle="none"), label=label(n)) for n in families if n]
    if "" in families:
        out.append(Patch(facecolor="white", edgecolor=GREY, hatch="////", linewidth=0.4, label=NO_GAIN))
    if uncertain:
        out.append(Patch(facecolor=BLUE, alpha=PALE, linewidth=0, label=UNCERTAIN))
    if unfit:
        out.append(Patch(facecolor="white", edgecolor=GREY, linewidth=0.4, label=TOO_LARGE))
    return out
