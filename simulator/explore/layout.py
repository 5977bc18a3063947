"""Lay out charts: Plotly figures as plain dictionaries, panels side by side, round numbers on logarithmic axes.

Colours, markers and lines are those of the paper's figures (:mod:`simulator.figures.style`): a family looks the same
everywhere. A chart has a fixed height and adapts to the available width.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from types import MappingProxyType
from typing import Any

from simulator.figures.layout import log_ticks
from simulator.figures.style import Style

Dict = dict[str, Any]
Chart = Dict
"""A Plotly figure: ``data`` and ``layout``."""

INK, SOFT, GRID, PAPER = "#1d2733", "#4a5665", "#e6e9ee", "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', 'DejaVu Sans', Arial, sans-serif"
SMALL = 11
"""Size of ticks and labels, pixels."""

TOP_PX, DOWN_PX, AXIS_PX = 24, 46, 40
"""Space above the panels, between two rows of panels, and below them for an axis's numbers and title, pixels."""

WIDE, PAGE, PHONE = 3, 2, 1
"""Maximum number of panels per row on a laptop, on a printed page, on a phone."""

_LEGEND_PX = {WIDE: 840, PAGE: 560, PHONE: 270}

# fmt: off
MARKERS: Mapping[str, str] = MappingProxyType({
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x",
    "d": "diamond-tall", "h": "hexagon", "<": "triangle-left", ">": "triangle-right", "*": "star",
})
# fmt: on
"""Plotly's names of matplotlib's markers."""

LINES: Mapping[str, str] = MappingProxyType({"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"})

QUIET: Mapping[str, Any] = MappingProxyType({"hoverinfo": "skip", "showlegend": False})
"""Options of a trace without hover text and legend entry."""

_AXIS: Dict = {"fixedrange": True, "gridcolor": GRID, "zeroline": False, "linecolor": SOFT, "ticks": ""}
_AXIS |= {"ticklabeloverflow": "allow", "tickfont": {"size": SMALL, "color": SOFT}}
_LEGEND: Dict = {"orientation": "h", "x": 0.5, "xanchor": "center", "yanchor": "top"}
_LEGEND |= {"font": {"size": SMALL}, "tracegroupgap": 2}
_LAYOUT: Dict = {
    "autosize": True,
    "paper_bgcolor": PAPER,
    "plot_bgcolor": PAPER,
    "dragmode": False,
    "hovermode": "closest",
    "font": {"family": FONT, "size": SMALL, "color": INK},
    "hoverlabel": {"bgcolor": PAPER, "bordercolor": SOFT, "font": {"size": 12, "color": INK}, "align": "left"},
}


