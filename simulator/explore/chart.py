"""How charts look and are laid out: Plotly figures as plain dictionaries, panels side by side, logarithmic axes with round numbers.

Colours, markers and lines are those of the paper's figures (:mod:`simulator.figures.style`), so a family looks the same everywhere. A chart
has a fixed height and takes the width it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from simulator.figures.layout import log_ticks
from simulator.figures.style import look

Chart = dict[str, Any]
"""A Plotly figure: ``data`` and ``layout``."""

INK, SOFT, GRID, PAPER = "#1d2733", "#4a5665", "#e6e9ee", "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', 'DejaVu Sans', Arial, sans-serif"
SMALL = 11
"""Size of ticks and labels, pixels."""

AXIS_PX = 40
"""Room for the numbers and the title of an axis below the panels, pixels."""

MARKERS: Mapping[str, str] = MappingProxyType(
    {
        "o": "circle",
        "s": "square",
        "D": "diamond",
        "^": "triangle-up",
        "v": "triangle-down",
        "P": "cross",
        "X": "x",
        "d": "diamond-tall",
        "h": "hexagon",
        "<": "triangle-left",
        ">": "triangle-right",
    }
)
"""Markers of matplotlib and what Plotly calls them."""

LINES: Mapping[str, str] = MappingProxyType({"-": "solid", "--": "dash", ":": "dot"})


@dataclass(frozen=True)
class Frame:
    """Panels side by side in rows, each with its own axes; below them a legend that wraps.

    Attributes
    ----------
    titles : tuple of str
        One a panel.
    columns : int
        Panels in a row.
    row_px : int
        Height of a row of panels.
    left, right, top, bottom, across, down : int
        Room around and between panels, pixels; ``across`` is a share of the width, per mille.
    """

    titles: tuple[str, ...]
    columns: int
    row_px: int
    left: int = 52
    right: int = 10
    top: int = 24
    bottom: int = 78
    across: int = 30
    down: int = 46

    @classmethod
    def of(cls, titles: Sequence[str], most: int, row_px: int, **room: int) -> Frame:
        """As many panels in a row as there is room for at most, rows as full as can be."""
        rows = -(-len(titles) // most)
        return cls(tuple(titles), -(-len(titles) // rows), row_px, **room)

    @property
    def rows(self) -> int:
        return -(-len(self.titles) // self.columns)

    @property
    def height(self) -> int:
        """Pixels of the whole chart."""
        return self.top + self.bottom + self.area

    def domain(self, panel: int) -> tuple[list[float], list[float]]:
        """Where a panel lies, as shares of the plotting area: across, and up."""
        row, column = divmod(panel, self.columns)
        gap = self.across / 1000
        width = (1 - gap * (self.columns - 1)) / self.columns
        top = 1 - row * (self.row_px + self.down) / self.area
        x = column * (width + gap)
        return [x, min(x + width, 1.0)], [max(top - self.row_px / self.area, 0.0), top]

    def first_in_row(self, panel: int) -> bool:
        return panel % self.columns == 0

    def last_in_column(self, panel: int) -> bool:
        return panel + self.columns >= len(self.titles)

    @property
    def area(self) -> int:
        """Pixels of height that panels and the gaps between them take."""
        return self.rows * self.row_px + (self.rows - 1) * self.down

    def layout(self, axes: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The layout of a chart with these axes; the titles of the panels stand above them."""
        titles = [
            {
                "text": f"<b>{name}</b>",
                "xref": "paper",
                "yref": "paper",
                "x": sum(self.domain(i)[0]) / 2,
                "y": self.domain(i)[1][1],
                "xanchor": "center",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": SMALL + 1, "color": INK},
            }
            for i, name in enumerate(self.titles)
        ]
        return {
            "height": self.height,
            "autosize": True,
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "dragmode": False,
            "hovermode": "closest",
            "margin": {"l": self.left, "r": self.right, "t": self.top, "b": self.bottom, "autoexpand": False},
            "font": {"family": FONT, "size": SMALL, "color": INK},
            "hoverlabel": {"bgcolor": PAPER, "bordercolor": SOFT, "font": {"size": 12, "color": INK}, "align": "left"},
            "legend": {
                "orientation": "h",
                "x": 0.5,
                "xanchor": "center",
                "y": -AXIS_PX / self.area,
                "yanchor": "top",
                "font": {"size": SMALL},
                "tracegroupgap": 2,
                "maxheight": self.bottom,
            },
            **axes,
            **more,
            "annotations": [*titles, *more.get("annotations", ())],
        }


WIDE, PAGE, PHONE = 3, 2, 1
"""Panels in a row: of a page on a laptop, of a printed page, of a phone."""

_LEGEND_PX = {WIDE: 840, PAGE: 560, PHONE: 270}


