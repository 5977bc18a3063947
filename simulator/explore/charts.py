"""Draw the figures of a state except the map, a panel per GPU; here the loss waterfall and the roofline.

Use :func:`charts`; curves are in ``curve_charts``, the crossover map, which may take longer, in ``map_chart``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simulator.explore.curve_charts import (
    latency_chart,
    over_batches,
    over_concurrency,
    sizes,
    sparsities,
    speedup_chart,
)
from simulator.explore.layout import (
    INK,
    MARKERS,
    PAPER,
    QUIET,
    SMALL,
    SOFT,
    Chart,
    Dict,
    PanelGrid,
    key,
    legend_px,
    listed,
    log_axis,
    message,
    on_axes,
    rule,
    scatter,
)
from simulator.explore.predictions import curves, predictions, services
from simulator.explore.state import State
from simulator.figures.panels import device, roof_of, steps_of
from simulator.figures.roofline import Roof, common_ranges, drawn, merged
from simulator.figures.style import BLUE, COLORS, GREEN, GREY, VERMILLION
from simulator.figures.titles import device_title
from simulator.figures.waterfall import NEGLIGIBLE, Steps, common_range, folded
from simulator.prediction.scenario import once
from simulator.units import rate

if TYPE_CHECKING:
    from simulator.prediction.explain import Explanation

CARDS = {
    "speedup": "Speedup over sparsity",
    "over": "Speedup over batch or sequence",
    "roofline": "Roofline",
    "waterfall": "Loss waterfall",
    "latency": "Throughput over latency",
    "crossover": "Crossover map",
}
"""Titles of the figures by name."""


def charts(state: State, most: int) -> dict[str, Chart]:
    """Draw the figures of a state except the map, with at most ``most`` panels per row."""
    found = predictions(state)
    if found.problem:
        return {name: message(found.problem) for name in CARDS if name != "crossover"}
    over = curves(state, state.over)
    key, details = state.explained, found.details
    about = key if (pruned := state.load_pruned()) is None else pruned.name
    why = message(next((n for n in found.notes if n.startswith((key, about))), "nothing to draw"))
    return {
        "speedup": speedup_chart(found.candidates, state, sparsities(found.candidates, state.at), most),
        "over": speedup_chart(over.candidates, state, sizes(state), most) if over.candidates else message(over.problem),
        "roofline": roofline_chart(details, most) if details else why,
        "waterfall": waterfall_chart(details, found.versus, most) if details else why,
        "latency": _latency_chart(state, most) or why,
    }


def _latency_chart(state: State, most: int) -> Chart | None:
    """Draw throughput over latency, of a serve over its concurrencies; None without predictions."""
    if state.phase == "serve":
        found = services(state)
        return (
            latency_chart(over_concurrency(found.found, state), state, most) if found.found else message(found.problem)
        )
    if state.phase == "prefill":
        return message("a prefill generates no tokens")
    served = [c for c in curves(state, "batch").candidates if c.key == state.explained]
    return latency_chart(over_batches(served, state), state, most) if served else None


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
