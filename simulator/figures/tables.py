"""Draw the taxonomy: the shares of M, N and K that each family keeps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from simulator.arrays import Array
from simulator.codes import Kernel
from simulator.figures import layout
from simulator.figures.style import BLACK, GREY, Look, label, paper_style, style_of
from simulator.workload import Workload

# axis of the query-key pairs that a family skips, if it is not N: skipped tokens are M, skipped
# heads are K
SKIPPED_PAIRS: Mapping[str, str] = {"dynamic_depth": "M", "dynamic_width": "K"}

AXES = ("M", "N", "K")
WHOLE = 0.995  # shares from this value up count as unchanged
_ROW_IN = 0.345

PALE = 0.14  # opacity of a cell with a reduced share
# texts fit into their cells, and measuring hundreds of them for the layout is slow
_CENTRED: Look = {"ha": "center", "va": "center", "in_layout": False}


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
        names = [f"{label(name)}\n{change}" for name, change in zip(family, axis)]
        _draw_cells(ax, colors, [*operators, "adds"], names)
        return layout.laid_out(figure)


def _draw_cells(ax: Axes, colors: Array, across: Sequence[str], down: Sequence[str]) -> None:
    """Draw the cells of a table (rows, columns, colour), the first row at the top, with the names
    of columns and rows."""
    x, y = (np.arange(len(names) + 1) - 0.5 for names in (across, down))
    ax.pcolormesh(x, y, colors, edgecolors="white", linewidth=0.5, zorder=0.5)
    ax.set_xticks(range(len(across)), across)
    ax.set_yticks(range(len(down)), down)
    ax.set(xlim=(x[0], x[-1]), ylim=(y[-1], y[0]))
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
