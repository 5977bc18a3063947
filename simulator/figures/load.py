"""Draw requests that arrive at a service: percentiles over the rate, and a timeline of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from simulator.errors import InputError
from simulator.figures import layout
from simulator.figures.style import COLORS, DENSE, GREY, Style, label, paper_style, styles_of
from simulator.prediction.load import LoadService, SimulatedModel

_SHARES = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1)
"""Rates of a curve as shares of the largest one, or of the rate at which all requests end."""
_MOST_ROWS = 60  # requests of a timeline
_PANELS = (("ttft_p99", "time to first token (ms)"), ("tpot_p99", "time per further token (ms)"))


def loads_of(services: Sequence[LoadService]) -> Figure:
    """Draw the 99th percentiles of the time to the first and per further token over the rate of one
    replica, a row of panels per service."""
    handles = layout.marks(_styles(services[0]), markersize=3)
    handles.append(layout.band(services[0].points[0].level))
    with paper_style():
        figure, axes = layout.panel_list(2 * len(services), 2.1, 0.35, 2, handles=handles)
        for service, pair in zip(services, zip(axes[::2], axes[1::2])):
            _draw(service, pair)
        return layout.laid_out(figure)


def _styles(service: LoadService) -> dict[str, Style]:
    families = {label(point.name): point.family for point in service.points if point.pruning}
    return {"dense": DENSE, **styles_of(families)}


def _draw(service: LoadService, axes: Sequence[Axes]) -> None:
    first, styles = service.points[0], _styles(service)
    several = f", {first.devices} devices" if first.devices > 1 else ""
    for point, model in zip(service.points, service.models):
        if not point.refused:
            _draw_model(model, styles[label(point.name)], axes)
    limits = service.limits.ttft_s, service.limits.tpot_s
    for ax, (_, text), limit in zip(axes, _PANELS, limits):
        ax.set(xlabel="requests/s per replica", ylabel=f"99th percentile of\n{text}")
        ax.set_title(layout.device(first) + several, pad=5)
        if limit is not None:
            ax.axhline(1e3 * limit, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)))
        layout.log_axis(ax, "y", 6)


def _draw_model(model: SimulatedModel, style: Style, axes: Sequence[Axes]) -> None:
    largest = model.largest_rates[0] if model.simulation.limits.named else 0.0
    rates = [share * (largest or model.typical.requests_per_s) for share in _SHARES]
    numbers = [model.at_rate(rate) for rate in rates]
    for ax, (name, _) in zip(axes, _PANELS):
        if name in numbers[0]:
            middle, low, high = 1e3 * np.array([row[name] for row in numbers]).T
            ax.fill_between(rates, low, high, color=style.color, alpha=0.16, linewidth=0)
            ax.plot(rates, middle, **style.marks(markersize=2.6))


def timeline_of(service: LoadService) -> Figure:
    """Draw each request of the typical run of the dense model (or of the first one that runs): the
    time in which it waits, computes its prompt, and decodes."""
    ran = [pair for pair in zip(service.points, service.models) if not pair[0].refused]
    point, model = ran[0]
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
    titles = [f"{label(point.name)}, {layout.device(point)}"]
    with paper_style():
        figure, (ax,) = layout.panel_list(
            1, 0.5 + 0.06 * len(rows), 0.35, titles=titles, handles=handles
        )
        for _, start, end, color in parts:
            ax.barh(rows, end - start, 0.8, start, color=color)
        ax.set(xlabel="time (s)", ylabel="request", ylim=(len(rows) - 0.4, -0.6))
        return layout.laid_out(figure)
