"""Draw speedup over batch, length or sparsity, and throughput of services over their time per
token.

A few candidates are curves with interval bands, and with bounds if they are one or two: a row of
panels per setting, a column per device and engine, and a ring at the first value from which a
candidate pays. More candidates, or single values, are dots: a panel per setting, a line of text per
candidate and value, and on it a dot per device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from simulator.arrays import FloatArray
from simulator.figures import layout
from simulator.figures.style import (
    COLORS,
    DENSE,
    GREY,
    INK,
    PALE_INK,
    Look,
    Style,
    in_order,
    label,
    paper_style,
    styles_of,
)
from simulator.models.library import model_title
from simulator.prediction.requests import by_key
from simulator.prediction.result import Result
from simulator.prediction.service import LIMITS, OperatingPoint, Service
from simulator.prediction.wording import GAIN

# most candidates drawn as curves with bands (more become dots), and with bounds
MOST_CURVES = 4
MOST_BOUNDED = 2

# fields that speedup is drawn over, and labels of their axes
AXES: Mapping[str, str] = {
    "batch": "batch size",
    "seq": "sequence length (tokens)",
    "sparsity": "removed (%)",
}
PAYS = "pays from here (interval > 1)"  # label of the rings
MOST_ACROSS = 4  # panels of dots per row
MOST_VALUES = 5  # values of a field other than the axis: each has a row of panels

# minimum height of a line of text and of a dot, inches; on a page with less, dots become curves
# without bands
LEAST_LINE_IN = 0.1
LEAST_DOT_IN = 0.04

# upper bounds: attribute of a result, line of curves, colour of ticks
BOUNDS = {
    "FLOP bound": ("flop_bound", (0, (1, 1)), GREY),
    "roofline bound": ("roofline_bound", (0, (5, 1.5)), "black"),
}
_NOMINAL: Look = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (3, 1, 1, 1))}
_RING: Look = {
    "marker": "o",
    "markersize": 7.5,
    "markerfacecolor": "none",
    "linestyle": "none",
}
ENDS = ("", "_lower", "_upper")  # suffixes of the names of a value and of the ends of its interval
_LIMIT_RING: Look = {**_RING, "markersize": 8, "markeredgewidth": 0.9}


@dataclass(frozen=True)
class Speedups:
    """Results as columns: candidate, value of the axis, row and column of the panel, speedups."""

    data: layout.FigurePoints
    axis: str  # field over which speedups are drawn
    styles: Mapping[str, Style]  # by candidate
    level: float  # probability of the intervals
    note: str  # title of the figure
    serves: bool  # whether all results are of serving

    @classmethod
    def of(cls, results: Sequence[Result]) -> Speedups:
        axis = varying(results)
        swept = _swept(results)
        results, omitted = _of_few_settings(results, axis, swept)
        removed = swept and len(_values(results, "sparsity")) > 1  # each sparsity has its panels
        models = list(dict.fromkeys(model_title(r.model) for r in results))
        titles = _names(results, axis, removed)
        looks = styles_of(
            {title: "" if r.method else r.family for title, r in zip(titles, results)}
        )
        bounds = {name: attribute for name, (attribute, *_) in BOUNDS.items()}
        data = layout.columns(results, at=axis, **layout.SPEEDUP, **bounds)
        data |= layout.placed(results, [_setting(r, results, axis, removed) for r in results])
        return cls(
            layout.arrays({**data, "candidate": titles}),
            axis,
            {name: looks[name] for name in in_order(titles)},
            results[0].level,
            ", ".join(filter(None, [models[0] if len(models) == 1 else "", omitted])),
            all(r.phase == "serve" for r in results),
        )

    @property
    def few(self) -> bool:
        """Whether curves have bands and rings."""
        return len(self.styles) <= MOST_CURVES

    @property
    def bounds(self) -> Mapping[str, tuple[str, Any, str]]:
        return BOUNDS if len(self.styles) <= MOST_BOUNDED else {}

    @cached_property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(self.data["row"]))

    @cached_property
    def devices(self) -> list[str]:
        return list(dict.fromkeys(self.data["column"]))

    @cached_property
    def pairs(self) -> list[tuple[str, float]]:
        """Candidates with each of their values."""
        values = {name: self.data["at"][self.data["candidate"] == name] for name in self.styles}
        return [(name, value) for name in values for value in np.unique(values[name]).tolist()]

    @cached_property
    def device_styles(self) -> dict[str, Style]:
        marks = enumerate(zip(COLORS * 2, "osD^vPXh*<>pd"))
        looks = [Style(color, marker, hollow=i % 2 == 1) for i, (color, marker) in marks]
        return dict(zip(self.devices, looks))

    def curve(self, setting: str, device: str, name: str) -> layout.FigurePoints:
        """Return the points of a candidate in a panel, by rising value."""
        data = layout.of_panel(self.data, setting, device)
        rows = np.flatnonzero(data["candidate"] == name)
        rows = rows[np.argsort(data["at"][rows], kind="stable")]
        return {column: values[rows] for column, values in data.items()}

    def range(self, names: Sequence[str]) -> tuple[float, float]:
        """Return the limits of an axis with all values of some columns."""
        return layout.padded(*(self.data[name] for name in names), [1.0])


def speedups_of(results: Sequence[Result]) -> Figure:
    """Draw speedups over the field of :func:`varying`; each setting of other fields has its
    panels."""
    speedups = Speedups.of(results)
    most = min(MOST_ACROSS, max(1, int(layout.width_of(2) / layout.LEAST_PANEL_IN)))
    many, down = len(speedups.devices), -(-len(speedups.settings) // most)  # rows of panels
    line_in = (layout.most_height() - 1.6 - 0.4 * down) / (down * len(speedups.pairs))
    dots = len(speedups.styles) > MOST_CURVES and line_in >= max(LEAST_LINE_IN, LEAST_DOT_IN * many)
    with paper_style():
        if dots or len(speedups.pairs) == len(speedups.styles):
            return _dots(
                speedups, float(np.clip(line_in, LEAST_LINE_IN, 0.068 * many + 0.04)), down
            )
        return _curves(speedups)


def varying(results: Sequence[Result]) -> str:
    """Return the field with most values for a pruning, batch, seq or sparsity; sparsity if none
    varies."""
    counts = {axis: len(_values(results, axis)) for axis in ("batch", "seq", "sparsity")}
    return max(counts, key=counts.__getitem__) if any(counts.values()) else "sparsity"


def _values(results: Sequence[Result], axis: str) -> list[float]:
    """Return the values of a field over which a pruning varies, if any does."""
    sets = ({getattr(r, axis) for r in some} for some in by_key(results, _name).values())
    return sorted(set[float]().union(*(values for values in sets if len(values) > 1)))


def _name(r: Result) -> str:
    """Return the title of a pruning without its sparsity."""
    return r.pruned or label(r.method or r.family) + (f" ({r.options})" if r.options else "")


def _names(results: Sequence[Result], axis: str, removed: bool) -> list[str]:
    """Return the titles of curves, with the sparsity unless it is the axis, names the panel, or
    varies."""
    by_name = by_key(results, _name)
    several = {name for name, some in by_name.items() if len({r.sparsity for r in some}) > 1}
    plain = by_name if axis == "sparsity" or removed else several
    return [
        name if (name := _name(r)) in plain else f"{name}, {100 * r.sparsity:.3g} %"
        for r in results
    ]


def _setting(r: Result, results: Sequence[Result], axis: str, removed: bool) -> str:
    """Return the label of a row of panels: the phase, and fields other than the axis that vary."""
    models, lengths = ({getattr(one, name) for one in results} for name in ("model", "seq"))
    seq = axis != "seq" and len(lengths) > 1
    setting = layout.setting_label(r, batch=axis != "batch", seq=seq)
    model = f"{model_title(r.model)}, " if len(models) > 1 else ""
    share = f", {100 * r.sparsity:.3g} % removed" if axis != "sparsity" and removed else ""
    return f"{model}{setting}{share}"


def _swept(results: Sequence[Result]) -> bool:
    """Return whether a pruning has several sparsities in one scenario, which it has only if these
    were requested: the sparsity of a budget follows from the length."""
    fields = ("model", "hardware", "engine", "phase", "batch", "seq", "new_tokens")
    scenarios = by_key(results, lambda r: (_name(r), *(getattr(r, name) for name in fields)))
    return any(len({r.sparsity for r in some}) > 1 for some in scenarios.values())


def _of_few_settings(
    results: Sequence[Result], axis: str, swept: bool
) -> tuple[Sequence[Result], str]:
    """Return the results of at most :data:`MOST_VALUES` values per field other than the axis, and a
    note on omitted values."""
    notes = []
    for other in ("batch", "seq", *(["sparsity"] if swept else [])):
        values = _values(results, other)
        if other == axis or len(values) <= MOST_VALUES:
            continue
        few = {values[round(i * (len(values) - 1) / (MOST_VALUES - 1))] for i in range(MOST_VALUES)}
        results = [r for r in results if getattr(r, other) in few]
        notes.append(f"{MOST_VALUES} of {len(values)} values of {other} drawn")
    return results, ", ".join(notes)


def pays_from(lower: ArrayLike) -> int | None:
    """Return the index of the first value from which the whole interval is above 1 at every value;
    None without one."""
    pays = np.logical_and.accumulate(np.asarray(lower)[::-1] >= GAIN)[::-1]
    return int(pays.argmax()) if pays.any() else None


def _lines(speedups: Speedups, width_in: float) -> list[str]:
    """Return the texts of lines: the value, on the first line of a candidate after its name."""
    texts, named = [], set[str]()
    for name, value in speedups.pairs:
        values = {"batch": f"batch {value:.0f}", "seq": f"{layout.short(int(value))} tokens"}
        text = values.get(speedups.axis, f"{100 * value:.3g} %")
        texts.append(layout.wrapped(text if name in named else f"{label(name)}  {text}", width_in))
        named.add(name)
    return texts


def _dots(speedups: Speedups, line_in: float, down: int) -> Figure:
    """Draw many candidates: a line of text per candidate and value, a dot per device."""
    across = -(-len(speedups.settings) // down)
    width = layout.width_of(len(speedups.settings))
    names = _lines(speedups, 0.75 * width)
    line_in *= layout.lines_of(names)
    beside_in = 0.058 * max(len(part) for name in names for part in name.split("\n"))
    figure, panels = layout.panel_list(
        len(speedups.settings),
        max(len(names) * line_in, 0.3) + 0.2,
        0.42,
        across,
        titles=speedups.settings,
        beside_in=beside_in,
        handles=_dot_handles(speedups),
        legend="speedup (log scale)",
        title=speedups.note,
        fixed=True,
        sharex=True,
        sharey=True,
    )
    limits = speedups.range(["speedup", "lower", "upper", *BOUNDS])
    for ax, setting in zip(panels, speedups.settings):
        _empty_lines(ax, [name for name, _ in speedups.pairs])
        _draw_dots(ax, speedups, setting, line_in)
        most = int(np.clip((width - beside_in) / across / 0.25, 2, 12))
        layout.log_axis(ax, "x", most, limits)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
    return layout.laid_out(figure)


def _dot_handles(speedups: Speedups) -> list[Any]:
    tick: Look = {"linestyle": "none", "marker": "|", "markersize": 6, "markeredgewidth": 1.1}
    bounds = [layout.entry(n, color=color, **tick) for n, (*_, color) in BOUNDS.items()]
    devices = layout.marks(speedups.device_styles, linestyle="none")
    return [*devices, layout.bar(speedups.level), *bounds]


def _empty_lines(ax: Axes, candidates: Sequence[str]) -> None:
    """Draw the lines of a panel of dots: every other candidate is shaded."""
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.axvline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    shaded = list(dict.fromkeys(candidates))[::2]
    for place, name in enumerate(candidates):
        if name in shaded:
            ax.axhspan(place - 0.5, place + 0.5, color="#F0F0F0", zorder=0)


def _draw_dots(ax: Axes, speedups: Speedups, setting: str, line_in: float) -> None:
    many = len(speedups.devices)
    slot = 0.8 / many
    size = float(np.clip(72 * line_in * slot * 0.75, 2.2, 3.4))
    for k, (device, style) in enumerate(speedups.device_styles.items()):
        data = layout.of_panel(speedups.data, setting, device)
        lines = map(speedups.pairs.index, zip(data["candidate"], data["at"]))
        y = np.array([*lines], dtype=float) + (k - 0.5 * (many - 1)) * slot
        for bound, (*_, color) in BOUNDS.items():
            place = data[bound], y - 0.5 * slot, y + 0.5 * slot
            ax.vlines(*place, color=color, linewidth=0.9, zorder=2)
        marks = style.marks(linestyle="none", markersize=size)
        ends = data["lower"], data["upper"]
        layout.with_intervals(ax, data["speedup"], y, ends, across=True, **marks)


def _curve_handles(speedups: Speedups, width_in: float) -> list[Any]:
    handles = layout.marks(
        {layout.wrapped(label(n), 0.9 * width_in): style for n, style in speedups.styles.items()}
    )
    for name, (_, line, _) in speedups.bounds.items():
        handles.append(layout.entry(name, color=INK, linestyle=line, linewidth=0.8))
    if speedups.few:
        handles.append(layout.band(speedups.level))
    if speedups.axis == "sparsity":
        handles.append(layout.entry("nominal 1 / (1 - s)", **_NOMINAL))
    data = speedups.data
    curves = (speedups.curve(*c) for c in {*zip(data["row"], data["column"], data["candidate"])})
    pay = (pays_from(c["lower"]) is not None for c in curves if len(c["at"]) > 1)
    if speedups.few and any(pay):
        handles.append(layout.entry(PAYS, **_RING, markeredgecolor=INK))
    return handles


def _curves(speedups: Speedups) -> Figure:
    """Draw at most MOST_BOUNDED candidates with bands, rings and bounds, MOST_CURVES without
    bounds, more as lines."""
    speedups = replace(speedups, data=layout.fitted(speedups.data))
    across = len(speedups.devices)
    width = layout.width_of(len(speedups.settings) * across)
    handles = _curve_handles(speedups, width)
    room = layout.most_height() - 1.0 - 0.14 * layout.legend_lines(handles, width)
    served = speedups.serves and speedups.axis == "batch"
    figure, panels = layout.panel_grid(
        speedups.data,
        float(np.clip(room / len(speedups.settings), 0.7, 1.6)),
        0.5,
        width_in=width,
        handles=handles,
        legend="requests in flight" if served else AXES[speedups.axis],
        title=speedups.note,
        sharex=True,
        sharey=True,
    )
    shown = ["speedup", *(("lower", "upper", *speedups.bounds) if speedups.few else ())]
    limits = speedups.range(shown)
    for panel, ax in panels.items():
        layout.log_axis(ax, "y", 7, limits)
        ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for name, style in speedups.styles.items():
            _curve(ax, speedups, speedups.curve(*panel, name), style)
    _value_axes(panels, np.unique(speedups.data["at"]), speedups.axis, (width - 0.6) / across)
    return layout.laid_out(figure, "speedup (log scale)")


def _curve(ax: Axes, speedups: Speedups, data: layout.FigurePoints, style: Style) -> None:
    """Draw one candidate in a panel."""
    x, speedup, lower, upper = (data[name] for name in ("at", "speedup", "lower", "upper"))
    color: Look = {"color": style.color}
    if speedups.few and len(x) == 1:  # neither a band nor a line
        layout.with_intervals(ax, x, speedup, (lower, upper), **style.marks())
        return
    if speedups.few:
        alpha = 0.16 if speedups.bounds else 0.08
        ax.fill_between(x, lower, upper, **color, alpha=alpha, zorder=2)
        if not speedups.bounds:  # where three bands overlap, lines show the ends of each
            ax.plot(x, np.stack([lower, upper], axis=1), **color, linewidth=0.5, zorder=2.2)
        for bound, (_, line, _) in speedups.bounds.items():
            ax.plot(x, data[bound], **color, linestyle=line, linewidth=0.8, zorder=2.5)
        if (first := pays_from(lower)) is not None:
            ring = {**_RING, "markeredgecolor": style.color}
            ax.plot(x[[first]], speedup[[first]], **ring, zorder=4.5)
    ax.plot(x, speedup, **style.marks(), zorder=4)


def _value_axes(panels: layout.Panels, values: FloatArray, axis: str, room_in: float) -> None:
    """Put ticks at the values of the x axes, as many as there is room for: in per cent with the
    nominal speedups, or on a logarithmic axis."""
    low, high = float(values[0]), float(values[-1])
    ticks = values[:: -(-len(values) // max(2, int(room_in / 0.26)))]
    texts = {"batch": layout.plain, "seq": lambda value, _=None: layout.short(int(value))}
    text = texts.get(axis, lambda value, _=None: f"{100 * value:.4g}")
    for ax in panels.values():
        if axis == "sparsity":
            removed = np.linspace(low, high, 100)
            ax.plot(removed, 1.0 / (1.0 - removed), **_NOMINAL, zorder=1.8)
            margin = max(0.06 * (high - low), 0.01)
            ax.set_xlim(low - margin, high + margin)
        else:
            ax.set_xscale("log", base=2)
            ax.set_xlim(layout.padded(values))
        layout.fixed_ticks(ax.xaxis, ticks.tolist(), text)


def services_of(services: Sequence[Service]) -> Figure:
    """Draw the throughput of services over their time per output token, one panel each, from a
    single request (bottom left) to as many as fit, which a number next to the curve states."""
    points = [service.points[0] for service in services]
    about = "" if len(services) > 1 else f"{model_title(points[0].model)}, "
    about += f"{points[0].devices} × " if points[0].devices > 1 else ""
    curves = [_throughputs(service) for service in services]
    with paper_style():
        figure, axes = layout.panel_list(
            len(services),
            2.3,
            0.35,
            layout.across(len({p.hardware for p in points}), len({p.engine for p in points})),
            titles=[about + layout.device(p) for p in points],
            x_label="time per output token (ms)",
            y_label="tokens/s per GPU",
            handles=_service_handles(services),
            sharex=True,
            sharey=True,
        )
        for i, name in enumerate("xy"):
            limits = layout.padded(*(c[i] for some in curves for c in some.values()))
            for ax in axes:
                layout.log_axis(ax, name, 6, limits)
        for ax, service, some in zip(axes, services, curves):
            _draw_throughputs(ax, service, some)
        layout.laid_out(figure)
        for ax, service, some in zip(axes, services, curves):
            _name_throughputs(ax, service, some)
    return figure


def _service_handles(services: Sequence[Service]) -> list[Any]:
    most: Look = {"linestyle": "none", "marker": "o", "color": INK, "markersize": 5.5}
    handles = [
        *layout.marks({n: style for s in services for n, style in _service_styles(s).items()}),
        layout.entry("as many as fit (number)", **most),
    ]
    if any(_within(service) for service in services):
        ring = {**_LIMIT_RING, "markeredgecolor": INK}
        handles.append(layout.entry("most within the limits", **ring))
    return [*handles, layout.band(services[0].points[0].level)]


def _service_styles(service: Service) -> dict[str, Style]:
    families = {
        label(p.name): p.family if p.prune.partition(" ")[0] in ("", p.family) else ""
        for p in service.curve
        if p.pruning
    }
    return {DENSE.label: DENSE, **styles_of(families)}


def _throughputs(service: Service) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Return time per output token, ms, and tokens/s per GPU of each model: prediction, lower and
    upper end (3, n)."""
    out = {}
    for name, points in by_key(service.curve, lambda p: p.name).items():
        times, rates = (
            np.array([[getattr(p, f"{field}{end}") for p in points] for end in ends], dtype=float)
            for field, ends in (("tpot", ("_s", "_lower", "_upper")), ("tokens_per_s", ENDS))
        )
        out[name] = 1e3 * times, rates
    return out


