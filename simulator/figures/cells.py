"""Draw tables of coloured cells: the fastest family over batch and sequence, and the share of the roofline bound's gain
that each family achieves at each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, Normalize, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from simulator.figures.layout import FigurePoints, arrays, as_table, laid_out, of_panel, panel_grid, short
from simulator.figures.style import BLACK, BLUE, GREY, VERMILLION, in_order, label, paper_style, style_of

CERTAIN, PALE = 0.42, 0.14  # opacity of a cell whose winner is certain, and of a cell whose winner is not
CLOSE, LOSS = 1.0, -0.5  # efficiencies of the darkest blue (the whole gain of the bound) and the darkest red

_CELL_IN, _LINE_IN = 0.24, 0.155
_SQUARE = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
# numbers fit into their cells, and measuring hundreds of them for the layout is slow
_NUMBER: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 6, "in_layout": False}


def crossover_figure(cells: Mapping[str, Any]) -> Figure:
    """Draw the fastest family with its colour, marker and speedup in each cell.

    Columns of the cells: ``row`` and ``column`` (labels of the phase and the device), ``batch``, ``seq``, ``winner``
    (the fastest family, empty if none is faster than the dense model) and its ``speedup``, ``certain`` (whether it is
    certain to be the fastest; else the cell is pale), and ``fits`` (whether the dense model fits the device's memory;
    else the cell is blank).
    """
    data = arrays(cells)
    batches, lengths = (sorted({int(v) for v in data[name]}) for name in ("batch", "seq"))
    shown = data["fits"].astype(bool)
    with paper_style():
        handles = _handles(in_order(data["winner"][shown]), not data["certain"][shown].all(), not shown.all())
        figure, panels = panel_grid(data, _CELL_IN * len(lengths), 0.66, handles=handles, legend="batch")
        for place, ax in panels.items():
            _draw_winners(ax, of_panel(data, *place), batches, lengths)
        as_table(panels, [str(b) for b in batches], [short(n) for n in lengths])
        return laid_out(figure, "sequence (tokens)")


def _draw_winners(ax: Axes, data: FigurePoints, batches: list[int], lengths: list[int]) -> None:
    """Draw cells and markers as few collections: a map has hundreds of each."""
    ax.set(xlim=(-0.5, len(batches) - 0.5), ylim=(-0.5, len(lengths) - 0.5))
    data = {name: values[data["fits"].astype(bool)] for name, values in data.items()}
    x = np.array([batches.index(int(b)) for b in data["batch"]], dtype=float)
    y = np.array([lengths.index(int(n)) for n in data["seq"]], dtype=float)
    winner, gains = data["winner"], data["winner"] != ""

    def draw(chosen: NDArray[np.bool_], **style: Any) -> None:
        if chosen.any():
            center = np.stack([x[chosen], y[chosen]], axis=1)
            ax.add_collection(PolyCollection(list(center[:, None, :] + np.array(_SQUARE)), **style))

    colors = [to_rgba(style_of(n).color, _opacity(n, c)) for n, c in zip(winner[gains], data["certain"][gains])]
    draw(gains, facecolors=colors, edgecolors="white", linewidths=0.6)
    draw(~gains, facecolors="white", edgecolors="#B8B8B8", hatch="////", linewidths=0.0)
    for name in in_order(winner[gains]):
        own = winner == name
        ax.plot(x[own], y[own] + 0.22, **style_of(name).marks(linestyle="none", markersize=3.0, markeredgewidth=0.6))
    for i in np.flatnonzero(gains):
        ax.text(x[i], y[i] - 0.20, f"{data['speedup'][i]:.2f}", **_NUMBER)


def _opacity(name: str, certain: bool) -> float:
    """Return the opacity of a cell; black families have less, so that the numbers in their cells are readable."""
    return (CERTAIN if certain else PALE) * (0.6 if style_of(name).color == BLACK else 1.0)


def _handles(families: list[str], uncertain: bool, unfit: bool) -> list[Any]:
    out: list[Any] = [Line2D([], [], **style_of(n).marks(linestyle="none"), label=label(n)) for n in families if n]
    blank: dict[str, Any] = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.4}
    if "" in families:
        out.append(Patch(**blank, hatch="////", label="no speedup"))
    if uncertain:
        out.append(Patch(facecolor=BLUE, alpha=PALE, linewidth=0, label="pale: winner uncertain"))
    if unfit:
        out.append(Patch(**blank, label="blank: dense model exceeds memory"))
    return out


def efficiency_figure(points: Mapping[str, Any]) -> Figure:
    """Draw the efficiency, (speedup - 1) / (bound - 1), as a table per device and phase.

    Columns of the points: ``row`` and ``column`` (labels of the setting and the device), ``family``, ``batch`` and
    ``efficiency``: NaN if the bound allows no gain; such cells are white with a dash.
    """
    data = arrays(points)
    families, batches = list(dict.fromkeys(data["family"])), sorted({int(b) for b in data["batch"]})
    with paper_style():
        figure, panels = panel_grid(data, _LINE_IN * len(families), 0.9)
        for place, ax in panels.items():
            table, own = np.full((len(families), len(batches)), np.nan), of_panel(data, *place)
            for name, size, value in zip(own["family"], own["batch"], own["efficiency"]):
                table[families.index(name), batches.index(int(size))] = value
            _draw_table(ax, table)
        as_table(panels, [str(b) for b in batches], [label(f) for f in families])
        _key(figure, list(panels.values()))
        return laid_out(figure)


def _draw_table(ax: Axes, table: NDArray[np.float64]) -> None:
    count, across = table.shape
    ax.set(xlim=(-0.5, across - 0.5), ylim=(count - 0.5, -0.5))
    shades = [[_color(float(value)) for value in line] for line in table]
    mesh = np.array([[color for color, _ in line] for line in shades])
    ax.pcolormesh(np.arange(across + 1) - 0.5, np.arange(count + 1) - 0.5, mesh, edgecolors="white", linewidth=0.5)
    for (i, j), value in np.ndenumerate(table):
        ax.text(j, i, number(float(value)), color=shades[i][j][1], **_NUMBER)


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
    if not np.isfinite(value):
        return (1.0, 1.0, 1.0), GREY
    depth = min(value / CLOSE if value >= 0 else value / LOSS, 1.0)
    base = np.array(to_rgb(BLUE if value >= 0 else VERMILLION))
    mixed = tuple(float(v) for v in 1.0 - (0.06 + 0.94 * depth) * (1.0 - base))
    return mixed, "white" if np.dot((0.2126, 0.7152, 0.0722), mixed) < 0.52 else "black"  # by its luminance


def _key(figure: Figure, axes: list[Axes]) -> None:
    """Draw a scale of the colours below the panels."""
    shades = ListedColormap([_color(float(value))[0] for value in np.linspace(LOSS, CLOSE, 60)])
    place: dict[str, Any] = {"location": "bottom", "shrink": 0.4, "aspect": 29, "pad": 0.01}
    bar = figure.colorbar(ScalarMappable(Normalize(LOSS, CLOSE), shades), ax=axes, **place)
    bar.set_ticks([LOSS, 0.0, 0.5, CLOSE], labels=["slower than dense", "no gain", "half", "all of the bound"])
    bar.ax.set_title("batch", fontsize=7, fontweight="normal", pad=3)  # label of the x axes of the panels
    bar.ax.tick_params(length=1.5, pad=1.5, labelsize=6)
    bar.outline.set_visible(False)