# -- panels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PanelGrid:
    """Panels with separate axes, at most ``most`` per row and rows of equal length if possible, above a legend that
    wraps.

    ``row_px``, ``left``, ``right`` and ``bottom`` are pixels, ``across`` is a share of the width.
    """

    titles: Sequence[str]
    most: int
    row_px: int
    left: int = 52
    right: int = 16
    bottom: int = 78
    across: float = 0.03

    @property
    def rows(self) -> int:
        return -(-len(self.titles) // self.most)

    @property
    def area(self) -> int:
        """Height of the panels and the gaps between them, pixels."""
        return self.rows * self.row_px + (self.rows - 1) * DOWN_PX

    def chart(
        self, data: list[Dict], x: Sequence[Dict], y: Sequence[Dict], x_title: str = "", y_title: str = "", **more: Any
    ) -> Chart:
        """Place traces on one x and y axis per panel; titles and numbers are below columns and left of rows."""
        columns = -(-len(self.titles) // self.rows)
        placed = _panels(tuple(self.titles), columns, self.across, DOWN_PX / self.area)
        title: Dict = {"font": {"size": SMALL, "color": SOFT}, "standoff": 6}
        axes: Dict = {}
        for i in range(len(self.titles)):
            first, last, number = i % columns == 0, i + columns >= len(self.titles), _number(i)
            x_text = {"title": {**title, "text": x_title if last else ""}}
            y_text = {"title": {**title, "text": y_title if first else ""}, "showticklabels": first}
            axes[f"xaxis{number}"] = {**_AXIS, **placed[f"xaxis{number}"], **x_text, **x[i]}
            axes[f"yaxis{number}"] = {**_AXIS, **placed[f"yaxis{number}"], **y_text, **y[i]}
        names = [{**a, "font": {"size": SMALL + 1, "color": INK}} for a in placed.get("annotations", ())]
        if self.most == PHONE and self.left > 100:  # a narrow panel: its title begins above the labels
            names = [{**a, "x": 1, "xanchor": "right"} for a in names]
        layout = {
            **_LAYOUT,
            "height": TOP_PX + self.area + self.bottom,
            "margin": {"l": self.left, "r": self.right, "t": TOP_PX, "b": self.bottom, "autoexpand": False},
            "legend": {**_LEGEND, "y": -AXIS_PX / self.area, "maxheight": self.bottom},
        }
        notes = [*names, *more.pop("annotations", ())]
        return {"data": data, "layout": {**layout, **axes, **more, "annotations": notes}}


@lru_cache(maxsize=64)
def _panels(titles: tuple[str, ...], columns: int, across: float, down: float) -> Dict:
    """Return Plotly's positions of panels and titles; cached, because this takes as long as the predictions."""
    from plotly.subplots import make_subplots

    rows = -(-len(titles) // columns)
    cells: Any = [[{} if r * columns + c < len(titles) else None for c in range(columns)] for r in range(rows)]
    names = [f"<b>{title}</b>" if title else "" for title in titles]
    room = {"horizontal_spacing": across, "vertical_spacing": down}
    layout: Dict = make_subplots(rows, columns, specs=cells, subplot_titles=names, **room).to_dict()["layout"]
    return layout


def _number(panel: int) -> str:
    """Return Plotly's suffix for the names of a panel's axes."""
    return "" if panel == 0 else str(panel + 1)


def on_axes(panel: int) -> dict[str, str]:
    """Return the axes of a panel as its traces name them.

    >>> on_axes(0), on_axes(2)
    ({'xaxis': 'x', 'yaxis': 'y'}, {'xaxis': 'x3', 'yaxis': 'y3'})
    """
    return {f"{axis}axis": f"{axis}{_number(panel)}" for axis in "xy"}


def legend_px(names: Sequence[str], panels: int, most: int) -> int:
    """Return the height of the axis and the legend below the panels, for the chart's minimum width.

    >>> legend_px(["depth"], 1, WIDE) < legend_px(["a name of some length"] * 9, 1, WIDE)
    True
    """
    width, lines, used = min(_LEGEND_PX[most], 440 if panels == 1 else 840), 1, 0.0
    for name in names:
        entry = 48 + 6.8 * len(name)  # in the widest common font
        if used and used + entry > width:
            lines, used = lines + 1, 0.0
        used += entry
    return AXIS_PX + 16 + 19 * lines


def log_axis(low: float, high: float, most: int) -> Dict:
    """Return a logarithmic axis over a range, with round numbers.

    >>> log_axis(0.9, 2.1, 5)["ticktext"]
    ['1', '1.25', '1.5', '2']
    """
    ticks = log_ticks(low, high, most)
    names = [f"{t:,.10g}" for t in ticks]
    return {"type": "log", "range": [math.log10(low), math.log10(high)], **listed(ticks, names)}


def listed(ticks: Sequence[float], names: Sequence[str]) -> Dict:
    """Return ticks with the given names."""
    return {"tickmode": "array", "tickvals": list(ticks), "ticktext": list(names)}


# -- traces and shapes -------------------------------------------------------------------------------------------------


def scatter(panel: int, mode: str, x: Iterable[Any], y: Iterable[Any], **more: Any) -> Dict:
    """Return points, lines or texts of a panel."""
    return {"type": "scatter", "mode": mode, "x": list(x), "y": list(y), **on_axes(panel), **more}


def key(name: str, marker: Mapping[str, Any], rank: int) -> Dict:
    """Return an entry of the legend that has no points. Its separate group lets the legend wrap tightly."""
    named = {"name": name, "legendgroup": name, "legendrank": rank, "hoverinfo": "skip"}
    return scatter(0, "markers", [None], [None], marker=dict(marker), **named)


def rule(panel: int, axis: str, value: float, color: str, width: float, **more: Any) -> Dict:
    """Return a line across a whole panel, at a value of its axis ``x`` or ``y``."""
    other, number = "y" if axis == "x" else "x", _number(panel)
    place = {f"{axis}ref": f"{axis}{number}", f"{axis}0": value, f"{axis}1": value}
    whole = {f"{other}ref": f"{other}{number} domain", f"{other}0": 0, f"{other}1": 1}
    return {"type": "line", "line": {"color": color, "width": width}, **place, **whole, **more}


def marker_of(style: Style, size: float = 8) -> Dict:
    """Return the marker of a style; hollow markers have a white middle, which hides lines."""
    color, width = (PAPER, 1.8) if style.hollow else (style.color, 0.5)
    rim = {"color": style.color, "width": width}
    return {"symbol": MARKERS[style.marker], "size": size, "color": color, "line": rim}


def faded(color: str, opacity: float) -> str:
    """Return a colour with an opacity.

    >>> faded("#0072B2", 0.5)
    'rgba(0,114,178,0.5)'
    """
    return f"rgba({','.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))},{opacity:g})"


def message(text: str) -> Chart:
    """Return an empty chart that shows a text, such as the reason for its absence."""
    text = "<br>".join(escape(line, quote=False) for line in textwrap.wrap(text, 44)[:6])
    note = {"text": text, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}
    note["font"] = {"size": 13, "color": SOFT}
    blank = [{"visible": False}]
    return PanelGrid([""], 1, 200, left=10, bottom=10).chart([], blank, blank, annotations=[note], showlegend=False)
