"""The loss waterfall: from the speedup that the sparsity promises to the predicted one, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError
from simulator.figures.axes import in_a_row, log_axis
from simulator.figures.style import BLUE, COLUMN_IN, GREEN, PAGE_IN, VERMILLION, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEGLIGIBLE = 0.0005
"""A factor this close to 1 is a step without effect; it keeps its line but gets no bar."""


@dataclass(frozen=True)
class Steps:
    """One waterfall.

    Attributes
    ----------
    title : str
        Of the panel.
    names : sequence of str
        Steps after the nominal speedup.
    factors : sequence of float, > 0
        What each step multiplies the speedup by.
    nominal : float
        1 / (1 - sparsity).
    lower, upper : float
        Interval of the predicted speedup.
    """

    title: str
    names: Sequence[str]
    factors: Sequence[float]
    nominal: float
    lower: float
    upper: float


def waterfall_figure(panels: Sequence[Steps], *, columns: int | None = None, width_in: float | None = None) -> Figure:
    """Draw waterfalls side by side, steps on common lines.

    Parameters
    ----------
    panels : sequence of Steps
        All with the same names of steps.
    columns : int, optional
        Panels in a row; at most three if left out.
    width_in : float, optional
        Width of the figure in inches; one column for one panel, the page for more.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        When there is no panel or their steps differ.

    Examples
    --------
    >>> figure = waterfall_figure([Steps("h100", ["parts not pruned", "alignment"], [0.9, 0.95], 1.333, 1.1, 1.2)])
    >>> [t.get_text() for t in figure.axes[0].get_yticklabels()]
    ['promised', 'parts not pruned', 'alignment', 'predicted']
    """
    if not panels or any(list(p.names) != list(panels[0].names) for p in panels):
        raise InputError("waterfalls: expected one panel or more, all with the same steps")
    from matplotlib.figure import Figure

    with paper_style():
        columns = columns or in_a_row(len(panels))
        rows = -(-len(panels) // columns)
        width = width_in or (COLUMN_IN if columns == 1 else PAGE_IN)
        titles = max(p.title.count("\n") + 1 for p in panels)
        left, right, top, bottom, across, down = 1.38, 0.08, 0.12 + 0.13 * titles, 0.40, 0.14, 0.30 + 0.13 * titles
        panel_height = 0.155 * (len(panels[0].names) + 2)
        height = top + bottom + rows * panel_height + (rows - 1) * down
        panel_width = (width - left - right - (columns - 1) * across) / columns
        figure = Figure(figsize=(width, height))
        low, high = _range(panels)
        for i, panel in enumerate(panels):
            r, c = divmod(i, columns)
            x, y = left + c * (panel_width + across), height - top - (r + 1) * panel_height - r * down
            ax = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
            _draw(ax, panel, low, high)
            ax.tick_params(labelleft=c == 0)
            if i + columns >= len(panels):
                ax.set_xlabel("speedup (log scale)")
    return figure


def _range(panels: Sequence[Steps]) -> tuple[float, float]:
    """Common range of all bars and intervals, with room for the factor written beside each bar."""
    values = [1.0]
    for p in panels:
        reached = p.nominal
        values += [p.nominal, p.lower, p.upper]
        for factor in p.factors:
            reached *= factor
            values.append(reached)
    low, high = min(values), max(values)
    span = max(high / low, 1.1)
    return low / span**0.08, high * span**0.34


def _draw(ax: Axes, panel: Steps, low: float, high: float) -> None:
    count = len(panel.names)
    ax.set_xscale("log")
    ax.set(xlim=(low, high), ylim=(count + 1.6, -0.6))
    ax.set_title(panel.title, pad=4)
    log_axis(ax.xaxis, low, high, 6)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.axvline(1.0, color="#444444", linewidth=0.7, zorder=1.5)
    ax.barh(0, panel.nominal - 1.0, left=1.0, height=0.66, color="#C8C8C8", zorder=2)
    _beside(ax, max(panel.nominal, 1.0), 0, f"{panel.nominal:.2f}×")
    reached = panel.nominal
    for i, factor in enumerate(panel.factors, start=1):
        after = reached * factor
        ax.plot([reached] * 2, [i - 1 + 0.33, i - 0.33], color="#777777", linewidth=0.5, zorder=1.8)
        if abs(factor - 1.0) > NEGLIGIBLE:
            gain = factor > 1.0
            # a hatch beside the colour: gains and losses stay apart in grey print
            style: dict[str, Any] = (
                {"facecolor": "white", "edgecolor": GREEN, "hatch": "//////"}
                if gain
                else {"facecolor": VERMILLION, "edgecolor": VERMILLION}
            )
            ax.barh(i, after - reached, left=reached, height=0.66, linewidth=0.6, zorder=2, **style)
            if abs(factor - 1.0) >= 0.005:
                _beside(ax, max(after, reached), i, f"×{factor:.2f}")
        else:
            ax.plot([reached] * 2, [i - 0.33, i + 0.33], color="#777777", linewidth=0.5, zorder=1.8)
        reached = after
    ax.plot([reached] * 2, [count + 0.33, count + 1 - 0.33], color="#777777", linewidth=0.5, zorder=1.8)
    ax.barh(count + 1, reached - 1.0, left=1.0, height=0.66, color=BLUE, zorder=2)
    ax.plot([panel.lower, panel.upper], [count + 1] * 2, color="black", linewidth=0.9, zorder=3)
    for end in (panel.lower, panel.upper):
        ax.plot([end] * 2, [count + 0.82, count + 1.18], color="black", linewidth=0.9, zorder=3)
    _beside(ax, max(panel.upper, reached, 1.0), count + 1, f"{reached:.2f}×")
    ax.set_yticks(range(count + 2), ["promised", *panel.names, "predicted"])


def _beside(ax: Axes, x: float, y: float, text: str) -> None:
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps the number clear of the line at 1
    ax.annotate(
        text,
        (x, y),
        xytext=(2.5, 0),
        textcoords="offset points",
        va="center",
        ha="left",
        fontsize=6,
        zorder=5,
        annotation_clip=False,
        bbox=paper,
    )
