"""Lay out figures: panels, round numbers on logarithmic axes, one legend, and names next to
points."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import ArrayLike

from simulator.arrays import Array, BoolArray, FloatArray
from simulator.errors import InputError
from simulator.figures.style import (
    BLACK,
    COLUMN_IN,
    GREY,
    PAGE_IN,
    device_title,
    engine_title,
    paper_size,
)
from simulator.prediction.requests import batch_name

FigurePoints = Mapping[str, Array]  # points of a figure: arrays of one length by name
Panels = Mapping[tuple[str, str], Axes]  # by the labels of their row and column

# columns of figures that show speedups, and the attributes of a result
SPEEDUP = {"speedup": "speedup", "lower": "speedup_lower", "upper": "speedup_upper"}

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

MOST_ACROSS = 3  # columns that are named by device and engine; more names would overlap
MARKER_PT = 2.6  # half the size of a marker that names keep clear, points
GAP_PT = 2.0  # horizontal room between two names, points
LEAST_PANEL_IN = 1.7  # width of the narrowest panel of a row
LEAST_HEIGHT_IN = 0.9  # height of the lowest panel of a full page
MOST_HEIGHT_IN = 9.5  # height of a page, inches
LONG = 22  # characters of a joint name from which its parts are written below each other

_DISTANCES_PT = (3.5, 8.0, 14.0, 20.0, 27.0, 35.0, 44.0, 54.0, 65.0, 80.0, 100.0, 125.0)
_STEEP = 0.4  # rise of the directions between an axis and a diagonal
_DIRECTIONS = (
    *((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)),
    *((1, -_STEEP), (-1, -_STEEP), (1, _STEEP), (-1, _STEEP)),
    *((_STEEP, -1), (-_STEEP, -1), (_STEEP, 1), (-_STEEP, 1)),
)


class NoRoom(InputError):
    """A figure that is higher than a page, or whose texts would overlap, at the stated width."""


def arrays(points: Mapping[str, Sequence[Any]]) -> FigurePoints:
    return {
        n: np.asarray(v, dtype=object if len(v) and isinstance(v[0], str) else None)
        for n, v in points.items()
    }


def of_panel(data: FigurePoints, row: str, column: str) -> FigurePoints:
    chosen = (data["row"] == row) & (data["column"] == column)
    return {name: values[chosen] for name, values in data.items()}


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most ``most`` round numbers of a logarithmic axis, far enough from each other for
    their texts."""
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
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(text))


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def in_a_row(panels: int, columns: int | None = None) -> int:
    """Return the number of panels per row: ``columns`` or at most three, in rows of equal length if
    possible, and no more than there is room for."""
    columns = columns or (2 if panels == 4 else min(panels, 3))
    return min(columns, max(1, int(width_of(columns) / LEAST_PANEL_IN)))


def width_of(panels: int) -> float:
    """Return the width of a figure before its scale, inches: that of :func:`paper_size`, or one
    column for one panel (in a row), else a page."""
    size = paper_size()
    return size.width_in / size.scale if size.width_in else COLUMN_IN if panels == 1 else PAGE_IN


def most_height() -> float:
    """Return the height of a page before the scale of its figures, inches."""
    return MOST_HEIGHT_IN / paper_size().scale


def fitted(data: FigurePoints, least_in: float = LEAST_PANEL_IN) -> FigurePoints:
    """Return points whose panels have room: a column for each device if there is room for it, else
    one column."""
    columns = set(data["column"])
    if len(columns) * least_in <= width_of(max(2, len(columns))):
        return data
    rows = [f"{column}, {row}" for column, row in zip(data["column"], data["row"])]
    return {**data, **arrays({"row": rows, "column": [""] * len(rows)})}


