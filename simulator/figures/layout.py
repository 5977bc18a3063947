"""Lay out figures: panels under matplotlib's constrained layout, round numbers on logarithmic axes, one legend.

Use :func:`panel_grid` if rows and columns have a meaning, :func:`panel_list` for panels in sequence.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.errors import InputError
from simulator.figures.style import COLUMN_IN, PAGE_IN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FigurePoints = Mapping[str, NDArray[Any]]
"""Points of a figure: arrays of one length by name."""

Panels = Mapping[tuple[str, str], "Axes"]
"""Axes by the labels of their row and column."""

# fmt: off
_MANTISSAS: tuple[tuple[float, ...], ...] = (
    (1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 9, 9.5),
    (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 8, 9),
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 7, 8, 9),
    (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)
# fmt: on


def columns_of(title: str, texts: Mapping[str, Sequence[str]], numbers: Mapping[str, ArrayLike]) -> FigurePoints:
    """Return points of a figure as arrays; InputError if columns are empty or differ in length."""
    columns: dict[str, NDArray[Any]] = {name: np.asarray(values, dtype=object) for name, values in texts.items()}
    columns |= {name: np.asarray(values) for name, values in numbers.items()}
    sizes = {name: len(values) for name, values in columns.items()}
    if 0 in sizes.values() or len(set(sizes.values())) > 1:
        raise InputError(f"{title}: expected columns of one length from 1 up, got {sizes}")
    return columns


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two values on a logarithmic axis: at most ``most``, and none so close to the next
    that their texts would overlap.
    """
    ticks: list[float] = []
    closest = (high / low) ** (0.7 / most)
    for mantissas in _MANTISSAS:
        every = sorted({float(f"{m}e{power}") for power in range(-9, 19) for m in mantissas})
        ticks = [t for t in every if low <= t <= high]
        # fine mantissas are for short ranges; they omit most of a decade
        widest = max(b / a for a, b in itertools.pairwise([low, *ticks, high]))
        apart = all(b / a >= closest for a, b in itertools.pairwise(ticks))
        if len(ticks) <= most and apart and (widest < 2.6 or len(mantissas) < 3):
            break
    return ticks[:: -(-len(ticks) // most) or 1]


def log_axis(axis: Any, low: float, high: float, most: int) -> None:
    """Put round numbers as plain text on an x or y axis that is already logarithmic."""
    fixed_ticks(axis, log_ticks(low, high, most), lambda value, _: f"{value:,.10g}")


def fixed_ticks(axis: Any, ticks: Sequence[float], text: Any) -> None:
    """Put ticks at these values only, written by ``text(value, position)``."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(text))


def short(tokens: int) -> str:
    """Format a number of tokens in few characters."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def in_a_row(panels: int) -> int:
    """Return the number of panels per row: at most three, in rows of equal length if possible."""
    return 2 if panels == 4 else min(panels, 3)


def panel_grid(
    row: Iterable[str], column: Iterable[str], panel_in: float, around_in: float, width_in: float = PAGE_IN, **axes: Any
) -> tuple[Figure, Panels]:
    """Return a figure with a panel per row and column, in the order in which their labels first occur.

    ``row`` and ``column`` have one label per point; ``panel_in`` is the height of a panel, ``around_in`` the height of
    everything above and below the panels (inches); ``axes`` as for :meth:`matplotlib.figure.Figure.subplots`.
    """
    rows, columns = list(dict.fromkeys(row)), list(dict.fromkeys(column))
    figure, grid = _subplots(len(rows), len(columns), panel_in, around_in, width_in, axes)
    return figure, {(r, c): grid[i, j] for i, r in enumerate(rows) for j, c in enumerate(columns)}


def panel_list(
    count: int, panel_in: float, around_in: float, columns: int | None = None, **axes: Any
) -> tuple[Figure, list[Axes], int]:
    """Return a figure with panels in sequence, and the number of panels per row; one column wide for one panel."""
    columns = columns or in_a_row(count)
    width_in = COLUMN_IN if columns == 1 else PAGE_IN
    figure, grid = _subplots(-(-count // columns), columns, panel_in, around_in, width_in, axes)
    for unused in grid.flat[count:]:
        unused.remove()
    return figure, list(grid.flat[:count]), columns


def _subplots(rows: int, columns: int, panel_in: float, around_in: float, width_in: float, axes: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, around_in + rows * panel_in), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.04)
    return figure, figure.subplots(rows, columns, squeeze=False, **axes)


def wrapped(title: str, room_in: float) -> str:
    """Return a panel's title with lines that fit a width in inches, broken after commas, then at blanks."""
    most, lines = max(8, int(room_in / 0.075)), list[str]()
    for line in title.split("\n"):
        parts = [line] if len(line) <= most else line.replace(", ", ",\n").split("\n")
        lines += [short for part in parts for short in textwrap.wrap(part, most)]
    return "\n".join(lines)


def name_panels(panels: Panels, rows: Mapping[str, str]) -> None:
    """Write names of the columns above the first row, and the names in ``rows`` right of the last column."""
    (first, _), (_, last) = next(iter(panels)), list(panels)[-1]
    figure: Any = next(iter(panels.values())).figure
    room_in = (figure.get_figwidth() - 0.9) / len({c for _, c in panels})
    for (r, c), ax in panels.items():
        if r == first:
            ax.set_title(wrapped(c, room_in), pad=5)
        if c == last and r in rows:
            where: dict[str, Any] = {"xytext": (6, 0), "xycoords": "axes fraction", "textcoords": "offset points"}
            ax.annotate(rows[r], (1, 0.5), rotation=270, va="center", fontsize=7, **where)


def cells(panels: Panels, across: Sequence[str], down: Sequence[str]) -> None:
    """Draw panels as tables without grid or spines: names of cells are below the last row and left of the first
    column."""
    (_, first), (last, _) = next(iter(panels)), list(panels)[-1]
    for (r, c), ax in panels.items():
        ax.set_yticks(range(len(down)), down if c == first else [])
        ax.set_xticks(range(len(across)), across if r == last else [])
        ax.grid(visible=False)
        ax.tick_params(length=0)
        ax.spines[["left", "bottom"]].set_visible(False)


def legend_lines(handles: Sequence[Any], width_in: float) -> int:
    """Return the number of lines of a legend that is as wide as its figure."""
    longest = max(len(str(h.get_label())) for h in handles)
    return -(-len(handles) // max(1, int(width_in / (0.45 + 0.055 * longest))))


def legend_below(figure: Figure, handles: Sequence[Any], lines: int, x_label: str = "") -> None:
    """Draw one legend for the whole figure below its panels; its title is the label that the x axes share."""
    across = -(-len(handles) // lines)
    legend: Any = figure.legend(handles=list(handles), loc="outside lower center", ncols=across, borderaxespad=0.2)
    legend.set_title(x_label or None, {"size": 7})
    legend.get_title().set_multialignment("center")


def laid_out(figure: Figure, y_label: str = "") -> Figure:
    """Lay out a figure and fix its layout, because each further pass would move it by a fraction of a pixel. The label
    that the y axes share is at the middle of the panels, not of the figure with its legend."""
    text = figure.supylabel(y_label, fontsize=7) if y_label else None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if text:
        places = [ax.get_position() for ax in figure.axes]
        text.set_y(0.5 * (min(p.y0 for p in places) + max(p.y1 for p in places)))
    return figure