def legend_px(names: Sequence[str], panels: int, most: int) -> int:
    """Room for axis and legend below the panels: the legend's lines are counted for the width the chart has at least.

    >>> legend_px(["depth"], 1, WIDE) < legend_px(["a name of some length"] * 9, 1, WIDE)
    True
    """
    width, lines, used = min(_LEGEND_PX[most], 440 if panels == 1 else 840), 1, 0.0
    for name in names:
        entry = 48 + 6.8 * len(name)  # in the widest of the usual fonts
        if used and used + entry > width:
            lines, used = lines + 1, 0.0
        used += entry
    return AXIS_PX + 16 + 19 * lines


def key(name: str, marker: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """An entry of the legend that is drawn nowhere. Its own group lets the legend wrap tightly."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [None],
        "y": [None],
        "name": name,
        "marker": dict(marker),
        "legendrank": rank,
        "legendgroup": name,
        "hoverinfo": "skip",
    }


def axis_names(panel: int) -> tuple[str, str]:
    """What traces of a panel call its axes.

    >>> axis_names(0), axis_names(2)
    (('x', 'y'), ('x3', 'y3'))
    """
    number = "" if panel == 0 else str(panel + 1)
    return f"x{number}", f"y{number}"


def axes_of(
    frame: Frame, x: Mapping[str, Any], y: Mapping[str, Any], x_title: str = "", y_title: str = ""
) -> dict[str, Any]:
    """The axes of all panels: alike, each in its place, with numbers at the left of a row only."""
    out: dict[str, Any] = {}
    for i in range(len(frame.titles)):
        numbers = {"showticklabels": frame.first_in_row(i)}
        out |= one_axes(i, frame, x, {**y, **numbers}, x_title, y_title)
    return out


def one_axes(
    panel: int, frame: Frame, x: Mapping[str, Any], y: Mapping[str, Any], x_title: str, y_title: str
) -> dict[str, Any]:
    """The two axes of one panel."""
    across, up = frame.domain(panel)
    name_x, name_y = axis_names(panel)
    base = {
        "fixedrange": True,
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": SOFT,
        "ticks": "",
        "ticklabeloverflow": "allow",
        "tickfont": {"size": SMALL, "color": SOFT},
    }
    title = {"font": {"size": SMALL, "color": SOFT}, "standoff": 6}
    out_x = {**base, "domain": across, "anchor": name_y, **x}
    out_y = {**base, "domain": up, "anchor": name_x, **y}
    if x_title and frame.last_in_column(panel):
        out_x["title"] = {**title, "text": x_title}
    if y_title and frame.first_in_row(panel):
        out_y["title"] = {**title, "text": y_title}
    return {f"xaxis{name_x[1:]}": out_x, f"yaxis{name_y[1:]}": out_y}


def log_axis(low: float, high: float, most: int) -> dict[str, Any]:
    """A logarithmic axis over a range with round numbers.

    >>> log_axis(0.9, 2.1, 5)["ticktext"]
    ['1', '1.25', '1.5', '2']
    """
    ticks = log_ticks(low, high, most)
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{t:,.10g}" for t in ticks],
    }


def marker_of(name: str, size: float = 8, index: int = 0) -> dict[str, Any]:
    """Marker of a family, hollow ones with a white middle so that lines do not show through."""
    style = look(name, index)
    hollow = {"color": PAPER, "line": {"color": style.color, "width": 1.8}}
    full = {"color": style.color, "line": {"color": style.color, "width": 0.5}}
    return {"symbol": MARKERS[style.marker], "size": size, **(hollow if style.hollow else full)}


def line_of(name: str, width: float = 2, index: int = 0) -> dict[str, Any]:
    """Line of a family."""
    style = look(name, index)
    return {"color": style.color, "dash": LINES[style.line], "width": width}


def faded(color: str, opacity: float) -> str:
    """A colour with an opacity.

    >>> faded("#0072B2", 0.5)
    'rgba(0,114,178,0.5)'
    """
    return f"rgba({','.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))},{opacity:g})"


def message(text: str, height: int = 240) -> Chart:
    """A chart that could not be drawn, with the reason in its place."""
    blank = {"visible": False, "fixedrange": True}
    words = wrapped(text)
    note = {
        "text": words,
        "xref": "paper",
        "yref": "paper",
        "x": 0.5,
        "y": 0.5,
        "showarrow": False,
        "font": {"size": 13, "color": SOFT},
    }
    layout = Frame(("",), 1, height - 40, left=10, bottom=10).layout(
        {"xaxis": blank, "yaxis": blank}, annotations=[note], showlegend=False
    )
    return {"data": [], "layout": layout}


def wrapped(text: str, width: int = 44) -> str:
    """Text in lines for a chart, its own angle brackets kept as they are.

    >>> wrapped("a <b> of many words", 10)
    'a &lt;b&gt; of<br>many words'
    """
    import textwrap

    lines = textwrap.wrap(text, width)[:6]
    return "<br>".join(line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in lines)
