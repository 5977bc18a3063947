"""The loss waterfall of the family in detail: a panel a GPU, from the promise 1 / (1 - s) down to the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simulator.explore.chart import INK, SMALL, SOFT, WIDE, Chart, Frame, axes_of, axis_names, log_axis, message
from simulator.figures.panels import steps_of
from simulator.figures.style import BLUE, GREEN, VERMILLION
from simulator.figures.waterfall import NEGLIGIBLE

if TYPE_CHECKING:
    from simulator.figures.waterfall import Steps
    from simulator.predict.table import Explanation

PROMISE = "#9aa5b1"


def waterfall_chart(details: Sequence[Explanation], *, most: int = WIDE, refused: str = "") -> Chart:
    """Draw explanations; losses are full bars, gains hatched ones, so that they differ without colour."""
    if not details:
        return message(refused or "nothing to draw")
    panels = [steps_of(e, e.record.hardware) for e in details]
    names = ["promised", *panels[0].names, "predicted"]
    frame = Frame.of([p.title for p in panels], most, 19 * len(names), left=160, bottom=40, right=14)
    low, high = _range(panels)
    lines = {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "range": [len(names) - 0.4, -0.6],
        "showgrid": False,
    }
    lines |= {"ticktext": names, "tickfont": {"size": SMALL, "color": INK}, "showline": False}
    axes = axes_of(frame, log_axis(low, high, 5), lines, "speedup")
    data: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for i, (panel_, e) in enumerate(zip(panels, details)):
        data += _bars(panel_, e, i)
        x, y = axis_names(i)
        shapes.append(
            {
                "type": "line",
                "xref": x,
                "yref": f"{y} domain",
                "x0": 1,
                "x1": 1,
                "y0": 0,
                "y1": 1,
                "line": {"color": SOFT, "width": 1},
            }
        )
    return {"data": data, "layout": frame.layout(axes, shapes=shapes, showlegend=False, bargap=0.3)}


def levels(panel: Steps) -> list[float]:
    """Speedup after the promise and after every step.

    >>> from simulator.figures.waterfall import Steps
    >>> levels(Steps("", ["a", "b"], [0.5, 1.5], 2.0, 1.0, 2.0))
    [2.0, 1.0, 1.5]
    """
    out = [panel.nominal]
    for factor in panel.factors:
        out.append(out[-1] * factor)
    return out


def _range(panels: Sequence[Steps]) -> tuple[float, float]:
    """All bars and intervals, with room for the factor beside each bar."""
    values = [1.0] + [v for p in panels for v in (*levels(p), p.lower, p.upper)]
    low, high = min(values), max(values)
    span = max(high / low, 1.1)
    return low / span**0.08, high * span**0.30


def _bars(panel: Steps, e: Explanation, index: int) -> list[dict[str, Any]]:
    """Bars, factors beside them, and the interval of the last one."""
    x, y = axis_names(index)
    where = {"xaxis": x, "yaxis": y}
    reached = levels(panel)
    last = len(reached)
    begins, ends = [1.0, *reached[:-1], 1.0], [*reached, reached[-1]]
    shown = [True, *(abs(f - 1) > NEGLIGIBLE for f in panel.factors), True]
    gains = [False, *(f > 1 for f in panel.factors), False]
    colors = [PROMISE, *(GREEN if f > 1 else VERMILLION for f in panel.factors), BLUE]
    words = [
        f" {panel.nominal:.2f}×",
        *(f" ×{f:.2f}" if abs(f - 1) >= 0.005 else "" for f in panel.factors),
        f" {reached[-1]:.2f}×",
    ]
    told = [f"<b>{step.name}</b>: x{step.factor:.3f} to {step.speedup:.3f}<br>{step.note}" for step in e.steps] + [
        f"<b>predicted</b> {reached[-1]:.3f} ({panel.lower:.3f} to {panel.upper:.3f})"
    ]
    edge = [max(a, b) for a, b in zip(begins, ends)]
    edge[-1] = max(edge[-1], panel.upper)
    joints_x, joints_y = [v for level in reached for v in (level, level, None)], []
    for i in range(last):
        joints_y += [i - 0.35, i + 1.35, None]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": joints_x,
            "y": joints_y,
            "line": {"color": SOFT, "width": 0.8},
            "hoverinfo": "skip",
            **where,
        },
        {
            "type": "bar",
            "orientation": "h",
            "y": list(range(last + 1)),
            "base": begins,
            "x": [(b - a) if on else 0.0 for a, b, on in zip(begins, ends, shown)],
            "marker": {
                "color": colors,
                "line": {"width": 1, "color": colors},
                "pattern": {
                    "shape": ["/" if g else "" for g in gains],
                    "bgcolor": "#ffffff",
                    "fgcolor": GREEN,
                    "size": 5,
                    "solidity": 0.35,
                },
            },
            "hovertext": told,
            "hovertemplate": "%{hovertext}<extra></extra>",
            **where,
        },
        {
            "type": "scatter",
            "mode": "text",
            "x": edge,
            "y": list(range(last + 1)),
            "text": words,
            "textposition": "middle right",
            "textfont": {"size": SMALL, "color": INK},
            "hoverinfo": "skip",
            "cliponaxis": False,
            **where,
        },
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [panel.lower, panel.upper],
            "y": [last, last],
            "line": {"color": INK, "width": 1.6},
            "marker": {"symbol": "line-ns-open", "size": 9, "color": INK},
            "hoverinfo": "skip",
            **where,
        },
    ]
