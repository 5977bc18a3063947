"""Draw the share of the roofline bound's gain that each family achieves at each batch: coloured tables of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.figures.layout import cells, columns_of, laid_out, name_panels, panel_grid
from simulator.figures.style import BLUE, GREY, VERMILLION, label, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSE = 1.0
"""Efficiency of the darkest blue: the whole gain of the bound."""

LOSS = -0.5
"""Efficiency of the darkest red."""

_LINE_IN = 0.155


def efficiency_figure(
    row: Sequence[str], column: Sequence[str], family: Sequence[str], batch: ArrayLike, efficiency: ArrayLike
) -> Figure:
    """Draw the efficiency, (speedup - 1) / (bound - 1), as a table per device and phase.

    One entry per point: labels of the setting and the device (panels, in the order of their first occurrence), the
    family, the batch, and the efficiency: NaN if the bound allows no gain; such cells are white with a dash. InputError
    if there are no points or the arrays differ in length.
    """
    texts = {"row": row, "column": column, "family": family}
    data = columns_of("points of the figure", texts, {"batch": batch, "efficiency": efficiency})
    families, batches = list(dict.fromkeys(data["family"])), sorted({int(b) for b in data["batch"]})
    with paper_style():
        figure, panels = panel_grid(data["row"], data["column"], _LINE_IN * len(families), 0.9)
        for (r, c), ax in panels.items():
            table = np.full((len(families), len(batches)), np.nan)
            for point in np.flatnonzero((data["row"] == r) & (data["column"] == c)):
                i, j = families.index(data["family"][point]), batches.index(int(data["batch"][point]))
                table[i, j] = data["efficiency"][point]
            _panel(ax, table)
        cells(panels, [str(b) for b in batches], [label(f) for f in families])
        name_panels(panels, {r: r for r in data["row"]})
        _key(figure, list(panels.values()))
        return laid_out(figure)


def _panel(ax: Axes, table: NDArray[np.float64]) -> None:
    count, across = table.shape
    ax.set(xlim=(-0.5, across - 0.5), ylim=(count - 0.5, -0.5))
    shades = [[_color(float(value)) for value in line] for line in table]
    mesh = np.array([[color for color, _ in line] for line in shades])
    ax.pcolormesh(np.arange(across + 1) - 0.5, np.arange(count + 1) - 0.5, mesh, edgecolors="white", linewidth=0.5)
    # numbers fit into their cells, and measuring hundreds of them for the layout is slow
    place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 6, "in_layout": False}
    for (i, j), value in np.ndenumerate(table):
        ax.text(j, i, number(float(value)), color=shades[i][j][1], **place)


def number(value: float) -> str:
    """Format an efficiency in few characters."""
    if not np.isfinite(value):
        return "–"
    if value < -0.995:
        return "<−1"
    if value >= 9.95:
        return ">9"
    if abs(value) >= 0.995:
        return f"{value:.1f}"
    return f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")


def _color(value: float) -> tuple[tuple[float, ...], str]:
    """Return blue for a gain, darker closer to the bound, or red for a loss; and a readable colour for text on it."""
    from matplotlib.colors import to_rgb

    if not np.isfinite(value):
        return (1.0, 1.0, 1.0), GREY
    depth = min(value / CLOSE if value >= 0 else value / LOSS, 1.0)
    base = np.array(to_rgb(BLUE if value >= 0 else VERMILLION))
    mixed = tuple(float(v) for v in 1.0 - (0.06 + 0.94 * depth) * (1.0 - base))
    return mixed, "white" if np.dot((0.2126, 0.7152, 0.0722), mixed) < 0.52 else "black"  # by its luminance


def _key(figure: Figure, axes: list[Axes]) -> None:
    """Draw a scale of the colours below the panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = ListedColormap([_color(float(value))[0] for value in np.linspace(LOSS, CLOSE, 60)])
    bar = figure.colorbar(
        ScalarMappable(Normalize(LOSS, CLOSE), shades), ax=axes, location="bottom", shrink=0.4, aspect=29, pad=0.01
    )
    bar.set_ticks([LOSS, 0.0, 0.5, CLOSE], labels=["slower than dense", "no gain", "half", "all of the bound"])
    bar.ax.set_title("batch", fontsize=7, fontweight="normal", pad=3)  # label of the x axes of the panels
    bar.ax.tick_params(length=1.5, pad=1.5, labelsize=6)
    bar.outline.set_visible(False)
