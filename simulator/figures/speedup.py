"""Draw speedup over batch, length or sparsity, and throughput of services over their time per
token.

A few candidates are curves with interval bands, and with bounds if they are one or two: a row of
panels per setting, a column per device and engine, and a ring at the first value from which a
candidate pays. More candidates, or single values, are dots: a panel per setting, a line of text per
candidate and value, and on it a dot per device.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray

from simulator.arrays import FloatArray
from simulator.figures import layout
from simulator.figures.style import (
    COLORS,
    DENSE,
    GREY,
    INK,
    PALE_INK,
    Style,
    in_order,
    label,
    paper_style,
    styles_of,
)
from simulator.models.library import model_title
from simulator.prediction.requests import batch_name
from simulator.prediction.result import Result
from simulator.prediction.sentences import GAIN, LIMITS
from simulator.prediction.service import OperatingPoint, Service

# most candidates drawn as curves with bands (more become dots), and with bounds
MOST_CURVES, MOST_BOUNDED = 4, 2

# fields that speedup is drawn over, and labels of their axes
AXES: Mapping[str, str] = MappingProxyType(
    {"batch": "batch", "seq": "sequence (tokens)", "sparsity": "removed (%)"}
)
PAYS = "pays from here (interval above 1)"  # label of the rings
PAGE_HEIGHT_IN = 9.0  # height of a page's text, inches
MOST_ACROSS = 4  # panels of dots per row
MOST_VALUES = 5  # values of a field other than the axis: each has a row of panels
LINE = 0.055  # height of a name next to a curve of throughput, as a share of a panel's height

# minimum height of a line of text and of a dot, inches; on a page with less, dots become curves
# without bands
LEAST_LINE_IN, LEAST_DOT_IN = 0.1, 0.04

# upper bounds: attribute of a result, line of curves, colour of ticks
BOUNDS = {
    "FLOP bound": ("flop_bound", (0, (1, 1)), GREY),
    "roofline bound": ("roofline_bound", (0, (5, 1.5)), "black"),
}
_BAND: dict[str, Any] = {"alpha": 0.16, "linewidth": 0}
_NOMINAL: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (3, 1, 1, 1))}
_RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 7.5,
    "markerfacecolor": "none",
    "linestyle": "none",
}
_LIMIT_RING: dict[str, Any] = {**_RING, "markersize": 8, "markeredgewidth": 0.9}


def speedups_of(results: Sequence[Result]) -> Figure:
    """Draw speedups over the field of :func:`varying`; each setting of other fields has its
    panels."""
    axis = varying(results)
    # a pruning has several sparsities in one scenario only if these were asked for: a budget's
    # follows from the length
    scenarios = [
        (_name(r), r.model, r.hardware, r.engine, r.phase, r.batch, r.seq, r.new_tokens)
        for r in results
    ]
    swept = any(len(found) > 1 for found in _sets(scenarios, results, "sparsity"))
    fields = ["batch", "seq", *(["sparsity"] if swept else [])]
    results, omitted = _of_few_settings(results, [field for field in fields if field != axis])
    removed = swept and len(_values(results, "sparsity")) > 1  # each sparsity has a row of panels
    models = [model_title(name) for name in dict.fromkeys(r.model for r in results)]
    note = ", ".join(filter(None, [*(models if len(models) == 1 else ()), omitted]))
    titles = _names(results, axis, removed)
    found = layout.columns(results, at=axis, **layout.SPEEDUP) | {"candidate": titles}
    found |= layout.placed(results, [_setting(r, results, axis, removed) for r in results])
    found |= layout.columns(
        results, **{name: attribute for name, (attribute, *_) in BOUNDS.items()}
    )
    data, interval = layout.arrays(found), layout.interval(results[0].level)
    names, (settings, devices) = (
        in_order(data["candidate"]),
        (list(dict.fromkeys(data[n])) for n in ("row", "column")),
    )
    looks = styles_of(dict(zip(titles, (r.family for r in results))))
    styles = {name: looks[name] for name in names}
    pairs = [(n, v) for n in names for v in np.unique(data["at"][data["candidate"] == n]).tolist()]
    down = -(-len(settings) // MOST_ACROSS)  # rows of panels
    line = (PAGE_HEIGHT_IN - 0.8 - 0.4 * down) / (down * len(pairs))
    dots = len(names) > MOST_CURVES and line >= max(LEAST_LINE_IN, LEAST_DOT_IN * len(devices))
    with paper_style():
        if dots or len(pairs) == len(names):
            line = float(np.clip(line, LEAST_LINE_IN, 0.068 * len(devices) + 0.04))
            texts = [_line(pairs, i, axis) for i in range(len(pairs))]
            return _dots(
                data, pairs, texts, line, interval, f"speedup (log scale){note and f'; {note}'}"
            )
        serves = axis == "batch" and all(r.phase == "serve" for r in results)
        x_label = f"{batch_name('serve') if serves else AXES[axis]}{note and f'; {note}'}"
        return _curves(data, styles, axis, interval, x_label)


def varying(results: Sequence[Result]) -> str:
    """Return the field with most values for a pruning, batch, seq or sparsity; sparsity if none
    varies."""
    counts = {axis: len(_values(results, axis)) for axis in ("batch", "seq", "sparsity")}
    return max(counts, key=counts.__getitem__) if max(counts.values()) > 1 else "sparsity"


def _values(results: Sequence[Result], axis: str) -> list[float]:
    """Return the values of a field over which a pruning varies, if any does; else one value."""
    sets = _sets([_name(r) for r in results], results, axis)
    return sorted(set[float]().union(*([found for found in sets if len(found) > 1] or sets[:1])))


def _sets(groups: Sequence[Any], results: Sequence[Result], axis: str) -> list[set[float]]:
    found: dict[Any, set[float]] = {}
    for group, r in zip(groups, results):
        found.setdefault(group, set()).add(getattr(r, axis))
    return list(found.values())


def _name(r: Result) -> str:
    """Return the title of a pruning without its sparsity."""
    return r.pruned or r.method or f"{label(r.family)}{r.options and f' ({r.options})'}"


def _names(results: Sequence[Result], axis: str, removed: bool) -> list[str]:
    """Return the titles of curves, with the sparsity unless it is the axis, names the panel, or
    varies."""
    names = [_name(r) for r in results]
    if axis == "sparsity" or removed:
        return names
    counts = Counter(name for name, _ in {(name, r.sparsity) for name, r in zip(names, results)})
    return [
        n if counts[n] > 1 else f"{n}, {100 * r.sparsity:.3g} %" for n, r in zip(names, results)
    ]


def _setting(r: Result, results: Sequence[Result], axis: str, removed: bool) -> str:
    """Return the label of a row of panels: the phase, and fields other than the axis that vary."""
    parts = [model_title(r.model)] if len({one.model for one in results}) > 1 else []
    parts.append(f"{r.phase} {r.new_tokens}" if r.new_tokens else r.phase)
    if axis != "batch":
        parts.append(f"{batch_name(r.phase)} {r.batch}")
    if axis != "seq" and len({one.seq for one in results}) > 1:
        parts.append(f"seq {r.seq}")
    if axis != "sparsity" and removed:
        parts.append(f"{100 * r.sparsity:.3g} % removed")
    return ", ".join(parts)


def _of_few_settings(
    results: Sequence[Result], others: Sequence[str]
) -> tuple[Sequence[Result], str]:
    """Return the results of at most :data:`MOST_VALUES` values per field, and a note on omitted
    values."""
    notes = []
    for other in others:
        values = _values(results, other)
        if len(values) <= MOST_VALUES:
            continue
        few = {values[round(i * (len(values) - 1) / (MOST_VALUES - 1))] for i in range(MOST_VALUES)}
        results = [r for r in results if getattr(r, other) in few]
        notes.append(f"{MOST_VALUES} of {len(values)} values of {other} drawn")
    return results, ", ".join(notes)


def pays_from(at: ArrayLike, lower: ArrayLike) -> int | None:
    """Return the index of the first value from which the whole interval is above 1 at every value;
    None without one."""
    x, low = np.asarray(at, dtype=float), np.asarray(lower, dtype=float)
    order = np.argsort(x, kind="stable")
    pays = np.logical_and.accumulate(low[order][::-1] >= GAIN)[::-1]
    return int(order[np.argmax(pays)]) if pays.any() else None


def _line(pairs: Sequence[tuple[str, float]], i: int, axis: str) -> str:
    """Return the text of a line: the value, on the first line of a candidate after its name."""
    name, value = pairs[i]
    named = "" if i and pairs[i - 1][0] == name else f"{label(name)}  "
    texts = {"batch": f"batch {value:.0f}", "seq": f"{layout.short(int(value))} tokens"}
    return f"{named}{texts.get(axis, f'{100 * value:.3g} %')}"


def _own(data: layout.FigurePoints, r: str, c: str, name: str) -> NDArray[np.intp]:
    rows = np.flatnonzero((data["row"] == r) & (data["column"] == c) & (data["candidate"] == name))
    ordered: NDArray[np.intp] = rows[np.argsort(data["at"][rows], kind="stable")]
    return ordered


def _range(data: layout.FigurePoints, names: Sequence[str]) -> tuple[float, float]:
    values = np.concatenate([*(data[name] for name in names), np.ones(1)])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    pad = max((high / low) ** 0.04, 1.02)
    return low / pad, high * pad


def _dots(
    data: layout.FigurePoints,
    pairs: Sequence[tuple[str, float]],
    names: Sequence[str],
    line: float,
    interval: str,
    x_label: str,
) -> Figure:
    """Draw many candidates: a line of text per candidate and value, a dot per device."""
    settings, devices = (list(dict.fromkeys(data[name])) for name in ("row", "column"))
    looks = [
        Style(*mark, hollow=i % 2 == 1) for i, mark in enumerate(zip(COLORS * 2, "osD^vPXh*<>pd"))
    ]
    tick: dict[str, Any] = {
        "marker": "|",
        "linestyle": "none",
        "markersize": 6,
        "markeredgewidth": 1.1,
    }
    handles = [
        Line2D([], [], **style.marks(linestyle="none"), label=name)
        for name, style in zip(devices, looks)
    ]
    handles.append(Line2D([], [], color=INK, linewidth=0.8, label=interval))
    handles += [
        Line2D([], [], color=color, **tick, label=name) for name, (*_, color) in BOUNDS.items()
    ]
    down = -(-len(settings) // MOST_ACROSS)
    across = -(-len(settings) // down)
    width = layout.width_of(len(settings))
    names = [layout.wrapped(name, 0.75 * width) for name in names]
    line *= max(name.count("\n") + 1 for name in names)
    # per panel, inches
    room = (width - 0.058 * max(len(part) for name in names for part in name.split("\n"))) / across
    titles = [layout.wrapped(s, room) for s in settings]
    above = 0.13 * max(t.count("\n") + 1 for t in titles)
    height = max(len(pairs) * line, 0.3) + 0.2 + above
    look: dict[str, Any] = {"handles": handles, "legend": x_label, "sharex": True, "sharey": True}
    figure, panels, _ = layout.panel_list(len(settings), height, 0.42, across, **look)
    low, high = _range(data, ["speedup", "lower", "upper", *BOUNDS])
    slot = 0.8 / len(devices)
    size = float(np.clip(72 * line * slot * 0.75, 2.2, 3.4))
    shaded = list(dict.fromkeys(name for name, _ in pairs))[::2]
    for i, (ax, setting, title) in enumerate(zip(panels, settings, titles)):
        ax.set(xscale="log", xlim=(low, high), ylim=(len(pairs) - 0.5, -0.5))
        ax.set_title(title, pad=4)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelbottom=i + across >= len(settings))
        ax.spines["left"].set_visible(False)
        ax.axvline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for place, (name, _) in enumerate(pairs):
            if name in shaded:
                ax.axhspan(place - 0.5, place + 0.5, color="#F0F0F0", linewidth=0, zorder=0)
        for k, (name, style) in enumerate(zip(devices, looks)):
            own = np.flatnonzero((data["row"] == setting) & (data["column"] == name))
            y = np.array(
                [pairs.index(p) for p in zip(data["candidate"][own], data["at"][own])], dtype=float
            )
            y += (k - 0.5 * (len(devices) - 1)) * slot
            for bound, (*_, color) in BOUNDS.items():
                ax.vlines(
                    data[bound][own],
                    y - 0.5 * slot,
                    y + 0.5 * slot,
                    color=color,
                    linewidth=0.9,
                    zorder=2,
                )
            ax.hlines(
                y,
                data["lower"][own],
                data["upper"][own],
                color=style.color,
                linewidth=0.8,
                zorder=3,
            )
            ax.plot(
                data["speedup"][own], y, **style.marks(linestyle="none", markersize=size, zorder=4)
            )
        ax.set_yticks(range(len(pairs)), names)
        layout.log_axis(ax.xaxis, low, high, int(np.clip(room / 0.25, 2, 12)))
    return layout.laid_out(figure)


def _curves(
    data: layout.FigurePoints, styles: Mapping[str, Style], axis: str, interval: str, x_label: str
) -> Figure:
    """Draw at most MOST_BOUNDED candidates with bands, rings and bounds, MOST_CURVES without
    bounds, more as lines."""
    few = len(styles) <= MOST_CURVES
    bounds, band = (
        (BOUNDS, _BAND) if len(styles) <= MOST_BOUNDED else ({}, {**_BAND, "alpha": 0.08})
    )
    rings = few and any(
        pays_from(data["at"][own], data["lower"][own]) is not None
        for r, c, name in set(zip(data["row"], data["column"], data["candidate"]))
        if len(own := _own(data, r, c, name)) > 1
    )
    rows, across = (len(set(data[name])) for name in ("row", "column"))
    width = layout.width_of(rows * across)
    texts = {name: layout.wrapped(label(name), 0.9 * width) for name in styles}
    handles: list[Any] = [
        Line2D([], [], **style.marks(), label=texts[name]) for name, style in styles.items()
    ]
    for name, (_, line, _) in bounds.items():
        handles.append(Line2D([], [], color=INK, linestyle=line, linewidth=0.8, label=name))
    if few:
        handles.append(Patch(color=INK, **_BAND, label=interval))
    if axis == "sparsity":
        handles.append(Line2D([], [], **_NOMINAL, label="nominal 1 / (1 - s)"))
    if rings:
        handles.append(Line2D([], [], **_RING, markeredgecolor=INK, label=PAYS))
    low, high = _range(data, ["speedup", "lower", "upper", *bounds] if few else ["speedup"])
    room = PAGE_HEIGHT_IN - 0.5 - 0.14 * layout.legend_lines(handles, width)
    panel_in = float(np.clip(room / rows, 0.7, 1.6))
    # fit the height of a panel
    titles = {r: textwrap.fill(r, max(8, int(panel_in / 0.058))) for r in data["row"]}
    look: dict[str, Any] = {
        "handles": handles,
        "legend": x_label,
        "names": titles,
        "sharex": True,
        "sharey": True,
    }
    figure, panels = layout.panel_grid(data, panel_in, 0.5, width_in=width, **look)
    for (r, c), ax in panels.items():
        ax.set(yscale="log", ylim=(low, high))
        ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for name, style in styles.items():
            own = _own(data, r, c, name)
            x, speedup, lower, upper = (
                data[column][own] for column in ("at", "speedup", "lower", "upper")
            )
            if few:
                ax.fill_between(x, lower, upper, color=style.color, **band, zorder=2)
                if not bounds:  # where three bands overlap, lines show the ends of each
                    ax.plot(
                        x,
                        np.stack([lower, upper], axis=1),
                        color=style.color,
                        linewidth=0.5,
                        zorder=2.2,
                    )
                for bound, (_, line, _) in bounds.items():
                    ax.plot(
                        x,
                        data[bound][own],
                        color=style.color,
                        linestyle=line,
                        linewidth=0.8,
                        zorder=2.5,
                    )
                if len(own) == 1:  # neither a band nor a line
                    ax.vlines(x, lower, upper, color=style.color, alpha=0.5, linewidth=1.5)
                    for bound in bounds:
                        ax.scatter(
                            x, data[bound][own], color=style.color, marker="_", s=36, zorder=2.5
                        )
                elif (first := pays_from(x, lower)) is not None:
                    ax.plot(
                        x[[first]],
                        speedup[[first]],
                        **_RING,
                        markeredgecolor=style.color,
                        zorder=4.5,
                    )
            ax.plot(x, speedup, **style.marks(), zorder=4)
        if axis == "sparsity":
            removed = np.linspace(data["at"].min(), data["at"].max(), 100)
            ax.plot(removed, 1.0 / (1.0 - removed), **_NOMINAL, zorder=1.8)
        layout.log_axis(ax.yaxis, low, high, 7)
    _value_axes(panels, np.unique(data["at"]).astype(float), axis, (width - 0.6) / across)
    return layout.laid_out(figure, "speedup (log scale)")


def _value_axes(
    panels: layout.Panels, values: NDArray[np.float64], axis: str, room_in: float
) -> None:
    """Put ticks at the values of the x axes, as many as there is room for: in per cent, or on a
    logarithmic axis."""
    low, high = float(values[0]), float(values[-1])
    ticks = values[:: -(-len(values) // max(2, int(room_in / 0.26)))]

    def text(value: float, _: object) -> str:
        texts = {"batch": f"{value:.0f}", "seq": layout.short(int(value))}
        return texts.get(axis, f"{100 * value:.4g}")

    for ax in panels.values():
        if axis == "sparsity":
            margin = max(0.06 * (high - low), 0.01)
            ax.set_xlim(low - margin, high + margin)
        else:
            ax.set_xscale("log", base=2)
            margin = max(high / low, 2.0) ** 0.05
            ax.set_xlim(low / margin, high * margin)
        layout.fixed_ticks(ax.xaxis, ticks.tolist(), text)


def services_of(services: Sequence[Service]) -> Figure:
    """Draw the throughput of services over their time per output token, one panel each, from a
    single request (bottom left) to as many as fit, which the name of a curve states."""
    engines, devices = (
        len({getattr(s.points[0], name) for s in services}) for name in ("engine", "hardware")
    )
    first = services[0].points[0]
    model = "" if len(services) > 1 else f"{model_title(first.model)}, "
    many = f"{first.devices} × " if first.devices > 1 else ""
    curves = [_throughputs(service) for service in services]
    with paper_style():
        most: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": INK, "markersize": 5.5}
        handles: list[Any] = [Line2D([], [], **most, label="as many as fit (number)")]
        if any(_within(service) for service in services):
            handles.append(
                Line2D([], [], **_LIMIT_RING, markeredgecolor=INK, label="most within the limits")
            )
        handles.append(
            Patch(color=INK, alpha=0.12, linewidth=0, label=layout.interval(first.level))
        )
        look: dict[str, Any] = {"handles": handles, "sharex": True, "sharey": True}
        figure, axes, columns = layout.panel_list(
            len(services), 2.3, 0.35, layout.across(devices, engines), **look
        )
        every = [
            np.concatenate([curve[i].ravel() for some in curves for curve in some.values()])
            for i in (0, 1)
        ]
        pads = [float(values.max() / values.min()) ** 0.05 for values in every]
        ranges = [(float(v.min()) / pad, float(v.max()) * pad) for v, pad in zip(every, pads)]
        room_in = layout.width_of(len(services)) / columns - 0.4
        for i, (ax, service, some) in enumerate(zip(axes, services, curves)):
            ax.set(xscale="log", yscale="log", xlim=ranges[0], ylim=ranges[1])
            ax.set_title(
                layout.wrapped(f"{model}{many}{layout.device(service.points[0])}", room_in), pad=5
            )
            ax.set_xlabel("time per output token (ms)", labelpad=2)
            ax.set_ylabel("tokens/s per GPU" if i % columns == 0 else "")
            layout.log_axis(ax.xaxis, *ranges[0], 6)
            layout.log_axis(ax.yaxis, *ranges[1], 6)
            _draw_throughputs(ax, service, some)
            _name_throughputs(ax, service, some)
        return layout.laid_out(figure)


def _throughputs(service: Service) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Return time per output token, ms, and tokens/s per GPU of each model: prediction, lower and
    upper end (3, n)."""
    columns = (
        "tpot_s",
        "tpot_lower",
        "tpot_upper",
        "tokens_per_s",
        "tokens_per_s_lower",
        "tokens_per_s_upper",
    )
    out = {}
    for name in dict.fromkeys(p.name for p in service.curve):
        points = [p for p in service.curve if p.name == name]
        values = np.array([[getattr(p, column) for p in points] for column in columns], dtype=float)
        out[name] = 1e3 * values[:3], values[3:]
    return out


