"""How much of the possible gain each family grants at each batch: tables of numbers on colour, a panel for each device and phase."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.figures.grid import bare, middle, name_panels, panel_grid, same_length, tick_outer
from simulator.figures.style import BLUE, PAGE_IN, VERMILLION, label, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSE = 1.0
"""Efficiency of the darkest blue: all of the bound."""

LOSS = -0.5
"""Efficiency of the darkest red."""

_LINE_IN = 0.15


def efficiency_figure(
    row: Sequence[str],
    column: Sequence[str],
    family: Sequence[str],
    batch: ArrayLike,
    efficiency: ArrayLike,
    *,
    width_in: float = PAGE_IN,
) -> Figure:
    """Efficiency to the bound, (speedup - 1) / (bound - 1), as a table for each device and phase.

    Parameters
    ----------
    row, column, family : sequence of str, one entry a point
        Labels of the setting and the device (panels, in the order of their first occurrence) and the family.
    batch : int array
    efficiency : array
        NaN where the bound promises nothing; such cells stay white with a dash.
    width_in : float
        Width of the figure in inches.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        When there are no points or the arrays differ in length.

    Examples
    --------
    >>> figure = efficiency_figure(["decode"] * 2, ["h100"] * 2, ["depth"] * 2, [1, 8], [0.9, 0.4])
    >>> [t.get_text() for t in figure.axes[0].texts][:2]
    ['.90', '.40']
    """
    data: dict[str, NDArray[Any]] = {
        k: np.asarray(v, dtype=object) for k, v in (("row", row), ("column", column), ("family", family))
    }
    data |= {"batch": np.asarray(batch), "efficiency": np.asarray(efficiency, dtype=float)}
    same_length("points of the figure", data)
    with paper_style():
        return _draw(data, width_in)


def _draw(data: dict[str, NDArray[Any]], width: float) -> Figure:
    families = list(dict.fromkeys(data["family"]))
    batches = sorted({int(b) for b in data["batch"]})
    room: dict[str, Any] = {"left_in": 1.16, "right_in": 0.22, "bottom_in": 0.66, "gap_in": (0.10, 0.12)}
    figure, panels = panel_grid(data["row"], data["column"], width, _LINE_IN * len(families), **room)
    for (r, c), ax in panels.items():
        table = np.full((len(families), len(batches)), np.nan)
        for point in np.flatnonzero((data["row"] == r) & (data["column"] == c)):
            table[families.index(data["family"][point]), batches.index(int(data["batch"][point]))] = data["efficiency"][
                point
            ]
        _panel(ax, table)
    tick_outer(panels, [str(b) for b in batches], [label(f) for f in families])
    name_panels(panels, {r: r for r in data["row"]})
    x, height = middle(panels)[0], figure.get_figheight()
    figure.text(x, 0.38 / height, "batch", ha="center", va="bottom", fontsize=7)
    _key(figure, x, height, width)
    return figure


def _panel(ax: Axes, table: NDArray[np.float64]) -> None:
    count, across = table.shape
    ax.set(xlim=(-0.5, across - 0.5), ylim=(count - 0.5, -0.5))
    bare(ax)
    shades = [[_color(float(value)) for value in line] for line in table]
    mesh = np.array([[color for color, _ in line] for line in shades])
    ax.pcolormesh(np.arange(across + 1) - 0.5, np.arange(count + 1) - 0.5, mesh, edgecolors="white", linewidth=0.5)
    for i in range(count):
        for j in range(across):
            ax.text(
                j, i, number(float(table[i, j])), ha="center", va="center_baseline", fontsize=5, color=shades[i][j][1]
            )


def number(value: float) -> str:
    """An efficiency in few characters.

    >>> number(0.934), number(1.04), number(-0.2), number(-3.21), number(float("nan"))
    ('.93', '1.0', '−.20', '<−1', '–')
    """
    if not np.isfinite(value):
        return "–"
    if value < -0.995:
        return "<−1"
    if value >= 9.95:
        return ">9"
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"
    return text.replace("0.", ".", 1).replace("-", "−") if abs(value) < 0.995 else text


def _color(value: float) -> tuple[tuple[float, ...], str]:
    """Blue for a gain, the darker the closer to the bound; red for a loss; and an ink that reads on it."""
    from matplotlib.colors import to_rgb

    if not np.isfinite(value):
        return (1.0, 1.0, 1.0), "#8A8A8A"
    depth = min(value / CLOSE, 1.0) if value >= 0 else min(value / LOSS, 1.0)
    base = np.array(to_rgb(BLUE if value >= 0 else VERMILLION))
    share = 0.06 + 0.94 * depth
    mixed = tuple(float(v) for v in 1.0 - share * (1.0 - base))
    return mixed, "white" if np.dot((0.2126, 0.7152, 0.0722), mixed) < 0.52 else "black"  # by its luminance


def _key(figure: Figure, middle: float, height: float, width: float) -> None:
    """A scale of the colours below the panels."""
    span, tall = 2.6, 0.09
    ax = figure.add_axes((middle - span / 2 / width, 0.20 / height, span / width, tall / height))
    edges = np.linspace(LOSS, CLOSE, 61)
    for low, high in itertools.pairwise(edges):
        ax.axvspan(low, high, color=_color(float(low + high) / 2)[0], linewidth=0)
    ax.set(xlim=(LOSS, CLOSE), ylim=(0, 1), yticks=[])
    ax.grid(visible=False)
    ticks = (-0.5, 0.0, 0.5, 1.0)
    ax.set_xticks(ticks, ["slower than dense", "no gain", "half", "all of the bound"], fontsize=6)
    ax.tick_params(length=1.5, pad=1.5)
    ax.spines["left"].set_visible(False)
