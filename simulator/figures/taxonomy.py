"""Draw the taxonomy: the shares of M, N and K of every GEMM that each family keeps, and the operators that it adds.

A row is a family, a column an operator, and a cell has three bars for the kept shares of M, N and K. Unchanged axes are
grey lines, so reductions are easy to see.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from simulator.figures.style import BLACK, GREY, INK, PAGE_IN, PALE_INK, label, paper_style, style_of
from simulator.workload import Kernel, Workload

# Axis of the query-key pairs that a family skips, if it is not N: skipped tokens are M, skipped heads are K.
SKIPPED_PAIRS: Mapping[str, str] = MappingProxyType({"dynamic_depth": "M", "dynamic_width": "K"})

AXES = ("M", "N", "K")
WHOLE = 0.995  # shares from this value up count as unchanged

_ROW_IN, _BAR_IN, _STEP_IN = 0.345, 0.05, 0.094


def kept_axes(
    dense: Workload, pruned: Workload, roles: Sequence[str], attention: str = "N"
) -> tuple[float, float, float]:
    """Return the shares of the logical M, N and K of some operators that pruning keeps, over a whole pass.

    M is the tokens of all layers together, N the outputs of a token, K the multiply-adds of an output. A removed layer
    reduces M; a low-rank pair, or zeros, reduce K; tiles skipped by groups of features reduce N, or K if the features
    are inputs. For attention M is queries, N keys and K the features of all heads; skipped query-key pairs reduce the
    axis named.
    """
    before, after = (w.take(w.is_role(*roles) & ~w.overhead) for w in (dense, pruned))
    if not len(before):
        return (float("nan"),) * 3
    share = float(after.flops.sum() / before.flops.sum())
    if "attention" in roles:
        (m0, k0), (m1, k1) = _queries_features(before), _queries_features(after)
        m, k = m1 / m0, k1 / k0 if k1 else 1.0
        n = share / (m * k)
        return {"N": (m, n, k), "M": (m * n, 1.0, k), "K": (m, 1.0, k * n)}[attention]
    if ((after.kernel == Kernel.GROUPS_N) | (after.kernel == Kernel.GROUPS_K)).any():
        return (1.0, 1.0, share) if set(roles) & {"o", "down"} else (1.0, share, 1.0)
    (m0, n0), (m1, n1) = _tokens_outputs(before), _tokens_outputs(after)
    m, n = m1 / m0, n1 / n0 if n1 else 1.0
    return m, n, share / (m * n) if m * n else 1.0


def _tokens_outputs(w: Workload) -> tuple[float, float]:
    """Return tokens of GEMMs in a pass, and outputs per token; a low-rank pair's second factor makes the output."""
    out = w.stage != 1
    rows = (w.m * w.count)[out]
    return float(rows.sum()), float((rows * w.n[out]).sum() / rows.sum()) if rows.sum() else 0.0


def _queries_features(w: Workload) -> tuple[float, float]:
    """Return queries of attention in a pass, and features per query over all heads."""
    queries = w.batch * w.q_len * w.count
    return float(queries.sum()), float((queries * w.heads * w.head_dim).sum() / queries.sum()) if queries.sum() else 0.0


def taxonomy_figure(
    family: Sequence[str], axis: Sequence[str], operators: Sequence[str], kept: ArrayLike, adds: Sequence[str]
) -> Figure:
    """Draw the shares of M, N and K that families keep.

    One entry per row: names of families, the axis that they change ("static M"), and the operators that they add;
    ``operators`` name the columns. ``kept`` (families, operators, 3) is the kept share of the logical M, N and K, NaN
    for an operator that the model lacks.
    """

    values = np.asarray(kept, dtype=float)
    left, right, top, bottom = 1.38, 1.04, 0.30, 0.05
    with paper_style():
        height = top + bottom + _ROW_IN * len(family)
        figure = Figure(figsize=(PAGE_IN, height))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, PAGE_IN), ylim=(height, 0))
        ax.axis("off")
        cell = (PAGE_IN - left - right) / len(operators)
        for j, name in enumerate(operators):
            ax.text(left + (j + 0.5) * cell, top - 0.09, name, ha="center", va="bottom", fontsize=7, fontweight="bold")
        ax.text(PAGE_IN - right + 0.06, top - 0.09, "adds", ha="left", va="bottom", fontsize=7, fontweight="bold")
        ax.hlines(top - 0.04, 0.05, PAGE_IN - 0.05, color=INK, linewidth=0.6)
        for i, name in enumerate(family):
            y = top + (i + 0.5) * _ROW_IN
            if i % 2 == 0:
                ax.axhspan(y - _ROW_IN / 2, y + _ROW_IN / 2, color="#F5F5F5", linewidth=0, zorder=0)
            style = style_of(name, i)
            ax.plot([0.12], [y], **style.marks(linestyle="none", markersize=4.5))
            ax.text(0.24, y - 0.012, label(name), ha="left", va="bottom", fontsize=7)
            ax.text(0.24, y + 0.012, axis[i], ha="left", va="top", fontsize=6, color=PALE_INK)
            extra: dict[str, Any] = {"fontsize": 6, "color": BLACK if adds[i] else GREY, "linespacing": 1.05}
            ax.text(PAGE_IN - right + 0.06, y, textwrap.fill(adds[i] or "nothing", 20), va="center", **extra)
            for j in range(len(operators)):
                _cell(ax, left + j * cell, y, cell, values[i, j], style.color)
    return figure


def _cell(ax: Axes, x: float, y: float, width: float, kept: NDArray[Any], color: str) -> None:
    """Draw three bars, each after the letter of its axis; the kept per cent follows if it is below 100."""
    start, full = x + 0.13, width - 0.13 - 0.19
    for b, share in enumerate(kept):
        middle = y + (b - 1) * _STEP_IN
        if not np.isfinite(share):
            continue
        reduced = share < WHOLE
        letter: dict[str, Any] = {"fontsize": 6, "va": "center_baseline", "color": BLACK if reduced else "#9A9A9A"}
        ax.text(x + 0.11, middle, AXES[b], ha="right", **letter)
        if reduced:
            style: dict[str, Any] = {"height": _BAR_IN, "linewidth": 0.4, "align": "center"}
            ax.barh(middle, full, left=start, facecolor="white", edgecolor=color, **style)
            ax.barh(middle, full * share, left=start, facecolor=color, edgecolor=color, **style)
            ax.text(start + full + 0.03, middle, f"{100 * share:.0f}", ha="left", va="center_baseline", fontsize=6)
        else:
            ax.plot([start, start + full], [middle] * 2, color="#C4C4C4", linewidth=0.8, solid_capstyle="butt")