def panel_grid(
    data: Mapping[str, Iterable[str]],
    panel_in: float,
    around_in: float,
    width_in: float | None = None,
    **look: Any,
) -> tuple[Figure, Panels]:
    """Return a figure with a panel per value of the columns ``row`` and ``column``, in the order of
    their first occurrence. Their names are above and right of the panels. ``around_in`` is the
    height above and below the panels without the legend; ``look`` as for :func:`_subplots`."""
    width_in = width_in or width_of(2)
    rows, columns = (list(dict.fromkeys(data[name])) for name in ("row", "column"))
    grid, panel_in = _subplots(len(rows), len(columns), panel_in, around_in, width_in, **look)
    panels = {(r, c): grid[i, j] for i, r in enumerate(rows) for j, c in enumerate(columns)}
    for (r, c), ax in panels.items():
        if r == rows[0]:
            ax.set_title(wrapped(c, (width_in - 0.9) / len(columns)), pad=5)
        if c == columns[-1]:
            ax.annotate(
                textwrap.fill(r, max(8, int(panel_in / 0.058))),
                (1, 0.5),
                rotation=270,
                va="center",
                fontsize=7,
                xytext=(6, 0),
                xycoords="axes fraction",
                textcoords="offset points",
            )
    return grid[0, 0].figure, panels


def panel_list(
    count: int, panel_in: float, around_in: float, columns: int | None = None, **look: Any
) -> tuple[Figure, list[Axes], int]:
    """Return a figure with panels in sequence, and the number of panels per row; one column wide
    for one panel."""
    columns = in_a_row(count, columns)
    rows = -(-count // columns)
    grid, _ = _subplots(rows, columns, panel_in, around_in, width_of(columns), **look)
    for unused in grid.flat[count:]:
        unused.remove()
    return grid[0, 0].figure, list(grid.flat[:count]), columns


def page(width_in: float, height_in: float) -> Figure:
    """Return an empty figure with little room between panels."""
    if (size := paper_size()).width_in and height_in > most_height() + 0.01:
        raise NoRoom(
            f"--width: a figure {size.width_in:.3g}in wide: expected a height of at most"
            f" {MOST_HEIGHT_IN:g}in, got {height_in * size.scale:.3g}in; use a larger --width, a"
            " smaller --font or fewer devices"
        )
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.04)
    return figure


def _subplots(
    rows: int, columns: int, panel_in: float, around_in: float, width_in: float, **look: Any
) -> Any:
    """Return the axes of a figure, and their height; ``look``: ``handles`` and title (``legend``)
    of its legend, ``title``, the height that panels keep on a full page (``least_in``), options of
    subplots."""
    handles = look.pop("handles", ())
    legend = look.pop("legend", "")
    title = wrapped(look.pop("title", ""), width_in)
    around_in += title_in([title]) if title else 0.0
    least_in = look.pop("least_in", LEAST_HEIGHT_IN)
    lines = legend_lines(handles, width_in) if handles else 0
    room_in = (most_height() - around_in - 0.14 * lines) / rows
    panel_in = min(panel_in, max(room_in, least_in))
    figure = page(width_in, around_in + 0.14 * lines + rows * panel_in)
    if handles:
        legend_below(figure, handles, lines, legend)
    if title:
        figure.suptitle(title)
    return figure.subplots(rows, columns, squeeze=False, **look), panel_in


def wrapped(title: str, room_in: float) -> str:
    """Return a panel's title with lines that fit a width in inches, broken after commas, then at
    blanks."""
    most = max(8, int(room_in / 0.075))
    lines = list[str]()
    for line in title.split("\n"):
        parts = [line] if len(line) <= most else line.replace(", ", ",\n").split("\n")
        lines += [short for part in parts for short in textwrap.wrap(part, most)]
    return "\n".join(lines)


def lines_of(texts: Iterable[str]) -> int:
    """Return the most lines of a text."""
    return max(text.count("\n") + 1 for text in texts)


def title_in(titles: Iterable[str]) -> float:
    """Return the height of the titles of a row of panels, inches."""
    return 0.13 * lines_of(titles)


def as_table(panels: Panels, across: Sequence[str], down: Mapping[str, Sequence[str]]) -> None:
    """Make tables of panels, with the names of cells below the last row and left of the first
    column."""
    (_, first), (last, _) = next(iter(panels)), list(panels)[-1]
    for (r, c), ax in panels.items():
        ax.set_yticks(range(len(down[r])), down[r] if c == first else [])
        ax.set_xticks(range(len(across)), across if r == last else [])
        ax.grid(visible=False)
        ax.tick_params(length=0)
        ax.spines[["left", "bottom"]].set_visible(False)


