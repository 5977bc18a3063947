"""Draw tables of families: taxonomy, fastest family over batch and sequence, and efficiency to the
bound."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, Normalize, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from simulator.arrays import Array, BoolArray, FloatArray
from simulator.codes import Kernel
from simulator.figures.layout import (
    FigurePoints,
    NoRoom,
    arrays,
    as_table,
    entry,
    fitted,
    laid_out,
    of_panel,
    panel_grid,
    short,
    width_of,
)
from simulator.figures.style import (
    BLACK,
    BLUE,
    GREY,
    INK,
    PALE_INK,
    VERMILLION,
    Look,
    in_order,
    label,
    paper_size,
    paper_style,
    style_of,
)
from simulator.workload import Workload

# axis of the query-key pairs that a family skips, if it is not N: skipped tokens are M, skipped
# heads are K
SKIPPED_PAIRS: Mapping[str, str] = {"dynamic_depth": "M", "dynamic_width": "K"}

AXES = ("M", "N", "K")
WHOLE = 0.995  # shares from this value up count as unchanged
_ROW_IN = 0.345
_BAR_IN = 0.05
_STEP_IN = 0.094

# opacity of a cell whose winner is certain, and of a cell whose winner is not
CERTAIN = 0.42
PALE = 0.14
# efficiencies of the darkest blue (the whole gain of the bound) and the darkest red
CLOSE = 1.0
LOSS = -0.5
_CELL_IN = 0.24
_LINE_IN = 0.155
_SQUARE = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
# numbers fit into their cells, and measuring hundreds of them for the layout is slow
_NUMBER: Look = {
    "ha": "center",
    "va": "center_baseline",
    "in_layout": False,
}


def crossover_figure(cells: Mapping[str, Any]) -> Figure:
    """Draw the fastest family with its colour, marker and speedup in each cell.

    Columns: ``row`` and ``column`` (labels of phase and device), ``batch``, ``seq``, ``winner``
    (empty: no family is faster than dense), ``speedup``, ``certain`` (else pale), ``fits`` (else
    blank: the dense model exceeds the memory).
    """
    data = fitted(arrays(cells), 0.19 * len(set(cells["batch"])) + 0.3)
    batches, lengths = (sorted({int(v) for v in data[name]}) for name in ("batch", "seq"))
    height = _CELL_IN * len(lengths)
    with paper_style():
        figure, panels = panel_grid(
            data, height, 0.66, least_in=height, handles=_winner_handles(data), legend="batch size"
        )
        for place, ax in panels.items():
            _draw_winners(ax, of_panel(data, *place), batches, lengths)
        as_table(
            panels,
            [str(b) for b in batches],
            {row: [short(n) for n in lengths] for row, _ in panels},
        )
        return laid_out(figure, "sequence length (tokens)")


def _winner_handles(data: FigurePoints) -> list[Any]:
    shown = data["fits"].astype(bool)
    families = in_order(data["winner"][shown])
    handles: list[Any] = [
        entry(label(name), **style_of(name).marks(linestyle="none")) for name in families if name
    ]
    blank: Look = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.4}
    if "" in families:
        handles.append(Patch(**blank, hatch="////", label="no speedup"))
    if not data["certain"][shown].all():
        handles.append(Patch(facecolor=BLUE, alpha=PALE, label="pale: winner uncertain"))
    if not shown.all():
        handles.append(Patch(**blank, label="blank: dense model exceeds memory"))
    return handles


def _draw_winners(ax: Axes, data: FigurePoints, batches: list[int], lengths: list[int]) -> None:
    """Draw cells and markers as few collections: a map has hundreds of each."""
    ax.set(xlim=(-0.5, len(batches) - 0.5), ylim=(-0.5, len(lengths) - 0.5))
    data = {name: values[data["fits"].astype(bool)] for name, values in data.items()}
    x = np.array([batches.index(int(b)) for b in data["batch"]], dtype=float)
    y = np.array([lengths.index(int(n)) for n in data["seq"]], dtype=float)
    gains = data["winner"] != ""
    centers = np.stack([x, y], axis=1)
    _draw_cells(ax, centers[gains], facecolors=_gain_colors(data, gains), linewidths=0.6)
    _draw_cells(
        ax, centers[~gains], facecolors="white", edgecolors="#B8B8B8", linewidths=0.0, hatch="////"
    )
    for name in in_order(data["winner"][gains]):
        won = data["winner"] == name
        look = style_of(name).marks(linestyle="none", markersize=3.0, markeredgewidth=0.6)
        ax.plot(x[won], y[won] + 0.22, **look)
    for i in np.flatnonzero(gains):
        ax.text(x[i], y[i] - 0.20, f"{data['speedup'][i]:.2f}", **_NUMBER)


def _gain_colors(data: FigurePoints, gains: BoolArray) -> list[Any]:
    colors = []
    for name, certain in zip(data["winner"][gains], data["certain"][gains]):
        color = style_of(name).color
        opacity = CERTAIN if certain else PALE
        # numbers would be unreadable on a darker black
        colors.append(to_rgba(color, 0.6 * opacity if color == BLACK else opacity))
    return colors


def _draw_cells(ax: Axes, centers: FloatArray, *, edgecolors: str = "white", **look: Any) -> None:
    if len(centers):
        squares = list(centers[:, None, :] + np.array(_SQUARE))
        ax.add_collection(PolyCollection(squares, edgecolors=edgecolors, **look))


def efficiency_figure(points: Mapping[str, Any]) -> Figure:
    """Draw the efficiency, (speedup - 1) / (bound - 1), as a table per device and phase; cells with
    NaN have a dash. Columns: ``row`` and ``column`` (labels of the setting and the device),
    ``family``, ``batch``, ``efficiency``."""
    data = fitted(arrays(points), 0.19 * len(set(points["batch"])) + 0.6)
    batches = sorted({int(b) for b in data["batch"]})
    families = _families_with_gain(data)
    drawn = np.isin(data["row"], list(families))
    data = {name: values[drawn] for name, values in data.items()}
    lines = list(map(len, families.values()))
    height = _LINE_IN * sum(lines) / len(lines)
    with paper_style():
        figure, panels = panel_grid(data, height, 0.9, least_in=height, height_ratios=lines)
        for (row, column), ax in panels.items():
            _draw_efficiencies(ax, of_panel(data, row, column), families[row], batches)
        names = {row: list(map(label, families[row])) for row in families}
        as_table(panels, list(map(str, batches)), names)
        _draw_scale(figure, list(panels.values()))
        return laid_out(figure)


def _families_with_gain(data: FigurePoints) -> dict[str, list[str]]:
    """Return the families of each row of panels that have an efficiency there, or all families if
    none has one."""
    known = np.isfinite(data["efficiency"].astype(float))
    known |= not known.any()
    return {
        row: list(dict.fromkeys(data["family"][known & (data["row"] == row)]))
        for row in dict.fromkeys(data["row"][known])
    }


def _draw_efficiencies(
    ax: Axes, data: FigurePoints, families: list[str], batches: list[int]
) -> None:
    colors = np.ones((len(families), len(batches), 3))
    efficiency = dict(zip(zip(data["family"], data["batch"]), data["efficiency"]))
    for i, j in np.ndindex(len(families), len(batches)):
        value = float(efficiency.get((families[i], batches[j]), np.nan))
        colors[i, j], ink = _color(value)
        ax.text(j, i, number(value), color=ink, **_NUMBER)
    ax.set(xlim=(-0.5, len(batches) - 0.5), ylim=(len(families) - 0.5, -0.5))
    edges = (np.arange(count + 1) - 0.5 for count in (len(batches), len(families)))
    ax.pcolormesh(*edges, colors, edgecolors="white", linewidth=0.5)


def _draw_scale(figure: Figure, panels: list[Axes]) -> None:
    """Draw a scale of the colours below the panels, whose title is the label of their x axes."""
    shades = ListedColormap([_color(float(value))[0] for value in np.linspace(LOSS, CLOSE, 60)])
    bar = figure.colorbar(
        ScalarMappable(Normalize(LOSS, CLOSE), shades),
        ax=panels,
        location="bottom",
        shrink=min(1.0, 2.8 / figure.get_figwidth()),
        aspect=29,
        pad=0.01,
    )
    texts = ["slower than dense", "no gain", "half", "all of the bound"]
    bar.set_ticks([LOSS, 0.0, 0.5, CLOSE], labels=texts)
    bar.ax.set_title("batch size", fontsize=7, fontweight="normal", pad=3)
    bar.ax.tick_params(length=1.5, pad=1.5, labelsize=6)
    bar.outline.set_visible(False)


def number(value: float) -> str:
    if not np.isfinite(value):
        return "–"
    if not -0.995 <= value < 9.95:
        return "<−1" if value < 0 else ">9"
    return (
        f"{value:.1f}" if value >= 0.995 else f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")
    )


def _color(value: float) -> tuple[tuple[float, ...], str]:
    """Return blue for a gain, darker closer to the bound, or red for a loss, and a readable colour
    of text on it."""
    if not np.isfinite(value):
        return (1.0, 1.0, 1.0), GREY
    depth = min(value / CLOSE if value >= 0 else value / LOSS, 1.0)
    base = np.array(to_rgb(BLUE if value >= 0 else VERMILLION))
    mixed = tuple(float(v) for v in 1.0 - (0.06 + 0.94 * depth) * (1.0 - base))
    # by its luminance
    return mixed, "white" if np.dot((0.2126, 0.7152, 0.0722), mixed) < 0.52 else "black"


def kept_axes(
    dense: Workload, pruned: Workload, roles: Sequence[str], attention: str = "N"
) -> tuple[float, float, float]:
    """Return the shares of the logical M, N and K of some operators that pruning keeps, over a
    whole pass.

    M is the tokens of all layers together, N the outputs per token, K the multiply-adds per output.
    A removed layer reduces M; a low-rank pair, or zeros, reduce K; tiles skipped by groups of
    features reduce N, or K if the features are inputs. For attention M is queries, N keys and K the
    features of all heads; skipped query-key pairs reduce the axis ``attention``.
    """
    before, after = (w.take(w.is_role(*roles) & ~w.overhead) for w in (dense, pruned))
    if not len(before):
        return (float("nan"),) * 3
    share = float(after.flops.sum() / before.flops.sum())
    is_attention = "attention" in roles
    (rows0, width0), (rows1, width1) = (_rows_and_width(w, is_attention) for w in (before, after))
    m = rows1 / rows0
    width = width1 / width0 if width1 else 1.0
    rest = share / (m * width) if m * width else 1.0
    if is_attention:
        return {"N": (m, rest, width), "M": (m * rest, 1.0, width), "K": (m, 1.0, width * rest)}[
            attention
        ]
    if ((after.kernel == Kernel.GROUPS_N) | (after.kernel == Kernel.GROUPS_K)).any():
        return (1.0, 1.0, share) if set(roles) & {"o", "down"} else (1.0, share, 1.0)
    return m, width, rest


def _rows_and_width(w: Workload, attention: bool) -> tuple[float, float]:
    """Return queries and features of attention in a pass, or tokens and outputs of GEMMs (second
    low-rank factors)."""
    rows = w.batch * w.q_len * w.count
    width = w.heads * w.head_dim
    if not attention:
        rows = (w.m * w.count)[w.stage != 1]
        width = w.n[w.stage != 1]
    return float(rows.sum()), float((rows * width).sum() / rows.sum()) if rows.sum() else 0.0


def taxonomy_figure(
    family: Sequence[str],
    axis: Sequence[str],
    operators: Sequence[str],
    kept: ArrayLike,
    adds: Sequence[str],
) -> Figure:
    """Draw the shares ``kept`` (families, operators, 3) of the logical M, N and K, NaN for an
    operator that the model lacks. A row is a family with the axis that it changes and the operators
    that it adds."""
    values = np.asarray(kept, dtype=float)
    wide = width_of(len(operators))
    left = 1.38
    right = 1.04
    top = 0.30
    if (least := left + right + 0.62 * len(operators)) > wide:
        scale = paper_size().scale
        raise NoRoom(
            f"--width: expected at least {least * scale:.2f}in, got {wide * scale:.4g}in; use a"
            " smaller --font"
        )
    with paper_style():
        height = top + 0.05 + _ROW_IN * len(family)
        figure = Figure(figsize=(wide, height))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, wide), ylim=(height, 0))
        ax.axis("off")
        cell = (wide - left - right) / len(operators)
        bold: Look = {"va": "bottom", "fontsize": 7, "fontweight": "bold"}
        for j, name in enumerate(operators):
            ax.text(left + (j + 0.5) * cell, top - 0.09, name, ha="center", **bold)
        ax.text(wide - right + 0.06, top - 0.09, "adds", ha="left", **bold)
        ax.hlines(top - 0.04, 0.05, wide - 0.05, color=INK, linewidth=0.6)
        for i, name in enumerate(family):
            y = top + (i + 0.5) * _ROW_IN
            if i % 2 == 0:
                ax.axhspan(y - _ROW_IN / 2, y + _ROW_IN / 2, color="#F5F5F5", zorder=0)
            style = style_of(name, i)
            ax.plot([0.12], [y], **style.marks(linestyle="none", markersize=4.5))
            ax.text(0.24, y - 0.012, label(name), ha="left", va="bottom", fontsize=7)
            ax.text(0.24, y + 0.012, axis[i], ha="left", va="top", color=PALE_INK)
            added = textwrap.fill(adds[i] or "nothing", 20)
            ax.text(
                wide - right + 0.06,
                y,
                added,
                color=BLACK if adds[i] else GREY,
                va="center",
                linespacing=1.05,
            )
            for j in range(len(operators)):
                _cell(ax, left + j * cell, y, cell, values[i, j], style.color)
    return figure


def _cell(ax: Axes, x: float, y: float, width: float, kept: Array, color: str) -> None:
    """Draw three bars, each after the letter of its axis and before the kept per cent; an unchanged
    axis is a line."""
    start = x + 0.13
    full = width - 0.13 - 0.19
    for b, share in enumerate(kept):
        if not np.isfinite(share):
            continue
        middle = y + (b - 1) * _STEP_IN
        reduced = share < WHOLE
        ax.text(
            x + 0.11,
            middle,
            AXES[b],
            ha="right",
            va="center_baseline",
            color=BLACK if reduced else "#9A9A9A",
        )
        if reduced:
            style: Look = {"height": _BAR_IN, "linewidth": 0.4, "align": "center"}
            ax.barh(middle, full, left=start, facecolor="white", edgecolor=color, **style)
            ax.barh(middle, full * share, left=start, facecolor=color, edgecolor=color, **style)
            ax.text(
                start + full + 0.03,
                middle,
                f"{100 * share:.0f}",
                ha="left",
                va="center_baseline",
            )
        else:
            ax.plot(
                [start, start + full],
                [middle] * 2,
                color="#C4C4C4",
                linewidth=0.8,
                solid_capstyle="butt",
            )
