"""Draw the throughput of a service over its time per token: a curve over concurrency for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from simulator.arrays import FloatArray
from simulator.figures.layout import across, device, interval, laid_out, log_axis, panel_list, width_of, wrapped
from simulator.figures.style import DENSE, GREY, INK, PALE_INK, paper_style, styles_of
from simulator.models.library import model_title
from simulator.prediction.sentences import LIMITS
from simulator.prediction.service import OperatingPoint, Service

LINE = 0.055  # height of a name, as a share of a panel's height

_ALPHA = 0.12
_RING: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 0.9}
_RING |= {"linestyle": "none"}


def services_of(services: Sequence[Service]) -> Figure:
    """Draw the throughput of services over their time per output token, one panel each.

    A curve follows the concurrency from a single request (bottom left) to as many as fit, which its name states. A
    slower pass moves a point right and down, so the band of a curve joins the ends of both intervals.
    """
    engines, devices = (len({getattr(s.points[0], name) for s in services}) for name in ("engine", "hardware"))
    first = services[0].points[0]
    model = "" if len(services) > 1 else f"{model_title(first.model)}, "
    many = f"{first.devices} × " if first.devices > 1 else ""
    curves = [_curves(service) for service in services]
    with paper_style():
        most: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": INK, "markersize": 5.5}
        handles: list[Any] = [Line2D([], [], **most, label="as many as fit (number)")]
        if any(_within(service) for service in services):
            handles.append(Line2D([], [], **_RING, markeredgecolor=INK, label="most within the limits"))
        handles.append(Patch(color=INK, alpha=_ALPHA, linewidth=0, label=interval(first.level)))
        look: dict[str, Any] = {"handles": handles, "sharex": True, "sharey": True}
        figure, axes, columns = panel_list(len(services), 2.3, 0.35, across(devices, engines), **look)
        every = [np.concatenate([curve[i].ravel() for some in curves for curve in some.values()]) for i in (0, 1)]
        pads = [float(values.max() / values.min()) ** 0.05 for values in every]
        ranges = [(float(v.min()) / pad, float(v.max()) * pad) for v, pad in zip(every, pads)]
        room_in = width_of(len(services)) / columns - 0.4
        for i, (ax, service, some) in enumerate(zip(axes, services, curves)):
            ax.set(xscale="log", yscale="log", xlim=ranges[0], ylim=ranges[1])
            ax.set_title(wrapped(f"{model}{many}{device(service.points[0])}", room_in), pad=5)
            ax.set_xlabel("time per output token (ms)", labelpad=2)
            ax.set_ylabel("tokens/s per GPU" if i % columns == 0 else "")
            log_axis(ax.xaxis, *ranges[0], 6)
            log_axis(ax.yaxis, *ranges[1], 6)
            _draw(ax, service, some)
            _name(ax, service, some)
        return laid_out(figure)


def _curves(service: Service) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Return time per output token, ms, and tokens/s per GPU of each model at rising concurrencies (n), each as the
    prediction and both ends of its interval (3, n)."""
    groups: dict[str, list[OperatingPoint]] = {}
    for point in service.curve:
        groups.setdefault(point.name, []).append(point)

    def values(points: list[OperatingPoint], *names: str) -> FloatArray:
        return np.array([[getattr(p, name) for p in points] for name in names], dtype=float)

    rates = "tokens_per_s", "tokens_per_s_lower", "tokens_per_s_upper"
    return {
        name: (1e3 * values(points, "tpot_s", "tpot_lower", "tpot_upper"), values(points, *rates))
        for name, points in groups.items()
    }


def _within(service: Service) -> dict[str, OperatingPoint]:
    """Return the point of each model within the limits."""
    return {p.name: p for p in service.kinds.get(LIMITS, ()) if p.concurrency}


def _draw(ax: Axes, service: Service, curves: Mapping[str, tuple[FloatArray, FloatArray]]) -> None:
    if (limit_s := service.limits.tpot_s) is not None:
        ax.axvline(1e3 * limit_s, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=1.5)
        where: dict[str, Any] = {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": 6, "color": PALE_INK}
        ax.text(1e3 * limit_s, ax.get_ylim()[0] * 1.1, f"limit {1e3 * limit_s:.3g} ms", **where)
    families = {p.name: p.family for p in service.curve if p.pruning}
    styles, within = {DENSE.label: DENSE, **styles_of(families)}, _within(service)
    for name, ((x, low_x, high_x), (y, low_y, high_y)) in curves.items():
        style = styles[name]
        edge = np.concatenate([low_x, high_x[::-1]]), np.concatenate([high_y, low_y[::-1]])
        ax.fill(*edge, color=style.color, alpha=_ALPHA, linewidth=0, zorder=2)
        ax.plot(x, y, **style.marks(markersize=2.6, zorder=4))
        ax.plot(x[-1:], y[-1:], **style.marks(markersize=5.5, zorder=4.5))
        if name in within:
            point = within[name]
            ax.plot(1e3 * point.tpot_s, point.tokens_per_s, **_RING, markeredgecolor=style.color, zorder=4.5)


def _name(ax: Axes, service: Service, curves: Mapping[str, tuple[FloatArray, FloatArray]]) -> None:
    """Write the names of the curves right of the panel, with lines to their ends."""
    (left, right), (low, high) = np.log(ax.get_xlim()), np.log(ax.get_ylim())
    edge = float(np.exp(left + 1.02 * (right - left)))
    most = {p.name: p.concurrency for p in service.curve}  # the last point
    ends = [(float(np.log(rate[0, -1]) - low) / (high - low), name) for name, (_, rate) in curves.items()]
    height = 1.0 + LINE
    for place, name in sorted(ends, key=lambda end: -end[0]):
        height = min(place, height - LINE)
        ax.text(1.03, height, f"{name} ({most[name]:,})", transform=ax.transAxes, va="center", fontsize=6)
        to = float(np.exp(low + height * (high - low)))
        line: dict[str, Any] = {"color": GREY, "linewidth": 0.4, "clip_on": False, "zorder": 3}
        ax.plot([curves[name][0][0, -1], edge], [curves[name][1][0, -1], to], **line)