def entry(label: str, **look: Any) -> Line2D:
    """Return a line or a mark for a legend."""
    return Line2D([], [], **look, label=label)


def legend_lines(handles: Sequence[Any], width_in: float) -> int:
    """Return the number of lines of a legend that is as wide as its figure."""
    longest = max(len(str(h.get_label())) for h in handles)
    return -(-len(handles) // max(1, int(width_in / (0.45 + 0.055 * longest))))


def legend_below(figure: Figure, handles: Sequence[Any], lines: int, x_label: str = "") -> None:
    """Draw one legend for the figure below its panels; its title is the label that the x axes
    share."""
    across = -(-len(handles) // lines)
    legend: Any = figure.legend(
        handles=list(handles), loc="outside lower center", ncols=across, borderaxespad=0.2
    )
    most = int(figure.get_figwidth() / 0.055)
    title = "\n".join(textwrap.fill(line, most) for line in x_label.split("\n"))
    legend.set_title(title or None, {"size": 7})
    legend.get_title().set_multialignment("center")


def laid_out(figure: Figure, y_label: str = "") -> Figure:
    """Lay out a figure and fix its layout, because each further pass would move it by a fraction of
    a pixel. The shared label of the y axes is at the middle of the panels, not of the figure with
    its legend."""
    text = figure.supylabel(y_label, fontsize=7) if y_label else None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if text:
        places = [ax.get_position() for ax in figure.axes]
        text.set_y(0.5 * (min(p.y0 for p in places) + max(p.y1 for p in places)))
    return figure


def columns(rows: Sequence[Any], **names: str) -> dict[str, Any]:
    return {column: [getattr(row, name) for row in rows] for column, name in names.items()}


def interval(level: float) -> str:
    return f"{100 * level:.4g} % interval"


def device(r: Any) -> str:
    return f"{device_title(r.hardware)}, {engine_title(r.engine)}"


def setting_label(r: Any) -> str:
    return f"{r.phase}{f' {r.new_tokens}' if r.new_tokens else ''}, {batch_name(r.phase)} {r.batch}"


def across(devices: int, engines: int = 1) -> int | None:
    """Return the number of panels per row: the devices, or the engines of one device, if they are
    two or three."""
    panels = devices if devices > 1 else engines
    return panels if panels in (2, 3) else None


def placed(found: Sequence[Any], rows: Sequence[str]) -> dict[str, list[str]]:
    """Return row and column labels of results: devices with their engines are columns if they are
    few; else the more numerous of devices and engines are columns, the others rows."""
    if len({device(r) for r in found}) <= MOST_ACROSS:
        return {"row": list(rows), "column": [device(r) for r in found]}
    devices = [device_title(r.hardware) for r in found]
    engines = [engine_title(r.engine) for r in found]
    column, other = (
        (devices, engines) if len(set(devices)) >= len(set(engines)) else (engines, devices)
    )
    return {
        "row": [f"{row}, {more}" for row, more in zip(rows, other, strict=True)],
        "column": column,
    }


def titled(found: Sequence[Any]) -> tuple[list[str], int | None]:
    """Return the titles of the panels of explanations, device and engine with the fields of the
    request that vary, and the number of panels per row as :func:`across`."""
    results = [e.result for e in found]
    several, lengths = (
        len({get(r) for r in results}) > 1 for get in (setting_label, lambda r: r.seq)
    )
    titles = [device(r) + (f"\n{setting_label(r)}" if several or lengths else "") for r in results]
    titles = [title + (f", seq {r.seq}" if lengths else "") for title, r in zip(titles, results)]
    return titles, across(
        *(len({getattr(r, name) for r in results}) for name in ("hardware", "engine"))
    )


def write_labels(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    texts: Sequence[str],
    clear_of: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    reach_pt: float = 125.0,
    color: str = BLACK,
) -> None:
    """Write a name next to each point, as near as there is room, at most ``reach_pt`` typographic
    points away, with a line to the point if it is far. Points whose markers overlap have a joint
    name. Names cover neither the texts of the axes nor the points (x, y) ``clear_of``. The layout
    must be final."""
    points = _pixels(ax, (x, y))
    room = _Room.of(ax, [points, *(_pixels(ax, line) for line in clear_of)])
    to_data = ax.transData.inverted()
    for group in _overlapping(points, 2 * MARKER_PT * room.scale):
        names = list(dict.fromkeys(texts[i] for i in group))
        text = (", " if sum(map(len, names)) < LONG else "\n").join(names)
        point = points[group].mean(axis=0)
        label = ax.annotate(
            text,
            tuple(to_data.transform(point)),
            color=color,
            ha="center",
            va="center",
            zorder=6,
            in_layout=False,
        )
        if (place := room.taken_by(point, label.get_window_extent(), reach_pt)) is None:
            label.remove()
            continue
        label.set_position(tuple(to_data.transform(place.center)))
        if len(place.line):
            ends = to_data.transform(place.line[[0, -1]]).T
            ax.plot(*ends, color=GREY, linewidth=0.4, zorder=3.5)


def _pixels(ax: Axes, line: tuple[ArrayLike, ArrayLike]) -> FloatArray:
    return np.asarray(
        ax.transData.transform(np.stack([np.asarray(v, float) for v in line], axis=1))
    )


def _overlapping(points: FloatArray, reach: float) -> list[list[int]]:
    """Return groups of points within a distance of the first of their group, from the top down."""
    groups: list[list[int]] = []
    for i in np.argsort(-points[:, 1], kind="stable").tolist():
        for group in groups:
            if np.hypot(*(points[i] - points[group[0]])) < reach:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


class _Place(NamedTuple):
    center: FloatArray
    line: FloatArray  # points of a line to the text, empty if the text is near


@dataclass
class _Room:
    """Room in a panel, pixels. A box is left, bottom, right, top."""

    inside: FloatArray  # box of the panel
    taken: FloatArray  # boxes of points and lines
    names: FloatArray  # boxes of texts
    scale: float  # pixels per point

    @classmethod
    def of(cls, ax: Axes, taken: Sequence[FloatArray]) -> _Room:
        figure: Any = ax.figure
        scale = figure.dpi / 72.0
        return cls(
            np.array(ax.get_window_extent().extents),
            _boxes(np.concatenate(taken), MARKER_PT * scale),
            np.reshape([text.get_window_extent().extents for text in ax.texts], (-1, 4)),
            scale,
        )

    def taken_by(self, point: FloatArray, extent: Any, reach_pt: float) -> _Place | None:
        """Take the nearest free place for a text next to a point, if there is one."""
        size = np.array([extent.width + GAP_PT * self.scale, extent.height])
        for center, far, strict in _candidates(point, size, self.scale, reach_pt):
            box = np.concatenate([center - 0.5 * size, center + 0.5 * size])
            line = np.linspace(point, center, 24) if far else np.zeros((0, 2))
            line = line[~_overlaps(_boxes(line, 0.0), box)]
            along = _boxes(line, 0.0)
            within = (box[:2] >= self.inside[:2]).all() and (box[2:] <= self.inside[2:]).all()
            clash = _overlaps(np.concatenate([self.taken, self.names]), box).any()
            crosses = strict and any(_overlaps(along, name).any() for name in self.names)
            if within and not clash and not crosses:
                self.names = np.concatenate([self.names, box[None]])
                self.taken = np.concatenate([self.taken, along])
                return _Place(center, line)
        return None


def _boxes(centers: FloatArray, half: float) -> FloatArray:
    return np.concatenate([centers - half, centers + half], axis=1)


def _overlaps(boxes: FloatArray, box: FloatArray) -> BoolArray:
    return np.asarray((boxes[:, :2] < box[2:]).all(axis=1) & (boxes[:, 2:] > box[:2]).all(axis=1))


def _candidates(
    point: FloatArray, size: FloatArray, scale: float, reach_pt: float
) -> Iterator[Any]:
    """Yield centres of a text around a point, the nearest first, whether the text needs a line to
    the point, and whether this line must not cross names, which it may if no centre is free."""
    for strict in (True, False):
        for distance in (d for d in _DISTANCES_PT if d <= reach_pt):
            for direction in np.array(_DIRECTIONS):
                away = direction * distance * scale / np.hypot(*direction)
                yield (
                    point + away + 0.5 * np.sign(direction) * size,
                    distance > _DISTANCES_PT[0],
                    strict,
                )
