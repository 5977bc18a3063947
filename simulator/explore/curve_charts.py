"""Draw curves with their intervals, one panel per GPU: speedups over an axis, and throughput over latency.

Use :func:`speedup_chart` with a :class:`CurveAxis` (:func:`sparsities`, :func:`sizes`), and :func:`latency_chart` with
the models of :func:`over_batches` or, of a serve, :func:`over_concurrency`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.errors import one_line
from simulator.explore.layout import (
    LINES,
    QUIET,
    SMALL,
    SOFT,
    Chart,
    Dict,
    PanelGrid,
    faded,
    legend_px,
    listed,
    log_axis,
    marker_of,
    message,
    rule,
    scatter,
)
from simulator.explore.state import AXES, EXISTING
from simulator.figures.layout import short
from simulator.figures.style import BLACK, COLORS, DENSE, GREEN, ORANGE, SKY, STYLES, Style, in_order
from simulator.figures.titles import device_title
from simulator.prediction.operating import LIMITS
from simulator.prediction.scenario import batch_name, once
from simulator.units import percent, ratio

if TYPE_CHECKING:
    from simulator.arrays import Array, FloatArray
    from simulator.explore.predictions import Candidate
    from simulator.explore.state import State
    from simulator.prediction.operating import Service
    from simulator.prediction.result import Result

MOST_BANDS = 6
"""Maximum number of curves with an interval band each; of more curves, only the one in detail has a band."""

# fmt: off
BOUNDS = (
    ("flop_bound", "FLOP bound", "dot"), ("byte_bound", "byte bound", "dashdot"),
    ("roofline_bound", "roofline bound", "dash"),
)
# fmt: on

X_TITLE = "requested sparsity (%)"
"""Title of the axis of sparsities; the sparsity of an existing pruned model is the share of parameters removed."""

_EXISTING = Style(BLACK, "*", "-.")
_TEXTS = tuple(Style(color, "<>"[i % 2], "-.") for i, color in enumerate((GREEN, ORANGE, SKY, BLACK, *COLORS)))
"""Styles of texts of ``--prune``; no family has these markers, and common families have other colours."""

_ALONE = {"dot": "line-ew-open", "dashdot": "line-ne-open", "dash": "line-nw-open"}
"""Markers of bounds at a single point."""


def look_of(key: str, state: State) -> Style:
    """Return the style of a family, the existing pruned model or a text of ``--prune``: the same in all figures."""
    return STYLES.get(key) or (_EXISTING if key == EXISTING else _TEXTS[state.texts.index(key)])


def name_of(c: Candidate) -> str:
    """Return the name of a candidate, short enough for a legend on a phone."""
    return escape(one_line(c.title, 30), quote=False)


# -- speedups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveAxis:
    """An axis of speedups: its title, the value of a result, Plotly's axis, the state's value, and the bounds that are
    drawn of the candidate in detail."""

    title: str
    value: Callable[[Result], float]
    layout: Dict
    at: float
    bounds: tuple[tuple[str, str, str], ...] = ()


def sparsities(candidates: Sequence[Candidate], at: float) -> CurveAxis:
    """Return the axis of requested sparsities of candidates, with bounds."""
    fractions = sorted({c.result.sparsity for c in candidates})
    margin = max(0.04 * (fractions[-1] - fractions[0]), 0.02)
    layout = {"range": [100 * (fractions[0] - margin), 100 * (fractions[-1] + margin)], "nticks": 9}
    return CurveAxis(X_TITLE, lambda r: 100 * r.sparsity, layout, 100 * at, BOUNDS)


def sizes(state: State) -> CurveAxis:
    """Return the axis of batches or sequences of a state."""
    values = AXES[state.over]
    layout = {"type": "log", "range": [math.log10(values[0] / 1.25), math.log10(values[-1] * 1.25)]}
    layout |= listed(values, list(map(short if state.over == "seq" else str, values)))
    if state.over == "seq":
        return CurveAxis("sequence", lambda r: r.seq, layout, state.seq)
    return CurveAxis(batch_name(state.phase), lambda r: r.batch, layout, state.batch)


def speedup_chart(candidates: Sequence[Candidate], state: State, axis: CurveAxis, most: int) -> Chart:
    """Draw a curve with its interval per candidate over an axis; a candidate with one value is a point. The bounds of
    the candidate in detail are lines, and so is the state's value."""
    gpus, keys = once(c.result.hardware for c in candidates), in_order(c.key for c in candidates)
    names, detail = {c.key: name_of(c) for c in candidates}, state.explained
    bounds, of_whom = axis.bounds if detail in names else (), names[detail] if detail in STYLES else "pruned model"
    texts = [*(names[key] for key in keys), *(f"{title} ({of_whom})" for _, title, _ in bounds)]
    frame = PanelGrid(list(map(device_title, gpus)), most, 200, bottom=legend_px(texts, len(gpus), most))
    values = [1.0, *(v for _, r in candidates for v in (r.speedup, r.speedup_lower, r.speedup_upper))]
    values += [getattr(r, bound) for key, r in candidates if key == detail for bound, _, _ in bounds]
    y = log_axis(min(values) / 1.03, max(values) * 1.03, 6)
    data: list[Dict] = []
    shapes: list[Dict] = []
    for panel, gpu in enumerate(gpus):
        for key in sorted(keys, key=lambda key: key == detail):  # the candidate in detail on top
            own = sorted((r for k, r in candidates if k == key and r.hardware == gpu), key=axis.value)
            if not own:
                continue
            look = look_of(key, state)
            if len(own) > 1 and (len(keys) <= MOST_BANDS or key == detail):
                at = [axis.value(r) for r in own]
                edge = [r.speedup_upper for r in own] + [r.speedup_lower for r in reversed(own)]
                data.append(_area(at + at[::-1], edge, panel, look, 0.22 if key == detail else 0.13, key))
            if key == detail:
                data += _bounds(own, of_whom, panel, axis, bounds)
            data.append(_curve(own, names[key], panel, axis, look, key, key == detail, 1000 + keys.index(key)))
        shapes.append(rule(panel, "y", 1, SOFT, 1, layer="below"))
        shapes.append(rule(panel, "x", axis.at, "#c3cad4", 1.5, layer="below"))
    x = [axis.layout] * len(gpus)
    return frame.chart(_named_once(data), x, [y] * len(gpus), axis.title, "speedup", shapes=shapes)


