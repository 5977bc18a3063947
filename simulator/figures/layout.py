"""Lay out figures: panels, round numbers on logarithmic axes, one legend, and names next to
points."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from simulator.arrays import Array, FloatArray
from simulator.errors import InputError
from simulator.figures.style import (
    BLACK,
    COLUMN_IN,
    GREY,
    INK,
    PAGE_IN,
    Look,
    Style,
    device_title,
    engine_title,
    paper_size,
)
from simulator.prediction.requests import batch_name

FigurePoints = Mapping[str, Array]  # points of a figure: arrays of one length by name
Panels = Mapping[tuple[str, str], Axes]  # by the labels of their row and column

# columns of figures that show speedups, and the attributes of a result
SPEEDUP = {"speedup": "speedup", "lower": "speedup_lower", "upper": "speedup_upper"}

# digits of the numbers of a logarithmic axis over several powers of ten, the most first
_MANTISSAS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))

MOST_ACROSS = 3  # columns that are named by device and engine; more names would overlap
MARKER_PT = 2.6  # half the size of a marker that names keep clear, points
GAP_PT = 2.0  # horizontal room between two names, points
LEAST_PANEL_IN = 1.7  # width of the narrowest panel of a row
LEAST_HEIGHT_IN = 0.9  # height of the lowest panel of a full page
SHORT_RANGE = 4.5  # ratio up to which the numbers of a logarithmic axis have equal distances
LEAST_RANGE = 1.6  # ratio of the values of a logarithmic axis from which its margins shrink no more
MOST_HEIGHT_IN = 9.5  # height of a page, inches
LONG = 22  # characters of a joint name from which its parts are written below each other

# places of a name around its point: distances, and directions in the order of preference
_DISTANCES_PT = np.array((3.5, 8.0, 14.0, 20.0, 27.0, 35.0, 44.0, 54.0, 65.0, 80.0, 100.0, 125.0))
_ANGLES_DEG = (0, 180, 270, 90, 315, 225, 45, 135, 338, 202, 22, 158, 292, 248, 68, 112)


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
    """Return at most ``most`` round numbers of a logarithmic axis."""
    if high / low < SHORT_RANGE:
        locator = MaxNLocator(most - 1, steps=[1, 2, 2.5, 5, 10])
        return [float(t) for t in locator.tick_values(low, high) if low <= t <= high]
    ticks: list[float] = []
    for mantissas in _MANTISSAS:
        every = (float(f"{m}e{power}") for power in range(-9, 19) for m in mantissas)
        ticks = [t for t in every if low <= t <= high]
        if len(ticks) <= most:
            break
    return ticks[:: -(-len(ticks) // most) or 1]


def plain(value: float, _: object = None) -> str:
    """Return the text of a tick."""
    return f"{value:,.10g}"


def log_axis(ax: Axes, name: str, most: int, limits: tuple[float, float] | None = None) -> None:
    """Make the x or y axis logarithmic, with at most ``most`` round numbers as plain text."""
    ax.set(**{f"{name}scale": "log"}, **({f"{name}lim": limits} if limits else {}))
    low, high = limits or getattr(ax, f"get_{name}lim")()
    fixed_ticks(getattr(ax, f"{name}axis"), log_ticks(low, high, most))


def padded(*values: ArrayLike, after: float = 0.05) -> tuple[float, float]:
    """Return limits of a logarithmic axis with room next to all positive values: ``after`` of the
    range above them."""
    known = np.concatenate([np.ravel(np.asarray(v, dtype=float)) for v in values])
    known = known[np.isfinite(known) & (known > 0.0)]
    low, high = float(known.min()), float(known.max())
    span = max(high / low, LEAST_RANGE)
    return low / span**0.05, high * span**after


def fixed_ticks(axis: Any, ticks: Sequence[float], text: Any = plain) -> None:
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


def fitted(data: FigurePoints) -> FigurePoints:
    """Return points whose panels have room: a column for each device if there is room for it, else
    one column."""
    columns = set(data["column"])
    if len(columns) * LEAST_PANEL_IN <= width_of(max(2, len(columns))):
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
    count: int,
    panel_in: float,
    around_in: float,
    columns: int | None = None,
    *,
    titles: Sequence[str] = (),
    beside_in: float = 0.4,
    x_label: str = "",
    y_label: str = "",
    **look: Any,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels in sequence; one column wide for one panel. Titles are as wide as
    the panels without the texts beside them, ``beside_in`` together. Only the outer panels have
    labels of axes."""
    columns = in_a_row(count, columns)
    width_in = width_of(columns)
    titles = [wrapped(title, (width_in - beside_in) / columns) for title in titles]
    panel_in += title_in(titles) if titles else 0.0
    grid, _ = _subplots(-(-count // columns), columns, panel_in, around_in, width_in, **look)
    for unused in grid.flat[count:]:
        unused.remove()
    axes = list(grid.flat[:count])
    for ax, title in zip(axes, titles):
        ax.set_title(title, pad=5)
    for ax in axes[-columns:]:
        ax.set_xlabel(x_label, labelpad=2)
        ax.tick_params(labelbottom=True)
    for ax in axes[::columns]:
        ax.set_ylabel(y_label)
    return grid[0, 0].figure, axes


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
    rows: int,
    columns: int,
    panel_in: float,
    around_in: float,
    width_in: float,
    *,
    handles: Sequence[Any] = (),
    legend: str = "",
    title: str = "",
    fixed: bool = False,
    **look: Any,
) -> Any:
    """Return the axes of a figure and their height, with a ``legend`` (its title) of ``handles``
    and a ``title``. Panels of a ``fixed`` height are not lower on a full page. ``look``: options of
    subplots."""
    title = wrapped(title, width_in)
    around_in += title_in([title]) if title else 0.0
    around_in += 0.14 * legend_lines(handles, width_in)
    if not fixed:
        panel_in = min(panel_in, max((most_height() - around_in) / rows, LEAST_HEIGHT_IN))
    figure = page(width_in, around_in + rows * panel_in)
    if handles:
        legend_below(figure, handles, legend)
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


def entry(label: str, **look: Any) -> Line2D:
    """Return a line or a mark for a legend."""
    return Line2D([], [], **look, label=label)


def with_intervals(
    ax: Axes, x: Any, y: Any, ends: Sequence[Any], *, across: bool = False, **look: Any
) -> Line2D:
    """Draw points with the intervals of their y, or with ``across`` of their x values."""
    thin: Look = {"linewidth": 0.9, "alpha": 0.7 * look.get("alpha", 1.0), "zorder": 3}
    draw, at = (ax.hlines, y) if across else (ax.vlines, x)
    draw(at, *ends, color=look["color"], **thin)
    line: Line2D = ax.plot(x, y, **{"zorder": 4, **look})[0]
    return line


def marks(styles: Mapping[str, Style], **look: Any) -> list[Any]:
    """Return the entries of a legend of names with their styles."""
    return [entry(name, **style.marks(**look)) for name, style in styles.items()]


def band(level: float) -> Patch:
    """Return the entry of a legend for intervals that are drawn as areas."""
    return Patch(color=INK, alpha=0.16, linewidth=0, label=interval(level))


def bar(level: float, *, up: bool = False) -> Line2D:
    """Return the entry of a legend for intervals that are drawn as lines across or up."""
    mark: Look = {"marker": "|", "markersize": 6, "linestyle": "none"} if up else {}
    return entry(interval(level), color=INK, linewidth=0.9, **mark)


def legend_lines(handles: Sequence[Any], width_in: float) -> int:
    """Return the number of lines of a legend that is as wide as its figure."""
    longest = max((len(str(h.get_label())) for h in handles), default=0)
    return -(-len(handles) // max(1, int(width_in / (0.45 + 0.055 * longest))))


def legend_below(figure: Figure, handles: Sequence[Any], title: str = "") -> None:
    """Draw one legend for the figure below its panels; its title is the label that the x axes
    share."""
    width_in = float(figure.get_figwidth())
    most = int(width_in / 0.055)
    legend = figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=-(-len(handles) // legend_lines(handles, width_in)),
        borderaxespad=0.2,
        title="\n".join(textwrap.fill(line, most) for line in title.split("\n")) or None,
        title_fontsize=7,
    )
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


def setting_label(r: Any, *, batch: bool = True, seq: bool = False) -> str:
    """Return the phase of a result with its batch and length."""
    new = getattr(r, "new_tokens", 0)
    parts = [f"{r.phase} {new}" if new else r.phase]
    parts += [f"{batch_name(r.phase)} {r.batch}"] if batch else []
    parts += [f"seq {r.seq}"] if seq else []
    return ", ".join(parts)


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
    lengths = len({r.seq for r in results}) > 1
    settings = [setting_label(r, seq=lengths) for r in results]
    several = len({*settings}) > 1
    titles = [device(r) + f"\n{text}" * several for r, text in zip(results, settings)]
    return titles, across(
        *(len({getattr(r, name) for r in results}) for name in ("hardware", "engine"))
    )


def write_labels(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    texts: Sequence[Any],
    clear_of: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    reach_pt: float = 125.0,
    color: str = BLACK,
) -> None:
    """Write a name next to each point, as near as there is room, at most ``reach_pt`` typographic
    points away, with a line to the point if it is far. Points whose markers overlap have a joint
    name. Names cover neither the texts of the axes nor the points (x, y) ``clear_of``. The layout
    must be final."""
    half = MARKER_PT * _pixels_per_point(ax)
    points = _pixels(ax, (x, y))
    marked = np.concatenate([points, *(_pixels(ax, line) for line in clear_of)])
    written = np.reshape([text.get_window_extent().extents for text in ax.texts], (-1, 4))
    taken = np.concatenate([_boxes(marked, half), written])
    to_data = ax.transData.inverted().transform
    for group in _overlapping(points, 2 * half):
        names = list(dict.fromkeys(texts[i] for i in group))
        point = points[group].mean(axis=0)
        label = ax.annotate(
            (", " if sum(map(len, names)) < LONG else "\n").join(names),
            tuple(to_data(point)),
            color=color,
            ha="center",
            va="center",
            zorder=6,
            in_layout=False,
        )
        box = _nearest(_boxes_around(ax, label, point, reach_pt), point, taken, written)
        if box is None:
            label.remove()
            continue
        label.set_position(tuple(to_data(0.5 * (box[:2] + box[2:]))))
        way = np.linspace(point, np.clip(point, box[:2], box[2:]), 24)
        written = np.concatenate([written, box[None]])
        taken = np.concatenate([taken, box[None], _boxes(way, 0.0)])
        if np.hypot(*(way[-1] - point)) > 2 * half:
            ax.plot(*to_data(way[[0, -1]]).T, color=GREY, linewidth=0.4, zorder=3.5)


def _boxes_around(ax: Axes, label: Text, point: FloatArray, reach_pt: float) -> FloatArray:
    """Return boxes of a text around a point within the panel, the nearest first."""
    scale, extent = _pixels_per_point(ax), label.get_window_extent()
    size = np.array([extent.width + GAP_PT * scale, extent.height])
    angles = np.radians(_ANGLES_DEG)
    ways = np.round(np.stack([np.cos(angles), np.sin(angles)], axis=1), 6)
    distances = scale * _DISTANCES_PT[reach_pt >= _DISTANCES_PT][:, None, None]
    centers = (point + ways * distances + 0.5 * np.sign(ways) * size).reshape(-1, 2)
    boxes = _boxes(centers, 0.5 * size)
    panel = ax.get_window_extent().extents
    within = (boxes[:, :2] >= panel[:2]) & (boxes[:, 2:] <= panel[2:])
    return boxes[within.all(axis=1)]


def _nearest(
    boxes: FloatArray, point: FloatArray, taken: FloatArray, names: FloatArray
) -> FloatArray | None:
    """Return the first box that overlaps nothing, if possible one whose line to the point crosses
    no name."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    clash = np.logical_and(low < taken[:, 2:], high > taken[:, :2])
    free = boxes[~np.any(np.all(clash, axis=2), axis=1)]
    if not len(free):
        return None
    ends = np.clip(point, free[:, :2], free[:, 2:])
    ways = point + np.linspace(0.0, 1.0, 24)[:, None, None, None] * (ends - point)[:, None]
    inside = np.logical_and(ways > names[:, :2], ways < names[:, 2:])
    crosses = np.any(np.all(inside, axis=3), axis=(0, 2))
    return np.asarray(free[crosses.argmin()])


def _pixels_per_point(ax: Axes) -> float:
    figure: Any = ax.figure
    return float(figure.dpi) / 72.0


def _pixels(ax: Axes, line: tuple[ArrayLike, ArrayLike]) -> FloatArray:
    return np.asarray(
        ax.transData.transform(np.stack([np.asarray(v, float) for v in line], axis=1))
    )


def _overlapping(points: FloatArray, reach: float) -> list[list[int]]:
    """Return groups of points within a distance of the first of their group, from the top down."""
    groups: list[list[int]] = []
    for i in np.argsort(-points[:, 1], kind="stable").tolist():
        near = (g for g in groups if np.hypot(*(points[i] - points[g[0]])) < reach)
        if (group := next(near, None)) is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def _boxes(centers: FloatArray, half: float | FloatArray) -> FloatArray:
    """Return boxes as left, bottom, right and top."""
    return np.concatenate([centers - half, centers + half], axis=1)