def _within(service: Service) -> dict[str, OperatingPoint]:
    return {p.name: p for p in service.kinds.get(LIMITS, ()) if p.concurrency}


def _draw_throughputs(
    ax: Axes, service: Service, curves: Mapping[str, tuple[FloatArray, FloatArray]]
) -> None:
    if (limit_s := service.limits.tpot_s) is not None:
        ax.axvline(1e3 * limit_s, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=1.5)
        where: dict[str, Any] = {
            "rotation": 90,
            "va": "bottom",
            "ha": "right",
            "fontsize": 6,
            "color": PALE_INK,
        }
        ax.text(1e3 * limit_s, ax.get_ylim()[0] * 1.1, f"limit {1e3 * limit_s:.3g} ms", **where)
    families = {p.name: p.family for p in service.curve if p.pruning}
    styles, within = {DENSE.label: DENSE, **styles_of(families)}, _within(service)
    for name, ((x, low_x, high_x), (y, low_y, high_y)) in curves.items():
        style = styles[name]
        # a slower pass moves a point right and down
        edge = np.concatenate([low_x, high_x[::-1]]), np.concatenate([high_y, low_y[::-1]])
        ax.fill(*edge, color=style.color, alpha=0.12, linewidth=0, zorder=2)
        ax.plot(x, y, **style.marks(markersize=2.6, zorder=4))
        ax.plot(x[-1:], y[-1:], **style.marks(markersize=5.5, zorder=4.5))
        if name in within:
            point = within[name]
            ax.plot(
                1e3 * point.tpot_s,
                point.tokens_per_s,
                **_LIMIT_RING,
                markeredgecolor=style.color,
                zorder=4.5,
            )


def _name_throughputs(
    ax: Axes, service: Service, curves: Mapping[str, tuple[FloatArray, FloatArray]]
) -> None:
    """Write the names of the curves right of the panel, with lines to their ends."""
    (left, right), (low, high) = np.log(ax.get_xlim()), np.log(ax.get_ylim())
    edge = float(np.exp(left + 1.02 * (right - left)))
    most = {p.name: p.concurrency for p in service.curve}  # at the last point
    ends = [
        (float(np.log(rate[0, -1]) - low) / (high - low), name)
        for name, (_, rate) in curves.items()
    ]
    height = 1.0 + LINE
    for place, name in sorted(ends, key=lambda end: -end[0]):
        height = min(place, height - LINE)
        ax.text(
            1.03,
            height,
            f"{name} ({most[name]:,})",
            transform=ax.transAxes,
            va="center",
            fontsize=6,
        )
        to = float(np.exp(low + height * (high - low)))
        line: dict[str, Any] = {"color": GREY, "linewidth": 0.4, "clip_on": False, "zorder": 3}
        ax.plot([curves[name][0][0, -1], edge], [curves[name][1][0, -1], to], **line)
