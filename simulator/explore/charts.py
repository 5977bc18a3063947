"""Draw the figures of a state except the map: speedup over sparsity, loss waterfall and roofline, a panel per GPU.

Use :func:`charts`; the crossover map, which may take longer, is in ``map_chart``.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from simulator.errors import one_line
from simulator.explore.layout import (
    INK,
    LINES,
    MARKERS,
    PAPER,
    QUIET,
    SMALL,
    SOFT,
    Chart,
    Dict,
    PanelGrid,
    faded,
    key,
    legend_px,
    listed,
    log_axis,
    marker_of,
    message,
    on_axes,
    rule,
    scatter,
)
from simulator.explore.predictions import predictions
from simulator.explore.state import EXISTING, State
from simulator.figures.panels import device, roof_of, steps_of
from simulator.figures.roofline import Roof, common_ranges, drawn, merged
from simulator.figures.style import BLACK, BLUE, COLORS, GREEN, GREY, VERMILLION, Style, in_order, label, style_of
from simulator.figures.titles import device_title
from simulator.figures.waterfall import NEGLIGIBLE, Steps, common_range, folded
from simulator.predict.scenario import once
from simulator.units import percent, rate, ratio

if TYPE_CHECKING:
    from simulator.predict.explain import Explanation
    from simulator.predict.result import Result

CARDS = {
    "speedup": "Speedup over sparsity",
    "roofline": "Roofline",
    "waterfall": "Loss waterfall",
    "crossover": "Crossover map",
}
"""Titles of the figures by name."""


def charts(state: State, most: int) -> dict[str, Chart]:
    """Draw the figures of a state except the map, with at most ``most`` panels per row."""
    found = predictions(state)
    about = state.explained if (pruned := state.load_pruned()) is None else pruned.name
    why = found.problem or next((n for n in found.notes if n.startswith((state.explained, about))), "nothing to draw")
    results, details = found.table, found.details
    speedups = (results, found.existing, state.explained, state.at, most)
    return {
        "speedup": speedup_chart(*speedups) if results else message(why),
        "roofline": roofline_chart(details, most) if details else message(why),
        "waterfall": waterfall_chart(details, found.versus, most) if details else message(why),
    }


# -- speedup over sparsity ---------------------------------------------------------------------------------------------

OF_EXISTING = Style(BLACK, "*")
"""Style of the existing pruned model."""

MOST_BANDS = 6
"""Maximum number of families with an interval band each; of more families, only the one in detail has a band."""

# fmt: off
BOUNDS = (
    ("flop_bound", "FLOP bound", "dot"), ("byte_bound", "byte bound", "dashdot"),
    ("roofline_bound", "roofline bound", "dash"),
)
# fmt: on

X_TITLE = "requested sparsity (%)"
"""Title of the x axis; the sparsity of an existing pruned model is the share of parameters removed."""


def _name(r: Result) -> str:
    """Return the name of a curve or point, short enough for a legend on a phone."""
    return escape(one_line(r.pruned, 24), quote=False) if r.pruned else label(r.family)


_ALONE = {"dot": "line-ew-open", "dashdot": "line-ne-open", "dash": "line-nw-open"}
"""Markers of bounds at a single point."""


def speedup_chart(results: Sequence[Result], existing: Sequence[Result], detail: str, at: float, most: int) -> Chart:
    """Draw a curve with its interval per family over the requested sparsity, the existing pruned model as a point, the
    bounds of the model in detail, and a line at its sparsity."""
    gpus, families = once(r.hardware for r in results), in_order(r.family for r in results)
    of_detail = existing if detail == EXISTING else [r for r in results if r.family == detail]
    of_whom = "pruned model" if detail == EXISTING else label(detail)
    names = [*map(label, families), *once(map(_name, existing))]
    names += [f"{title} ({of_whom})" for _, title, _ in BOUNDS if of_detail]
    frame = PanelGrid(list(map(device_title, gpus)), most, 200, bottom=legend_px(names, len(gpus), most))
    values = [1.0, *(v for r in (*results, *existing) for v in (r.speedup, r.speedup_lower, r.speedup_upper))]
    values += [getattr(r, bound) for r in of_detail for bound, _, _ in BOUNDS]
    fractions = sorted({r.sparsity for r in (*results, *existing)})
    margin = max(0.04 * (fractions[-1] - fractions[0]), 0.02)
    x = {"range": [100 * (fractions[0] - margin), 100 * (fractions[-1] + margin)], "nticks": 9}
    y = log_axis(min(values) / 1.03, max(values) * 1.03, 6)
    data: list[Dict] = []
    shapes: list[Dict] = []
    for panel, gpu in enumerate(gpus):
        for family in sorted(families, key=lambda name: name == detail):  # the family in detail on top
            own = sorted((r for r in results if r.hardware == gpu and r.family == family), key=lambda r: r.sparsity)
            if not own:
                continue
            if len(families) <= MOST_BANDS or family == detail:
                data += _band(own, panel, 0.22 if family == detail else 0.13)
            if family == detail:
                data += _bounds(own, of_whom, panel)
            data.append(_curve(own, panel, family == detail, 1000 + families.index(family)))
        for r in existing:
            if r.hardware == gpu:
                data += _bounds([r], of_whom, panel) if detail == EXISTING else []
                data.append(_curve([r], panel, True, 1500))
        shapes.append(rule(panel, "y", 1, SOFT, 1, layer="below"))
        shapes.append(rule(panel, "x", 100 * at, "#c3cad4", 1.5, layer="below"))
    named: set[str] = set()
    for trace in data:  # the legend names each curve once
        if "name" in trace:
            trace["showlegend"] = trace["name"] not in named
            named.add(trace["name"])
    return frame.chart(data, [x] * len(gpus), [y] * len(gpus), X_TITLE, "speedup", shapes=shapes)


def _band(own: Sequence[Result], panel: int, opacity: float) -> list[Dict]:
    """Return the interval band of one family on one GPU; nothing for a single point."""
    at, name = [100 * r.sparsity for r in own], own[0].family
    edge = [r.speedup_upper for r in own] + [r.speedup_lower for r in reversed(own)]
    style: Dict = {"fill": "toself", "line": {"width": 0}, "fillcolor": faded(style_of(name).color, opacity)}
    return [scatter(panel, "lines", at + at[::-1], edge, legendgroup=name, **style, **QUIET)] if len(own) > 1 else []


def _bounds(own: Sequence[Result], name: str, panel: int) -> list[Dict]:
    mode = "lines" if len(own) > 1 else "markers"
    at = [100 * r.sparsity for r in own]
    out = []
    for bound, title, dash in BOUNDS:
        hover = f"{title} of {name} at %{{x:g}} %: %{{y:.3f}}<extra></extra>"
        style: Dict = {"line": {"color": BLACK, "dash": dash, "width": 1.2}, "hovertemplate": hover}
        style["marker"] = {"symbol": _ALONE[dash], "color": BLACK, "size": 10}
        style |= {"name": f"{title} ({name})", "legendgroup": bound, "legendrank": 2000}
        out.append(scatter(panel, mode, at, [getattr(r, bound) for r in own], **style))
    return out


def _curve(own: Sequence[Result], panel: int, detail: bool, rank: int) -> Dict:
    """Return the points of one family on one GPU, joined; a single point has its interval."""
    name = _name(own[0])
    style = OF_EXISTING if own[0].pruned else style_of(own[0].family)
    ends: Dict = {"type": "data", "symmetric": False, "color": style.color, "thickness": 1.2, "width": 4}
    ends |= {"array": [r.speedup_upper - r.speedup for r in own], "visible": len(own) == 1}
    ends["arrayminus"] = [r.speedup - r.speedup_lower for r in own]
    more: Dict = {"name": name, "legendgroup": own[0].pruned or own[0].family, "legendrank": rank}
    more["marker"] = marker_of(style, 9 if detail else 7)
    more["line"] = {"color": style.color, "dash": LINES[style.line], "width": 2.6 if detail else 1.8}
    more |= {"error_y": ends, "text": [_hover(r) for r in own], "hovertemplate": "%{text}<extra></extra>"}
    mode = "lines+markers" if len(own) > 1 else "markers"
    return scatter(panel, mode, [100 * r.sparsity for r in own], [r.speedup for r in own], **more)


def _hover(r: Result) -> str:
    """Return the hover text of a point."""
    rounded = f"{percent(r.sparsity)} requested, {percent(r.realised_sparsity)} realised"
    removed = f"{percent(r.sparsity)} of the parameters removed ({r.family})" if r.pruned else rounded
    return (
        f"<b>{_name(r)}</b>, {device_title(r.hardware)}: {removed}<br>{ratio(r.speedup)} "
        f"({percent(r.level)} interval {ratio(r.speedup_lower)} to {ratio(r.speedup_upper)}), {r.bottleneck}-bound<br>"
        f"bounds: FLOP {ratio(r.flop_bound)}, byte {ratio(r.byte_bound)}, roofline {ratio(r.roofline_bound)}"
    )


# -- the loss waterfall ------------------------------------------------------------------------------------------------

NOMINAL = "#9aa5b1"


def waterfall_chart(details: Sequence[Explanation], versus: Sequence[Explanation], most: int) -> Chart:
    """Draw the steps from the nominal speedup 1 / (1 - s) to the prediction. Losses are solid bars, gains hatched bars:
    they differ without colour. The waterfall of a second engine follows that of the same GPU."""
    gpus = once(e.result.hardware for e in details)
    details = sorted((*details, *versus), key=lambda e: gpus.index(e.result.hardware)) if versus else details
    titles = [device(e.result) if versus else device_title(e.result.hardware) for e in details]
    panels = folded([steps_of(e, title) for e, title in zip(details, titles)])
    names = ["nominal", *panels[0].names, "predicted"]
    frame = PanelGrid([p.title for p in panels], most, 19 * len(names), left=160, bottom=40, right=14)
    lines: Dict = {"range": [len(names) - 0.4, -0.6], "showgrid": False, "showline": False}
    lines |= {**listed(range(len(names)), names), "tickfont": {"size": SMALL, "color": INK}}
    data = [trace for i, (steps, e) in enumerate(zip(panels, details)) for trace in _bars(steps, e, i)]
    x, y = ([axis] * len(panels) for axis in (log_axis(*common_range(panels, 0.30), 5), lines))
    shapes = [rule(i, "x", 1, SOFT, 1) for i in range(len(panels))]
    return frame.chart(data, x, y, "speedup", shapes=shapes, showlegend=False, bargap=0.3)


def _bars(steps: Steps, e: Explanation, panel: int) -> list[Dict]:
    """Return bars, lines that connect them, factors next to them, and the interval of the last bar."""
    reached = steps.reached.tolist()
    last, predicted = len(reached), reached[-1]
    begins, ends = [1.0, *reached[:-1], 1.0], [*reached, predicted]
    factors = [None, *steps.factors, None]
    lengths = [0.0 if f and abs(f - 1) <= NEGLIGIBLE else b - a for a, b, f in zip(begins, ends, factors)]
    colors = [NOMINAL, *(GREEN if f > 1 else VERMILLION for f in steps.factors), BLUE]
    labels = [f" ×{f:.2f}" if abs(f - 1) >= 0.005 else "" for f in steps.factors]
    hover = [f"<b>nominal</b> {steps.nominal:.3f}<br>{e.steps[0].note}"]
    hover += [
        f"<b>{name}</b>: x{factor:.3f} to {speedup:.3f}<br>{note}"
        for name, factor, speedup, note in zip(steps.names, steps.factors, reached[1:], steps.notes)
    ]
    hover.append(f"<b>predicted</b> {predicted:.3f} ({steps.lower:.3f} to {steps.upper:.3f})")
    joints: list[Any] = []
    for i, level in enumerate(reached):
        joints += [(level, i - 0.35), (level, i + 1.35), (None, None)]
    hatch: Dict = {"shape": ["/" if f and f > 1 else "" for f in factors], "bgcolor": PAPER, "fgcolor": GREEN}
    hatch |= {"size": 5, "solidity": 0.35}
    bars: Dict = {"type": "bar", "orientation": "h", "y": list(range(last + 1)), "base": begins, "x": lengths}
    bars["marker"] = {"color": colors, "line": {"width": 1, "color": colors}, "pattern": hatch}
    bars |= {"hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>", **on_axes(panel)}
    edge = [*map(max, begins[:-1], ends[:-1]), max(1.0, predicted, steps.upper)]
    numbers: Dict = {"textposition": "middle right", "textfont": {"size": SMALL, "color": INK}, "cliponaxis": False}
    numbers["text"] = [f" {steps.nominal:.2f}×", *labels, f" {predicted:.2f}×"]
    cap: Dict = {"symbol": "line-ns-open", "size": 9, "color": INK}
    ends_of: Dict = {"line": {"color": INK, "width": 1.6}, "marker": cap}
    return [
        scatter(panel, "lines", *zip(*joints), line={"color": SOFT, "width": 0.8}, hoverinfo="skip"),
        bars,
        scatter(panel, "text", edge, range(last + 1), **numbers, hoverinfo="skip"),
        scatter(panel, "lines+markers", [steps.lower, steps.upper], [last, last], **ends_of, hoverinfo="skip"),
    ]


# -- the roofline ------------------------------------------------------------------------------------------------------

CYCLE = tuple(zip((*COLORS, GREY, *COLORS[:3]), "osD^vPXhd<>"))
"""Colour and marker of each GEMM, in the order of their first occurrence."""

DENSE, PRUNED, ROOF, HIGHEST = "dense (hollow)", "pruned (filled)", "datasheet roofline", "at the highest clock"


def roofline_chart(details: Sequence[Explanation], most: int) -> Chart:
    """Draw the GEMMs of the dense model (hollow) and of the pruned model (filled), joined by lines. GEMMs that coincide
    in every panel share a marker and a name."""
    roofs = [roof_of(e, device_title(e.result.hardware)) for e in details]
    groups = merged(roofs)
    looks = {title: (color, MARKERS[mark]) for title, (color, mark) in zip(groups, CYCLE * len(groups))}
    faster = [i for i, roof in enumerate(roofs) if roof.headroom > 1.0]
    room = legend_px([*groups, DENSE, PRUNED, ROOF, *([HIGHEST] if faster else [])], len(roofs), most)
    frame = PanelGrid([r.title for r in roofs], most, 200, bottom=room, across=0.06, left=58)
    data, x, y = [], [], []
    low, high, bottom, top = common_ranges(roofs, 2.2)
    for panel, roof in enumerate(roofs):
        x.append(log_axis(low, high, 5))
        y.append({**log_axis(bottom, top, 6), "showticklabels": True})
        data += _roof(roof, panel, low, high, top / (top / bottom) ** 0.03) + _points(roof, panel, groups, looks)
        if panel in faster:
            data.append(_highest(roof, panel, low, high, panel == faster[0]))
    for i, (title, (color, symbol)) in enumerate(looks.items()):
        data.append(key(title, {"symbol": symbol, "color": color, "size": 8}, 1000 + i))
    hollow = {"symbol": "circle", "color": PAPER, "size": 8, "line": {"color": SOFT, "width": 1.6}}
    data += [key(DENSE, hollow, 2000), key(PRUNED, {"symbol": "circle", "color": SOFT, "size": 8}, 2001)]
    return frame.chart(data, x, y, "arithmetic intensity (FLOP/byte)", "TFLOP/s")


def _roof(roof: Roof, panel: int, low: float, high: float, top: float) -> list[Dict]:
    """Return the roof, with its peaks written in the corner above it, where no GEMM can be."""
    labels = f"{rate(roof.peak_flop_per_s, 'FLOP/s')}, {rate(roof.bandwidth_bytes_per_s, 'B/s')}"
    hover: Dict = {"hovertemplate": f"datasheet: {labels}<extra></extra>", "legendgroup": "roof", "legendrank": 3000}
    line: Dict = {"line": {"color": INK, "width": 1.6}, "name": ROOF, "showlegend": panel == 0}
    corner: Dict = {"textposition": "bottom right", "textfont": {"size": SMALL, "color": SOFT}}
    x, y = roof.bend(low, high)
    return [
        scatter(panel, "lines", x.tolist(), y.tolist(), **line, **hover),
        scatter(panel, "text", [low], [top], text=[f" {labels}"], **corner, **QUIET),
    ]


def _highest(roof: Roof, panel: int, low: float, high: float, named: bool) -> Dict:
    """Return the roof at the highest clock, which no GEMM exceeds."""
    x, y = roof.bend(low, high, roof.headroom)
    line: Dict = {"line": {"color": INK, "width": 1, "dash": "dash"}, "name": HIGHEST, "showlegend": named}
    return scatter(
        panel, "lines", x.tolist(), y.tolist(), **line, legendgroup="highest", legendrank=3001, hoverinfo="skip"
    )


def _points(
    roof: Roof, panel: int, groups: dict[str, tuple[str, ...]], looks: dict[str, tuple[str, str]]
) -> list[Dict]:
    """Return all GEMMs of a panel as three traces: lines, hollow markers, filled markers."""
    at, achieved, pruned = (column.tolist() for column in roof.columns())
    places = list(zip(at, (v / 1e12 for v in achieved)))
    points = list(drawn(roof, groups))
    lines: list[Any] = [p for _, i, j in points if j is not None for p in (places[j], places[i], (None, None))]
    thin = {"line": {"color": SOFT, "width": 1}}
    out = [scatter(panel, "lines", [p[0] for p in lines], [p[1] for p in lines], **thin, **QUIET)]
    for kind, model in ((False, "dense"), (True, "pruned")):
        own = [(title, *places[i], *looks[title]) for title, i, _ in points if pruned[i] == kind]
        _, x, y, colors, symbols = zip(*own) if own else [()] * 5
        marker: Dict = {"symbol": list(symbols), "size": 9, "line": {"color": list(colors), "width": 1.6}}
        marker["color"] = list(colors) if kind else PAPER
        hover = [f"<b>{title}</b>, {model}<br>{u:.4g} FLOP/byte, {v:.4g} TFLOP/s" for title, u, v, _, _ in own]
        named: Dict = {"name": model, "text": hover, "hovertemplate": "%{text}<extra></extra>", "showlegend": False}
        out.append(scatter(panel, "markers", x, y, marker=marker, **named))
    return out