def _within(service: Service) -> dict[str, OperatingPoint]:
    return {p.name: p for p in service.kinds.get(LIMITS, ()) if p.concurrency}


def _draw_throughputs(
    ax: Axes, service: Service, curves: Mapping[str, tuple[FloatArray, FloatArray]]
) -> None:
    if service.limits.tpot_s is not None:
        limit_ms = 1e3 * service.limits.tpot_s
        ax.axvline(limit_ms, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=1.5)
        where: Look = {"rotation": 90, "va": "bottom", "ha": "right", "color": PALE_INK}
        ax.text(limit_ms, ax.get_ylim()[0] * 1.1, f"limit {limit_ms:.3g} ms", **where)
    styles, within = _service_styles(service), _within(service)
    for name, (x, y) in curves.items():
        style = styles[label(name)]
        # a slower pass moves a point right and down
        edge = np.concatenate([x[1], x[2][::-1]]), np.concatenate([y[2], y[1][::-1]])
        ax.fill(*edge, color=style.color, alpha=0.16, linewidth=0, zorder=2)
        ax.plot(x[0], y[0], **style.marks(markersize=2.6, zorder=4))
        ax.plot(x[0, -1:], y[0, -1:], **style.marks(markersize=5.5, zorder=4.5))
        if name in within:
            place = 1e3 * within[name].tpot_s, within[name].tokens_per_s
            ax.plot(*place, **_LIMIT_RING, markeredgecolor=style.color, zorder=4.5)


def _name_throughputs(
    ax: Axes, service: Service, curves: Mapping[str, tuple[FloatArray, FloatArray]]
) -> None:
    """Write how many requests are in flight at the end of each curve."""
    most = {
        p.name: f"{p.concurrency:,}" for p in service.curve
    }  # numbers of requests at the last point
    ends_x, ends_y = np.array([(x[0, -1], y[0, -1]) for x, y in curves.values()]).T
    clear_of = [(x[0], y[0]) for x, y in curves.values()]
    layout.write_labels(ax, ends_x, ends_y, [most[name] for name in curves], clear_of)
