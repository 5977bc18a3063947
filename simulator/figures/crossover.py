"""Which family wins where: maps over batch and sequence, with the winner's colour, marker and speedup in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.figures.axes import legend_below
from simulator.figures.grid import bare, middle, name_panels, panel_grid, same_length, tick_outer
from simulator.figures.style import BLACK, BLUE, PAGE_IN, in_order, label, look, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SURE, PALE = 0.42, 0.14
"""Opacity of a cell whose winner is certain, and of one whose winner is not."""

_CELL_IN = 0.235
_CORNER = [(-1.0, 1.0), (1.0, 1.0), (1.0, -1.0)]  # a marker as the legend shows it


def crossover_figure(
    row: Sequence[str],
    column: Sequence[str],
    batch: ArrayLike,
    seq: ArrayLike,
    winner: Sequence[str],
    speedup: ArrayLike,
    sure: ArrayLike,
    fits: ArrayLike,
    *,
    width_in: float = PAGE_IN,
) -> Figure:
    """Draw the winners.

    Parameters
    ----------
    row, column : sequence of str, one entry a cell
        Labels of the phase and the device (panels, in the order of their first occurrence).
    batch, seq : int array
    winner : sequence of str
        The fastest family; empty where none is faster than the dense model.
    speedup : array
        Its speedup.
    sure : bool array
        Whether its interval lies above that of every other family; the cell is pale where not.
    fits : bool array
        Whether the dense model fits the device's memory; a dark corner where not.
    width_in : float
        Width of the figure in inches.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        When there are no cells or the arrays differ in length.

    Examples
    --------
    >>> figure = crossover_figure(["decode"] * 2, ["h100"] * 2, [1, 8], [512] * 2, ["depth", "width"], [1.9, 1.6], [True] * 2, [True] * 2)
    >>> [t.get_text() for t in figure.axes[0].texts][:2]
    ['1.90', '1.60']
    """
    data: dict[str, NDArray[Any]] = {
        k: np.asarray(v, dtype=object) for k, v in (("row", row), ("column", column), ("winner", winner))
    }
    data |= {"batch": np.asarray(batch), "seq": np.asarray(seq), "speedup": np.asarray(speedup, dtype=float)}
    data |= {"sure": np.asarray(sure, dtype=bool), "fits": np.asarray(fits, dtype=bool)}
    same_length("cells of the map", data)
    with paper_style():
        return _draw(data, width_in)


def _draw(data: dict[str, NDArray[Any]], width: float) -> Figure:
    batches, lengths = (sorted({int(v) for v in data[name]}) for name in ("batch", "seq"))
    handles = _handles(in_order(data["winner"]), not data["sure"].all(), not data["fits"].all())
    across = max(1, int((width - 0.2) // (0.40 + 0.055 * max(len(h.get_label()) for h in handles))))
    lines = -(-len(handles) // across)
    across = -(-len(handles) // lines)
    room: dict[str, Any] = {"left_in": 0.50, "right_in": 0.22, "bottom_in": 0.42 + 0.14 * lines, "gap_in": (0.12, 0.14)}
    figure, panels = panel_grid(data["row"], data["column"], width, _CELL_IN * len(lengths), **room)
    for (r, c), ax in panels.items():
        chosen = (data["row"] == r) & (data["column"] == c)
        _panel(ax, {k: v[chosen] for k, v in data.items()}, batches, lengths)
    tick_outer(panels, [str(b) for b in batches], [short(n) for n in lengths])
    name_panels(panels, {r: r for r in data["row"]})
    x, y = middle(panels)
    figure.text(x, (0.14 + 0.14 * lines) / figure.get_figheight(), "batch", ha="center", va="bottom", fontsize=7)
    figure.supylabel("sequence", x=0.06 / width, y=y, fontsize=7, ha="left")
    legend_below(figure, handles, across, 0.06)
    return figure


def short(tokens: int) -> str:
    """A number of tokens in few characters.

    >>> short(512), short(8192), short(1000)
    ('512', '8k', '1000')
    """
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _panel(ax: Axes, data: dict[str, NDArray[Any]], batches: list[int], lengths: list[int]) -> None:
    """Cells, markers and corners as few collections: a map has hundreds of each."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    ax.set(xlim=(-0.5, len(batches) - 0.5), ylim=(-0.5, len(lengths) - 0.5))
    bare(ax)
    x = np.array([batches.index(int(b)) for b in data["batch"]], dtype=float)
    y = np.array([lengths.index(int(n)) for n in data["seq"]], dtype=float)
    winner = data["winner"]
    gains = winner != ""

    def shapes(chosen: NDArray[np.bool_], corners: Sequence[tuple[float, float]]) -> list[NDArray[np.float64]]:
        return list(np.stack([np.stack([x[chosen] + dx, y[chosen] + dy], axis=1) for dx, dy in corners], axis=1))

    square = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    if gains.any():
        colors = [
            to_rgba(look(name).color, _opacity(name, sure)) for name, sure in zip(winner[gains], data["sure"][gains])
        ]
        ax.add_collection(PolyCollection(shapes(gains, square), facecolors=colors, edgecolors="white", linewidths=0.6))
    if not gains.all():
        ax.add_collection(
            PolyCollection(
                shapes(~gains, square), facecolors="white", edgecolors="#B8B8B8", hatch="////", linewidths=0.0
            )
        )
    if not data["fits"].all():
        corner = shapes(~data["fits"], [(0.47, 0.47), (0.17, 0.47), (0.47, 0.17)])
        ax.add_collection(PolyCollection(corner, facecolors="#5A5A5A", linewidths=0, zorder=3))
    for name in in_order(winner[gains]):
        own = winner == name
        ax.plot(
            x[own], y[own] + 0.22, **{**look(name).marks(), "linestyle": "none"}, markersize=3.0, markeredgewidth=0.6
        )
    for i in np.flatnonzero(gains):
        ax.text(x[i], y[i] - 0.20, f"{data['speedup'][i]:.2f}", ha="center", va="center_baseline", fontsize=5)


def _opacity(name: str, sure: bool) -> float:
    """Opacity of a cell; a black family is thinned, or the numbers in its cells could not be read."""
    return (SURE if sure else PALE) * (0.6 if look(name).color == BLACK else 1.0)


def _handles(families: list[str], unsure: bool, unfit: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    out: list[Any] = [Line2D([], [], **{**look(n).marks(), "linestyle": "none"}, label=label(n)) for n in families if n]
    if "" in families:
        out.append(Patch(facecolor="white", edgecolor="#8A8A8A", hatch="////", linewidth=0.4, label="none gains"))
    if unsure:
        out.append(Patch(facecolor=BLUE, alpha=PALE, linewidth=0, label="pale: intervals overlap"))
    if unfit:
        out.append(
            Line2D(
                [], [], color="#5A5A5A", marker=_CORNER, markersize=3.5, linestyle="none", label="dense exceeds memory"
            )
        )
    return out