def _named_once(data: list[Dict]) -> list[Dict]:
    """Let the legend name each group of traces once."""
    named: set[str] = set()
    for trace in data:
        if "name" in trace:
            trace["showlegend"] = trace["legendgroup"] not in named
            named.add(trace["legendgroup"])
    return data


def _area(x: Iterable[float], y: Iterable[float], panel: int, look: Style, opacity: float, group: str) -> Dict:
    """Return the area of an interval, from its outline."""
    style: Dict = {"fill": "toself", "line": {"width": 0}, "fillcolor": faded(look.color, opacity)}
    return scatter(panel, "lines", x, y, legendgroup=group, **style, **QUIET)


def _bounds(
    own: Sequence[Result], name: str, panel: int, axis: CurveAxis, bounds: Sequence[tuple[str, str, str]]
) -> list[Dict]:
    mode = "lines" if len(own) > 1 else "markers"
    out = []
    for bound, title, dash in bounds:
        hover = f"{title} of {name} at %{{x:g}} %: %{{y:.3f}}<extra></extra>"
        style: Dict = {"line": {"color": BLACK, "dash": dash, "width": 1.2}, "hovertemplate": hover}
        style["marker"] = {"symbol": _ALONE[dash], "color": BLACK, "size": 10}
        style |= {"name": f"{title} ({name})", "legendgroup": bound, "legendrank": 2000}
        out.append(scatter(panel, mode, map(axis.value, own), [getattr(r, bound) for r in own], **style))
    return out


