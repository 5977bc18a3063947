"""A grid of panels for settings and devices, laid out in inches: what figures with a panel for each pair share.

Use :func:`same_length` to check the columns of such a figure, :func:`panel_grid` to make it, :func:`name_panels` to label its columns
above and its rows on the right, :func:`middle` to centre text on the panels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from simulator.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panels = Mapping[tuple[str, str], "Axes"]
"""Axes by the labels of their row and column."""

TOP_IN = 0.24
"""Room above the panels for the names of the columns, inches."""


def same_length(what: str, columns: Mapping[str, NDArray[Any]]) -> None:
    """Refuse columns that differ in length or are empty.

    >>> import numpy as np
    >>> same_length("points of the figure", {"x": np.zeros(2), "y": np.zeros(3)})
    Traceback (most recent call last):
    simulator.errors.InputError: points of the figure: expected columns of one length from 1 up, got {'x': 2, 'y': 3}
    """
    sizes = {name: len(values) for name, values in columns.items()}
    if 0 in sizes.values() or len(set(sizes.values())) > 1:
        raise InputError(f"{what}: expected columns of one length from 1 up, got {sizes}")


def panel_grid(
    row: Iterable[str],
    column: Iterable[str],
    width_in: float,
    panel_in: float,
    *,
    left_in: float,
    right_in: float,
    bottom_in: float,
    gap_in: tuple[float, float],
) -> tuple[Figure, Panels]:
    """A figure with a panel for each row and column.

    Parameters
    ----------
    row, column : iterable of str
        Labels, one entry a point; panels come in the order of their first occurrence.
    width_in, panel_in : float, inches
        Width of the figure and height of a panel.
    left_in, right_in, bottom_in : float, inches
        Room around the panels; above them is :data:`TOP_IN`.
    gap_in : pair of float, inches
        Between panels, across and down.

    Returns
    -------
    Figure
    mapping from (row, column) to Axes
        Row after row.

    Examples
    --------
    >>> room = {"left_in": 0.5, "right_in": 0.2, "bottom_in": 0.4, "gap_in": (0.1, 0.1)}
    >>> figure, panels = panel_grid(["decode", "decode"], ["a100", "h100"], 3.35, 1.0, **room)
    >>> list(panels), round(float(figure.get_figheight()), 2)
    ([('decode', 'a100'), ('decode', 'h100')], 1.64)
    """
    from matplotlib.figure import Figure

    rows, columns, (across, down) = list(dict.fromkeys(row)), list(dict.fromkeys(column)), gap_in
    height = TOP_IN + bottom_in + len(rows) * panel_in + (len(rows) - 1) * down
    panel_width = (width_in - left_in - right_in - (len(columns) - 1) * across) / len(columns)
    figure = Figure(figsize=(width_in, height))
    panels: dict[tuple[str, str], Axes] = {}
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            x, y = left_in + j * (panel_width + across), height - TOP_IN - (i + 1) * panel_in - i * down
            panels[r, c] = figure.add_axes((x / width_in, y / height, panel_width / width_in, panel_in / height))
    return figure, panels


def name_panels(panels: Panels, rows: Mapping[str, str], offset: float = 5) -> None:
    """Names of the columns above the first row, and those of the rows (what ``rows`` gives them) some points right of the last column."""
    (first, _), (_, last) = next(iter(panels)), list(panels)[-1]
    for (r, c), ax in panels.items():
        if r == first:
            ax.set_title(c, pad=5)
        if c == last and r in rows:
            where: dict[str, Any] = {"xytext": (offset, 0), "xycoords": "axes fraction", "textcoords": "offset points"}
            ax.annotate(rows[r], (1, 0.5), rotation=270, va="center", fontsize=7, **where)


def tick_outer(panels: Panels, across: Sequence[str], down: Sequence[str]) -> None:
    """Names of cells at 0, 1, 2, ...: ``across`` below the last row, ``down`` left of the first column."""
    (_, first), (last, _) = next(iter(panels)), list(panels)[-1]
    for (r, c), ax in panels.items():
        ax.set_yticks(range(len(down)), down if c == first else [])
        ax.set_xticks(range(len(across)), across if r == last else [])


def bare(ax: Axes) -> None:
    """No grid, ticks or spines: the cells of a table are its frame."""
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def middle(panels: Panels) -> tuple[float, float]:
    """Middle of the panels, across and up the figure, each in [0, 1]."""
    boxes = [ax.get_position() for ax in panels.values()]
    return (
        float((min(b.x0 for b in boxes) + max(b.x1 for b in boxes)) / 2),
        float((min(b.y0 for b in boxes) + max(b.y1 for b in boxes)) / 2),
    )
