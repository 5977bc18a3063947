"""Draw tables of families: taxonomy, fastest family over batch and sequence, and efficiency to the
bound."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from simulator.arrays import Array
from simulator.codes import Kernel
from simulator.figures import layout
from simulator.figures.layout import FigurePoints, short
from simulator.figures.style import (
    BLACK,
    BLUE,
    GREY,
    VERMILLION,
    Look,
    in_order,
    label,
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

# opacity of a cell whose winner is certain, and of a cell whose winner is not
CERTAIN = 0.42
PALE = 0.14
# efficiencies of the darkest blue (the whole gain of the bound) and the darkest red
CLOSE = 1.0
LOSS = -0.5
SCALE = TwoSlopeNorm(0.0, LOSS, CLOSE)
SHADES = LinearSegmentedColormap.from_list("gain", [VERMILLION, "white", BLUE]).with_extremes(
    bad="white"
)
_CELL_IN = 0.24
_LINE_IN = 0.155
_BLANK: Look = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.4}
# numbers fit into their cells, and measuring hundreds of them for the layout is slow
_CENTRED: Look = {"ha": "center", "va": "center", "in_layout": False}
_NUMBER: Look = {**_CENTRED, "va": "center_baseline"}
_NO_GAIN: Look = {"facecolor": "white", "edgecolor": "#B8B8B8", "linewidth": 0, "hatch": "////"}


def crossover_figure(cells: Mapping[str, Any]) -> Figure:
    """Draw the fastest family with its colour, marker and speedup in each cell.

    Columns: ``row`` and ``column`` (labels of phase and device), ``batch``, ``seq``, ``winner``
    (empty: no family is faster than dense), ``speedup``, ``certain`` (else pale), ``fits`` (else
    blank: the dense model exceeds the memory).
    """
    data = layout.fitted(layout.arrays(cells), 0.19 * len(set(cells["batch"])) + 0.3)
    batches, lengths = (sorted({int(v) for v in data[name]}) for name in ("batch", "seq"))
    height = _CELL_IN * len(lengths)
    handles = _winner_handles(data)
    with paper_style():
        figure, panels = layout.panel_grid(
            data, height, 0.66, fixed=True, handles=handles, legend="batch size"
        )
        for place, ax in panels.items():
            _draw_winners(ax, layout.of_panel(data, *place), batches, lengths)
        names = [short(n) for n in lengths]
        layout.as_table(panels, list(map(str, batches)), {row: names for row, _ in panels})
        return layout.laid_out(figure, "sequence length (tokens)")


def _winner_handles(data: FigurePoints) -> list[Any]:
    shown = data["fits"].astype(bool)
    families = in_order(data["winner"][shown])
    looks = {label(name): style_of(name) for name in families if name}
    handles = layout.marks(looks, linestyle="none")
    if "" in families:
        handles.append(Patch(**_BLANK, hatch="////", label="no speedup"))
    if not data["certain"][shown].all():
        handles.append(Patch(facecolor=BLUE, alpha=PALE, label="pale: winner uncertain"))
    if not shown.all():
        handles.append(Patch(**_BLANK, label="blank: dense model exceeds memory"))
    return handles


def _draw_winners(ax: Axes, data: FigurePoints, batches: list[int], lengths: list[int]) -> None:
    colors = np.ones((len(lengths), len(batches), 4))
    data = {name: values[data["fits"].astype(bool)] for name, values in data.items()}
    places = [
        (batches.index(int(b)), lengths.index(int(n))) for b, n in zip(data["batch"], data["seq"])
    ]
    for (x, y), name, certain, speedup in zip(
        places, data["winner"], data["certain"], data["speedup"]
    ):
        if not name:
            ax.axhspan(y - 0.5, y + 0.5, x / len(batches), (x + 1) / len(batches), **_NO_GAIN)
            continue
        style = style_of(name)
        # numbers would be unreadable on a darker black
        opacity = (CERTAIN if certain else PALE) * (0.6 if style.color == BLACK else 1.0)
        colors[y, x] = to_rgba(style.color, opacity)
        ax.plot(x, y + 0.22, **style.marks(markersize=3.0, markeredgewidth=0.6))
        ax.text(x, y - 0.20, f"{speedup:.2f}", **_NUMBER)
    _draw_cells(ax, colors)


def _draw_cells(ax: Axes, colors: Array) -> None:
    """Draw the cells of a table (rows, columns, colour) around whole numbers, the first at 0."""
    rows, columns = colors.shape[:2]
    x, y = (np.arange(count + 1) - 0.5 for count in (columns, rows))
    ax.pcolormesh(x, y, colors, edgecolors="white", linewidth=0.5, zorder=0.5)
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(-0.5, rows - 0.5))


def efficiency_figure(points: Mapping[str, Any]) -> Figure:
    """Draw the efficiency, (speedup - 1) / (bound - 1), as a table per device and phase; cells with
    NaN have a dash. Columns: ``row`` and ``column`` (labels of the setting and the device),
    ``family``, ``batch``, ``efficiency``."""
    data = layout.fitted(layout.arrays(points), 0.19 * len(set(points["batch"])) + 0.6)
    batches = sorted({int(b) for b in data["batch"]})
    families = _families_with_gain(data)
    drawn = np.isin(data["row"], list(families))
    data = {name: values[drawn] for name, values in data.items()}
    lines = list(map(len, families.values()))
    height = _LINE_IN * sum(lines) / len(lines)
    with paper_style():
        figure, panels = layout.panel_grid(data, height, 0.9, fixed=True, height_ratios=lines)
        for (row, column), ax in panels.items():
            _draw_efficiencies(ax, layout.of_panel(data, row, column), families[row], batches)
        names = {row: list(map(label, families[row])) for row in families}
        layout.as_table(panels, list(map(str, batches)), names)
        _draw_scale(figure, list(panels.values()))
        return layout.laid_out(figure)


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
    values = np.full((len(families), len(batches)), np.nan)
    for family, batch, efficiency in zip(data["family"], data["batch"], data["efficiency"]):
        if family in families:
            values[families.index(family), batches.index(batch)] = efficiency
    colors = SHADES(SCALE(values))
    for (i, j), value in np.ndenumerate(values):
        dark = np.dot((0.2126, 0.7152, 0.0722), colors[i, j, :3]) < 0.52  # by its luminance
        ax.text(j, i, number(value), color="white" if dark else "black", **_NUMBER)
    _draw_cells(ax, colors)
    ax.invert_yaxis()


def _draw_scale(figure: Figure, panels: list[Axes]) -> None:
    """Draw a scale of the colours below the panels, whose title is the label of their x axes."""
    bar = figure.colorbar(
        ScalarMappable(SCALE, SHADES),
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
    if value >= 0.995:
        return f"{value:.1f}"
    return f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")


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
    shares = np.asarray(kept, dtype=float)
    colors = np.ones((len(family), len(operators) + 1, 4))
    cells = {"row": [""], "column": [""]}
    with paper_style():
        figure, panels = layout.panel_grid(cells, _ROW_IN * len(family), 0.3, fixed=True)
        ax = panels["", ""]
        for i, name in enumerate(family):
            for j in range(len(operators)):
                reduced = shares[i, j] < WHOLE
                texts = [f"{AXES[b]} {100 * shares[i, j, b]:.0f}" for b in np.flatnonzero(reduced)]
                ax.text(j, i, "\n".join(texts), **_CENTRED)
                if texts:
                    colors[i, j] = to_rgba(style_of(name).color, PALE)
            added = textwrap.fill(adds[i] or "nothing", 16)
            ax.text(len(operators), i, added, color=BLACK if adds[i] else GREY, **_CENTRED)
            ax.plot(-0.4, i, **style_of(name).marks(markersize=4.0, clip_on=False))
        _draw_cells(ax, colors)
        names = [f"{label(name)}\n{change}" for name, change in zip(family, axis)]
        layout.as_table(panels, [*operators, "adds"], {"": names})
        ax.invert_yaxis()
        return layout.laid_out(figure)