def _curve(
    own: Sequence[Result], name: str, panel: int, axis: CurveAxis, look: Style, group: str, detail: bool, rank: int
) -> Dict:
    """Return the points of one candidate on one GPU, joined; a single point has its interval, and a point is pale if
    the dense model exceeds the memory."""
    ends: Dict = {"type": "data", "symmetric": False, "color": look.color, "thickness": 1.2, "width": 4}
    ends |= {"array": [r.speedup_upper - r.speedup for r in own], "visible": len(own) == 1}
    ends["arrayminus"] = [r.speedup - r.speedup_lower for r in own]
    more: Dict = {"name": name, "legendgroup": group, "legendrank": rank, "error_y": ends}
    more["marker"] = {**marker_of(look, 9 if detail else 7), "opacity": [1 if r.dense_fits else 0.35 for r in own]}
    more["line"] = {"color": look.color, "dash": LINES[look.line], "width": 2.6 if detail else 1.8}
    more |= {"text": [_hover(r, name) for r in own], "hovertemplate": "%{text}<extra></extra>"}
    mode = "lines+markers" if len(own) > 1 else "markers"
    return scatter(panel, mode, map(axis.value, own), [r.speedup for r in own], **more)


def _hover(r: Result, name: str) -> str:
    """Return the hover text of a point."""
    rounded = f"{percent(r.sparsity)} requested, {percent(r.realised_sparsity)} realised"
    removed = f"{percent(r.sparsity)} of the parameters removed ({r.family})" if r.pruned else rounded
    memory = "" if r.dense_fits else "<br>the dense model exceeds the memory"
    return (
        f"<b>{name}</b>, {device_title(r.hardware)}: {removed}<br>{batch_name(r.phase)} {r.batch}, sequence {r.seq}: "
        f"{ratio(r.speedup)} ({percent(r.level)} interval {ratio(r.speedup_lower)} to {ratio(r.speedup_upper)}), "
        f"{r.bottleneck}-bound<br>bounds: FLOP {ratio(r.flop_bound)}, byte {ratio(r.byte_bound)}, "
        f"roofline {ratio(r.roofline_bound)}{memory}"
    )


# -- throughput over latency -------------------------------------------------------------------------------------------


class Latency(NamedTuple):
    """A model on a GPU over batches or concurrencies (n) that fit in memory: time per token, ms, and new tokens/s per
    GPU (3, n), each as the prediction and with both ends of its interval; and the batch within limits of latency."""

    gpu: str
    title: str
    look: Style
    batch: Array
    ms: FloatArray
    rate: FloatArray
    within: int = 0  # 0: none


def over_batches(candidates: Sequence[Candidate], state: State) -> list[Latency]:
    """Return the dense model and one candidate at the batches that fit in memory, by GPU."""
    name, look = name_of(candidates[0]), look_of(candidates[0].key, state)
    out = []
    for gpu in once(r.hardware for _, r in candidates):
        own = [r for _, r in candidates if r.hardware == gpu]
        for title, style in ((DENSE.label, DENSE), (name, look)):
            rows = [
                (r.batch, r.devices, r.dense_tpot_s, r.dense_tokens_per_s, r.dense_s, r.dense_lower, r.dense_upper)
                if style is DENSE
                else (r.batch, r.devices, r.tpot_s, r.tokens_per_s, r.pruned_s, r.pruned_lower, r.pruned_upper)
                for r in own
                if (r.dense_fits if style is DENSE else r.pruned_fits)
            ]
            batch, devices, tpot, rate, *times = np.array(rows, dtype=float).reshape(-1, 7).T
            slower = np.stack(times) / times[0]  # all parts of a request scale with its time
            out.append(Latency(gpu, title, style, batch, 1e3 * tpot * slower, rate / devices / slower))
    return out


def over_concurrency(found: Sequence[Service], state: State) -> list[Latency]:
    """Return the dense model and the pruning in detail at the concurrencies that fit in memory, by GPU."""
    out, look = [], look_of(state.explained, state)
    for service in found:
        within = service.kinds.get(LIMITS, service.points)
        for name, kept in zip(dict.fromkeys(p.name for p in service.points), within):
            points = [p for p in service.curve if p.name == name]
            title, style = (escape(one_line(name, 30), quote=False), look) if kept.pruning else (DENSE.label, DENSE)
            tpot = [[p.tpot_s, p.tpot_lower, p.tpot_upper] for p in points]
            rate = [[p.tokens_per_s, p.tokens_per_s_upper, p.tokens_per_s_lower] for p in points]
            ms, rates = 1e3 * np.reshape(tpot, (-1, 3)).T, np.reshape(rate, (-1, 3)).T
            batch = np.array([p.concurrency for p in points], dtype=float)
            limited = kept.concurrency if kept.point == LIMITS else 0
            out.append(Latency(kept.hardware, title, style, batch, ms, rates, limited))
    return out


