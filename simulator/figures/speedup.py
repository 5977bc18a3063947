"""Draw speedup over batch, length or sparsity, and throughput of services over their time per
token.

A few candidates are curves with interval bands, and with bounds if they are one or two: a row of
panels per setting, a column per device and engine, and a ring at the first value from which a
candidate pays. More candidates, or single values, are dots: a panel per setting, a line of text per
candidate and value, and on it a dot per device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from simulator.arrays import FloatArray, IndexArray
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
from simulator.prediction.requests import batch_name
from simulator.prediction.result import Result
from simulator.prediction.service import LIMITS, OperatingPoint, Service
from simulator.prediction.wording import GAIN
from simulator.pruning._titles import method_title

# most candidates drawn as curves with bands (more become dots), and with bounds
MOST_CURVES = 4
MOST_BOUNDED = 2

# fields that speedup is drawn over, and labels of their axes
AXES: Mapping[str, str] = {
    "batch": "batch size",
    "seq": "sequence length (tokens)",
    "sparsity": "removed (%)",
}
PAYS = "pays from here (interval above 1)"  # label of the rings
MOST_ACROSS = 4  # panels of dots per row
MOST_VALUES = 5  # values of a field other than the axis: each has a row of panels
LINE = 0.055  # height of a name next to a curve of throughput, as a share of a panel's height

# minimum height of a line of text and of a dot, inches; on a page with less, dots become curves
# without bands
LEAST_LINE_IN = 0.1
LEAST_DOT_IN = 0.04

# upper bounds: attribute of a result, line of curves, colour of ticks
BOUNDS = {
    "FLOP bound": ("flop_bound", (0, (1, 1)), GREY),
    "roofline bound": ("roofline_bound", (0, (5, 1.5)), "black"),
}
_BAND: Look = {"alpha": 0.16}
_NOMINAL: Look = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (3, 1, 1, 1))}
_RING: Look = {
    "marker": "o",
    "markersize": 7.5,
    "markerfacecolor": "none",
    "linestyle": "none",
}
_LIMIT_RING: Look = {**_RING, "markersize": 8, "markeredgewidth": 0.9}


@dataclass(frozen=True)
class Speedups:
    """Results as columns: candidate, value of the axis, row and column of the panel, speedups."""

    data: layout.FigurePoints
    axis: str  # field over which speedups are drawn
    styles: Mapping[str, Style]  # by candidate
    interval: str
    note: str  # title of the figure
    serves: bool  # whether all results are of serving

    @classmethod
    def of(cls, results: Sequence[Result]) -> Speedups:
        axis = varying(results)
        swept = _swept(results)
        results, omitted = _of_few_settings(results, axis, swept)
        removed = swept and len(_values(results, "sparsity")) > 1  # each sparsity has its panels
        models = [model_title(name) for name in dict.fromkeys(r.model for r in results)]
        titles = _names(results, axis, removed)
        bounds = {name: attribute for name, (attribute, *_) in BOUNDS.items()}
        data = layout.arrays(
            layout.columns(results, at=axis, **layout.SPEEDUP, **bounds)
            | layout.placed(results, [_setting(r, results, axis, removed) for r in results])
            | {"candidate": titles}
        )
        looks = styles_of(
            {title: "" if r.method else r.family for title, r in zip(titles, results)}
        )
        return cls(
            data,
            axis,
            {name: looks[name] for name in in_order(titles)},
            layout.interval(results[0].level),
            ", ".join(filter(None, [*(models if len(models) == 1 else ()), omitted])),
            all(r.phase == "serve" for r in results),
        )

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

    def rows(self, setting: str, device: str, name: str) -> IndexArray:
        """Return the rows of a candidate in a panel, by rising value."""
        panel = (self.data["row"] == setting) & (self.data["column"] == device)
        rows = np.flatnonzero(panel & (self.data["candidate"] == name))
        ordered: IndexArray = rows[np.argsort(self.data["at"][rows], kind="stable")]
        return ordered

    def range(self, names: Sequence[str]) -> tuple[float, float]:
        """Return the limits of an axis with all values of some columns."""
        values = np.concatenate([*(self.data[name] for name in names), np.ones(1)])
        values = values[np.isfinite(values) & (values > 0)]
        low = float(values.min())
        high = float(values.max())
        pad = max((high / low) ** 0.04, 1.02)
        return low / pad, high * pad


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
    return max(counts, key=counts.__getitem__) if max(counts.values()) > 1 else "sparsity"


def _values(results: Sequence[Result], axis: str) -> list[float]:
    """Return the values of a field over which a pruning varies, if any does; else one value."""
    sets = _sets([_name(r) for r in results], results, axis)
    several = [values for values in sets if len(values) > 1]
    return sorted(set[float]().union(*(several or sets[:1])))


def _sets(groups: Sequence[Any], results: Sequence[Result], axis: str) -> list[set[float]]:
    """Return the values of a field in each group."""
    sets: dict[Any, set[float]] = {}
    for group, r in zip(groups, results):
        sets.setdefault(group, set()).add(getattr(r, axis))
    return list(sets.values())


def _name(r: Result) -> str:
    """Return the title of a pruning without its sparsity."""
    return (
        r.pruned or method_title(r.method) or f"{label(r.family)}{r.options and f' ({r.options})'}"
    )


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


def _swept(results: Sequence[Result]) -> bool:
    """Return whether a pruning has several sparsities in one scenario, which it has only if these
    were requested: the sparsity of a budget follows from the length."""
    scenarios = [
        (_name(r), r.model, r.hardware, r.engine, r.phase, r.batch, r.seq, r.new_tokens)
        for r in results
    ]
    return any(len(values) > 1 for values in _sets(scenarios, results, "sparsity"))


def _of_few_settings(
    results: Sequence[Result], axis: str, swept: bool
) -> tuple[Sequence[Result], str]:
    """Return the results of at most :data:`MOST_VALUES` values per field other than the axis, and a
    note on omitted values."""
    notes = []
    for other in ("batch", "seq", *(["sparsity"] if swept else [])):
        if other == axis:
            continue
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
    x = np.asarray(at, dtype=float)
    low = np.asarray(lower, dtype=float)
    order = np.argsort(x, kind="stable")
    pays = np.logical_and.accumulate(low[order][::-1] >= GAIN)[::-1]
    return int(order[np.argmax(pays)]) if pays.any() else None


def _line(pairs: Sequence[tuple[str, float]], i: int, axis: str) -> str:
    """Return the text of a line: the value, on the first line of a candidate after its name."""
    name, value = pairs[i]
    named = "" if i and pairs[i - 1][0] == name else f"{label(name)}  "
    texts = {"batch": f"batch {value:.0f}", "seq": f"{layout.short(int(value))} tokens"}
    return f"{named}{texts.get(axis, f'{100 * value:.3g} %')}"


@dataclass(frozen=True)
class _Lines:
    """Texts and sizes of panels of dots."""

    names: Sequence[str]  # texts of the lines
    titles: Sequence[str]  # of the panels
    across: int  # panels per row
    line_in: float  # height of a line
    room_in: float  # width of a panel

    @classmethod
    def of(cls, speedups: Speedups, line_in: float, across: int) -> _Lines:
        width = layout.width_of(len(speedups.settings))
        texts = [_line(speedups.pairs, i, speedups.axis) for i in range(len(speedups.pairs))]
        names = [layout.wrapped(text, 0.75 * width) for text in texts]
        longest = max(len(part) for name in names for part in name.split("\n"))
        room_in = (width - 0.058 * longest) / across
        titles = [layout.wrapped(setting, room_in) for setting in speedups.settings]
        return cls(names, titles, across, line_in * layout.lines_of(names), room_in)

    @property
    def panel_in(self) -> float:
        return max(len(self.names) * self.line_in, 0.3) + 0.2 + layout.title_in(self.titles)


def _dots(speedups: Speedups, line_in: float, down: int) -> Figure:
    """Draw many candidates: a line of text per candidate and value, a dot per device."""
    lines = _Lines.of(speedups, line_in, -(-len(speedups.settings) // down))
    marks = zip(COLORS * 2, "osD^vPXh*<>pd")
    looks = {
        device: Style(*mark, hollow=i % 2 == 1)
        for i, (device, mark) in enumerate(zip(speedups.devices, marks))
    }
    figure, panels, _ = layout.panel_list(
        len(speedups.settings),
        lines.panel_in,
        0.42,
        lines.across,
        handles=_dot_handles(looks, speedups.interval),
        legend="speedup (log scale)",
        title=speedups.note,
        least_in=lines.panel_in,
        sharex=True,
        sharey=True,
    )
    limits = speedups.range(["speedup", "lower", "upper", *BOUNDS])
    for i, (ax, setting) in enumerate(zip(panels, speedups.settings)):
        ax.set(xscale="log", xlim=limits, ylim=(len(speedups.pairs) - 0.5, -0.5))
        ax.set_title(lines.titles[i], pad=4)
        ax.tick_params(axis="x", labelbottom=i + lines.across >= len(speedups.settings))
        _empty_lines(ax, [name for name, _ in speedups.pairs])
        _draw_dots(ax, speedups, setting, looks, lines.line_in)
        ax.set_yticks(range(len(lines.names)), lines.names)
        layout.log_axis(ax.xaxis, *limits, int(np.clip(lines.room_in / 0.25, 2, 12)))
    return layout.laid_out(figure)


def _dot_handles(looks: Mapping[str, Style], interval: str) -> list[Line2D]:
    tick: Look = {"marker": "|", "markersize": 6, "markeredgewidth": 1.1}
    return [
        *(layout.entry(n, **style.marks(linestyle="none")) for n, style in looks.items()),
        layout.entry(interval, color=INK, linewidth=0.8),
        *(
            layout.entry(n, color=color, linestyle="none", **tick)
            for n, (*_, color) in BOUNDS.items()
        ),
    ]


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


def _draw_dots(
    ax: Axes, speedups: Speedups, setting: str, looks: Mapping[str, Style], line_in: float
) -> None:
    slot = 0.8 / len(looks)
    size = float(np.clip(72 * line_in * slot * 0.75, 2.2, 3.4))
    for k, (device, style) in enumerate(looks.items()):
        data = layout.of_panel(speedups.data, setting, device)
        lines = [speedups.pairs.index(pair) for pair in zip(data["candidate"], data["at"])]
        y = np.array(lines, dtype=float) + (k - 0.5 * (len(looks) - 1)) * slot
        ends = y - 0.5 * slot, y + 0.5 * slot
        for bound, (*_, color) in BOUNDS.items():
            ax.vlines(data[bound], *ends, color=color, linewidth=0.9, zorder=2)
        ax.hlines(y, data["lower"], data["upper"], color=style.color, linewidth=0.8, zorder=3)
        marks = style.marks(linestyle="none", markersize=size, zorder=4)
        ax.plot(data["speedup"], y, **marks)


@dataclass(frozen=True)
class _Look:
    """What curves show besides speedups."""

    few: bool  # at most MOST_CURVES candidates: bands and rings
    bounds: Mapping[str, tuple[str, Any, str]]  # at most MOST_BOUNDED candidates
    rings: bool

    @classmethod
    def of(cls, speedups: Speedups) -> _Look:
        data = speedups.data
        few = len(speedups.styles) <= MOST_CURVES
        pay = (
            pays_from(data["at"][rows], data["lower"][rows]) is not None
            for panel in set(zip(data["row"], data["column"], data["candidate"]))
            if len(rows := speedups.rows(*panel)) > 1
        )
        bounds = BOUNDS if len(speedups.styles) <= MOST_BOUNDED else {}
        return cls(few, bounds, few and any(pay))

    @property
    def band(self) -> Look:
        return _BAND if self.bounds else {**_BAND, "alpha": 0.08}

    def handles(self, speedups: Speedups, width_in: float) -> list[Any]:
        handles: list[Any] = [
            layout.entry(layout.wrapped(label(name), 0.9 * width_in), **style.marks())
            for name, style in speedups.styles.items()
        ]
        for name, (_, line, _) in self.bounds.items():
            handles.append(layout.entry(name, color=INK, linestyle=line, linewidth=0.8))
        if self.few:
            handles.append(Patch(color=INK, **_BAND, label=speedups.interval))
        if speedups.axis == "sparsity":
            handles.append(layout.entry("nominal 1 / (1 - s)", **_NOMINAL))
        if self.rings:
            handles.append(layout.entry(PAYS, **_RING, markeredgecolor=INK))
        return handles


def _curves(speedups: Speedups) -> Figure:
    """Draw at most MOST_BOUNDED candidates with bands, rings and bounds, MOST_CURVES without
    bounds, more as lines."""
    look = _Look.of(speedups)
    speedups = replace(speedups, data=layout.fitted(speedups.data))
    across = len(speedups.devices)
    width = layout.width_of(len(speedups.settings) * across)
    handles = look.handles(speedups, width)
    room = layout.most_height() - 1.0 - 0.14 * layout.legend_lines(handles, width)
    panel_in = float(np.clip(room / len(speedups.settings), 0.7, 1.6))
    served = speedups.serves and speedups.axis == "batch"
    figure, panels = layout.panel_grid(
        speedups.data,
        panel_in,
        0.5,
        width_in=width,
        handles=handles,
        legend="requests in flight" if served else AXES[speedups.axis],
        title=speedups.note,
        sharex=True,
        sharey=True,
    )
    limits = speedups.range(
        ["speedup", "lower", "upper", *look.bounds] if look.few else ["speedup"]
    )
    values = np.unique(speedups.data["at"]).astype(float)
    for panel, ax in panels.items():
        ax.set(yscale="log", ylim=limits)
        ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        _draw_curves(ax, speedups, panel, look)
        if speedups.axis == "sparsity":
            removed = np.linspace(values[0], values[-1], 100)
            ax.plot(removed, 1.0 / (1.0 - removed), **_NOMINAL, zorder=1.8)
        layout.log_axis(ax.yaxis, *limits, 7)
    _value_axes(panels, values, speedups.axis, (width - 0.6) / across)
    return layout.laid_out(figure, "speedup (log scale)")


def _draw_curves(ax: Axes, speedups: Speedups, panel: tuple[str, str], look: _Look) -> None:
    for name, style in speedups.styles.items():
        rows = speedups.rows(*panel, name)
        _curve(ax, {column: values[rows] for column, values in speedups.data.items()}, style, look)


def _curve(ax: Axes, data: layout.FigurePoints, style: Style, look: _Look) -> None:
    """Draw one candidate in a panel."""
    x, speedup, lower, upper = (data[column] for column in ("at", "speedup", "lower", "upper"))
    color: Look = {"color": style.color}
    if look.few:
        ax.fill_between(x, lower, upper, **color, **look.band, zorder=2)
        if not look.bounds:  # where three bands overlap, lines show the ends of each
            ax.plot(x, np.stack([lower, upper], axis=1), **color, linewidth=0.5, zorder=2.2)
        for bound, (_, line, _) in look.bounds.items():
            ax.plot(x, data[bound], **color, linestyle=line, linewidth=0.8, zorder=2.5)
        if len(x) == 1:  # neither a band nor a line
            ax.vlines(x, lower, upper, **color, alpha=0.5, linewidth=1.5)
            for bound in look.bounds:
                ax.scatter(x, data[bound], **color, marker="_", s=36, zorder=2.5)
        elif (first := pays_from(x, lower)) is not None:
            ring = {**_RING, "markeredgecolor": style.color}
            ax.plot(x[[first]], speedup[[first]], **ring, zorder=4.5)
    ax.plot(x, speedup, **style.marks(), zorder=4)


def _value_axes(panels: layout.Panels, values: FloatArray, axis: str, room_in: float) -> None:
    """Put ticks at the values of the x axes, as many as there is room for: in per cent, or on a
    logarithmic axis."""
    low = float(values[0])
    high = float(values[-1])
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
    points = [service.points[0] for service in services]
    about = "" if len(services) > 1 else f"{model_title(points[0].model)}, "
    about += f"{points[0].devices} × " if points[0].devices > 1 else ""
    curves = [_throughputs(service) for service in services]
    with paper_style():
        figure, axes, columns = layout.panel_list(
            len(services),
            2.3,
            0.35,
            layout.across(len({p.hardware for p in points}), len({p.engine for p in points})),
            handles=_service_handles(services),
            sharex=True,
            sharey=True,
        )
        x_limits, y_limits = (
            _padded([c[i] for some in curves for c in some.values()]) for i in (0, 1)
        )
        room_in = layout.width_of(len(services)) / columns - 0.4
        for i, ax in enumerate(axes):
            ax.set(xscale="log", yscale="log", xlim=x_limits, ylim=y_limits)
            ax.set_title(layout.wrapped(about + layout.device(points[i]), room_in), pad=5)
            ax.set_xlabel("time per output token (ms)", labelpad=2)
            ax.set_ylabel("tokens/s per GPU" if i % columns == 0 else "")
            layout.log_axis(ax.xaxis, *x_limits, 6)
            layout.log_axis(ax.yaxis, *y_limits, 6)
            _draw_throughputs(ax, services[i], curves[i])
            _name_throughputs(ax, services[i], curves[i])
        return layout.laid_out(figure)


def _padded(columns: Sequence[FloatArray]) -> tuple[float, float]:
    """Return limits of a logarithmic axis with room next to the values."""
    values = np.concatenate([column.ravel() for column in columns])
    pad = float(values.max() / values.min()) ** 0.05
    return float(values.min()) / pad, float(values.max()) * pad


def _service_handles(services: Sequence[Service]) -> list[Any]:
    handles: list[Any] = [
        layout.entry(
            "as many as fit (number)", linestyle="none", marker="o", color=INK, markersize=5.5
        )
    ]
    if any(_within(service) for service in services):
        ring = {**_LIMIT_RING, "markeredgecolor": INK}
        handles.append(layout.entry("most within the limits", **ring))
    interval = layout.interval(services[0].points[0].level)
    return [*handles, Patch(color=INK, alpha=0.12, label=interval)]


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
    if service.limits.tpot_s is not None:
        limit_ms = 1e3 * service.limits.tpot_s
        ax.axvline(limit_ms, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=1.5)
        where: dict[str, Any] = {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": 6}
        bottom = ax.get_ylim()[0] * 1.1
        ax.text(limit_ms, bottom, f"limit {limit_ms:.3g} ms", color=PALE_INK, **where)
    families = {
        p.name: p.family if p.prune.partition(" ")[0] in ("", p.family) else ""
        for p in service.curve
        if p.pruning
    }
    styles, within = {DENSE.label: DENSE, **styles_of(families)}, _within(service)
    for name, (x, y) in curves.items():
        style = styles[name]
        # a slower pass moves a point right and down
        edge = np.concatenate([x[1], x[2][::-1]]), np.concatenate([y[2], y[1][::-1]])
        ax.fill(*edge, color=style.color, alpha=0.12, zorder=2)
        ax.plot(x[0], y[0], **style.marks(markersize=2.6, zorder=4))
        ax.plot(x[0, -1:], y[0, -1:], **style.marks(markersize=5.5, zorder=4.5))
        if name in within:
            place = 1e3 * within[name].tpot_s, within[name].tokens_per_s
            ax.plot(*place, **_LIMIT_RING, markeredgecolor=style.color, zorder=4.5)


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
        )
        to = float(np.exp(low + height * (high - low)))
        ax.plot(
            [curves[name][0][0, -1], edge],
            [curves[name][1][0, -1], to],
            color=GREY,
            linewidth=0.4,
            clip_on=False,
            zorder=3,
        )
