"""Draw requests that arrive at a service: percentiles over the rate, and a timeline of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from simulator.errors import InputError
from simulator.figures import layout
from simulator.figures.style import COLORS, DENSE, GREY, PALE_INK, Style, paper_style, styles_of
from simulator.prediction.load import LoadService, SimulatedModel

_SHARES = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1)
"""Rates of a curve as shares of the largest one, or of the rate at which all requests end."""
_MOST_ROWS = 60  # requests of a timeline
_PANELS = (("ttft_p99", "time to first token (ms)"), ("tpot_p99", "time per further token (ms)"))


def loads_of(services: Sequence[LoadService]) -> Figure:
    """Draw the 99th percentiles of the time to the first and per further token over the rate of one
    replica, a row of panels per service."""
    with paper_style():
        figure, axes, _ = layout.panel_list(
            2 * len(services), 2.1, 0.35, 2, handles=_handles(services[0])
        )
        for service, pair in zip(services, zip(axes[::2], axes[1::2])):
            _draw(service, pair)
        return layout.laid_out(figure)


def _styles(service: LoadService) -> dict[str, Style]:
    families = {point.name: point.family for point in service.points if point.pruning}
    return {"dense": DENSE, **styles_of(families)}


def _handles(service: LoadService) -> list[Any]:
    lines: list[Any] = [
        Line2D([], [], **style.marks(markersize=3), label=name)
        for name, style in _styles(service).items()
    ]
    interval = layout.interval(service.points[0].level)
    return [*lines, Patch(color=PALE_INK, alpha=0.2, linewidth=0, label=interval)]


def _draw(service: LoadService, axes: Sequence[Axes]) -> None:
    first, limits = service.points[0], (service.limits.ttft_s, service.limits.tpot_s)
    several = f", {first.devices} devices" if first.devices > 1 else ""
    for point, model in zip(service.points, service.models):
        if not point.refused:
            _draw_model(model, _styles(service)[point.name], axes)
    for ax, (_, text), limit in zip(axes, _PANELS, limits):
        ax.set(yscale="log", xlabel="requests/s per replica", ylabel=f"99th percentile of\n{text}")
        ax.set_title(layout.device(first) + several, pad=5)
        if limit is not None:
            ax.axhline(1e3 * limit, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)))
        layout.log_axis(ax.yaxis, *ax.get_ylim(), 6)


def _draw_model(model: SimulatedModel, style: Style, axes: Sequence[Axes]) -> None:
    largest = model.largest_rates[0] if model.simulation.limits.named else 0.0
    rates = [share * (largest or model.typical.requests_per_s) for share in _SHARES]
    numbers = [model.at_rate(rate) for rate in rates]
    for ax, (name, _) in zip(axes, _PANELS):
        if name in numbers[0]:
            middle, low, high = 1e3 * np.array([row[name] for row in numbers]).T
            ax.fill_between(rates, low, high, color=style.color, alpha=0.12, linewidth=0)
            ax.plot(rates, middle, **style.marks(markersize=2.6))


def timeline_of(service: LoadService) -> Figure:
    """Draw each request of the typical run of the dense model (or of the first one that runs): the
    time in which it waits, computes its prompt, and decodes."""
    point, model = next((p, m) for p, m in zip(service.points, service.models) if not p.refused)
    run = model.typical
    rows = np.arange(len(run.arrival))
    if len(rows) > _MOST_ROWS:
        raise InputError(
            f"timeline: expected at most {_MOST_ROWS} requests (--requests), got {len(rows):,}"
        )
    parts = (
        ("waits", run.arrival, run.start, GREY),
        ("prompt", run.start, run.first, COLORS[1]),
        ("decodes", run.first, run.end, COLORS[0]),
    )
    handles = [Patch(color=color, label=name) for name, _, _, color in parts]
    with paper_style():
        height = 0.6 + 0.06 * len(rows)
        figure, (ax,), _ = layout.panel_list(1, height, 0.35, handles=handles)
        for _, start, end, color in parts:
            ax.barh(rows, end - start, left=start, height=0.8, color=color)
        ax.set(xlabel="time (s)", ylabel="request", ylim=(len(rows) - 0.4, -0.6))
        ax.set_title(f"{point.name}, {layout.device(point)}", pad=5)
        return layout.laid_out(figure)