def latency_chart(found: Sequence[Latency], state: State, most: int) -> Chart:
    """Draw throughput over time per token of the dense model and of one candidate, a point per batch that fits in
    memory, a large one at the state's batch. A slower pass moves a point right and down; the band joins the ends of the
    intervals. A limit of the time per token is a line, and a ring the largest concurrency within the limits."""
    every = [one for one in found if len(one.batch)]
    if not every:
        return message("no batch fits in memory")
    gpus, names = once(one.gpu for one in found), once(one.title for one in found)
    frame = PanelGrid(list(map(device_title, gpus)), most, 200, bottom=legend_px(names, len(gpus), most))
    data = [trace for one in every for trace in _latency(one, gpus.index(one.gpu), state)]
    limit = state.tpot_ms if state.phase == "serve" else None
    shapes = [] if limit is None else [rule(i, "x", limit, SOFT, 1.2, layer="below") for i in range(len(gpus))]
    x, y = (
        log_axis(min(v.min() for v in values) / 1.15, max(v.max() for v in values) * 1.15, 5)
        for values in ([one.ms for one in every], [one.rate for one in every])
    )
    titles = "time per token (ms)", "tokens/s per GPU"
    return frame.chart(_named_once(data), [x] * len(gpus), [y] * len(gpus), *titles, shapes=shapes)


def _latency(one: Latency, panel: int, state: State) -> list[Dict]:
    """Return the band and the points of a model, and its ring."""
    x_ends, y_ends = (np.concatenate([v[1], v[2, ::-1]]).tolist() for v in (one.ms, one.rate))
    hover = [
        f"<b>{one.title}</b>, {device_title(one.gpu)}, {batch_name(state.phase)} {b:g}<br>"
        f"{t[0]:.4g} ms per token ({t[1]:.4g} to {t[2]:.4g})<br>"
        f"{v[0]:,.5g} tokens/s per GPU ({v[2]:,.5g} to {v[1]:,.5g})"
        for b, t, v in zip(one.batch.tolist(), one.ms.T.tolist(), one.rate.T.tolist())
    ]
    more: Dict = {"name": one.title, "legendgroup": one.title, "hovertext": hover}
    more["hovertemplate"] = "%{hovertext}<extra></extra>"
    more["marker"] = {**marker_of(one.look), "size": np.where(one.batch == state.batch, 12, 7).tolist()}
    more["line"] = {"color": one.look.color, "dash": LINES[one.look.line], "width": 1.8}
    if one.look is DENSE or state.phase == "serve":  # the ends have their batch
        ends_at = {0, len(one.batch) - 1}
        more["text"] = [f"  {b:g}" if i in ends_at else "" for i, b in enumerate(one.batch.tolist())]
        more |= {"textposition": "middle right", "textfont": {"size": SMALL, "color": SOFT}}
    out = [_area(x_ends, y_ends, panel, one.look, 0.18, one.title)]
    out.append(scatter(panel, "lines+markers+text", one.ms[0].tolist(), one.rate[0].tolist(), **more))
    if one.within:
        at = [float(np.exp(np.interp(one.within, one.batch, np.log(v[0])))) for v in (one.ms, one.rate)]
        ring = {"symbol": "circle-open", "size": 17, "color": one.look.color, "line": {"width": 1.6}}
        text = f"<b>{one.title}</b>: {one.within} within the limits<extra></extra>"
        quiet = {"showlegend": False, "legendgroup": one.title}
        out.append(scatter(panel, "markers", at[:1], at[1:], marker=ring, hovertemplate=text, **quiet))
    return out
