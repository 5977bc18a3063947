"""Draw the plan of a search: the share of each layer that stays, its quality loss, and the
frontier.

The frontier is that of the first setting of the search.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from simulator.figures import layout
from simulator.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    INK,
    PALE_INK,
    VERMILLION,
    Look,
    paper_style,
)
from simulator.models.library import model_title
from simulator.models.model import Layer
from simulator.models.sublayers import Attention, Experts, LatentAttention, Linear, Mlp
from simulator.plans.search import Plan, PlanPoint
from simulator.plans.solve import NAMES, target_text
from simulator.plans.variants import SUBLAYERS
from simulator.units import ratio

UNCHANGED, EMPTY = "#C4C4C4", "#F1F1F1"  # unchanged sublayers, and the part that is removed

# targets that have a line in the panel of speedups
SPEEDS = ("speedup", "latency_s", "tokens_per_s")
STEEP = 6.0  # a loss axis is logarithmic beyond a usual loss if its end is this many times larger
NEARBY = 3.0  # the axis of the frontier ends at this many times the loss of the chosen plan

_WIDE = 38  # characters of a line of the legend
_BESIDE_IN = 6.0  # width from which the legend is beside the frontier, inches
_REMOVED: Look = {
    "linestyle": "none",
    "marker": "x",
    "color": VERMILLION,
    "markeredgewidth": 0.9,
}
_LINEAR: Look = {
    "facecolor": "white",
    "edgecolor": GREEN,
    "hatch": "//////",
    "linewidth": 0.4,
}
_FRONTIER: Look = {
    "color": INK,
    "linewidth": 0.8,
    "marker": "o",
    "markersize": 2.6,
    "markeredgewidth": 0,
}
_CHOSEN: Look = {
    "color": BLACK,
    "linestyle": "none",
    "marker": "*",
    "markersize": 8,
    "markeredgewidth": 0,
}


def plan_figure(plan: Plan) -> Figure:
    changed = sum((row.attention, row.mlp) != ("dense", "dense") for row in plan.layers)
    title = f"{model_title(plan.model)}: {changed} of {len(plan.layers)} layers changed"
    layers = [
        Patch(facecolor=UNCHANGED, label="unchanged"),
        Patch(facecolor=BLUE, label="smaller (kept share of heads or width)"),
        Patch(**_LINEAR, label="replaced by a linear layer"),
        layout.entry("removed", **_REMOVED, markersize=4),
    ]
    width_in = layout.width_of(2)
    heights, names = [0.5, 0.6, 0.45, 2.0], [*SUBLAYERS, "loss"]
    if width_in >= _BESIDE_IN:
        sizes: Look = {"height_ratios": heights, "width_ratios": [4.0, 2.5]}
        rows = [*([name] * 2 for name in names), ["frontier", "legend"]]
    else:
        sizes = {"height_ratios": [*heights, 1.4]}
        rows = [[name] for name in (*names, "frontier", "legend")]
    with paper_style():
        figure = layout.page(width_in, 4.9 if width_in >= _BESIDE_IN else 6.8)
        layout.legend_below(figure, layers)
        axes: dict[str, Any] = figure.subplot_mosaic(rows, gridspec_kw=sizes)
        for name in SUBLAYERS:
            _sublayers(axes[name], name, plan)
        axes["attention"].set_title(layout.wrapped(title, width_in - 0.6), loc="left", pad=4)
        _losses(axes["loss"], plan)
        beside: Look = {"loc": "center left", "borderaxespad": 0.0, "borderpad": 0.0}
        axes["legend"].axis("off")
        legend = axes["legend"].legend(handles=_frontier(axes["frontier"], plan), **beside)
        legend.set_in_layout(False)  # else a long line would make the panels of the layers narrower
        return layout.laid_out(figure)


def _folded(text: str, wide: int = _WIDE, share: float = 1.0) -> str:
    """Return a text with lines of at most ``wide`` characters that fit a share of the figure's
    width."""
    room_in = share * layout.width_of(2) - 0.5
    return textwrap.fill(text, min(wide, int(room_in / 0.058)))


def kept(part: str, layer: Layer, dense: Layer) -> float:
    """Return the kept share of an MLP's or of all experts' width, or the smaller share of heads and
    KV heads."""
    new = layer.of(part)
    old = dense.of(part)
    known = Attention | LatentAttention
    if isinstance(new, known) and isinstance(old, known):
        return min(new.heads / old.heads, new.kv_heads / old.kv_heads)
    if isinstance(new, Experts) and isinstance(old, Experts):
        return new.experts * new.inner / (old.experts * old.inner)
    if isinstance(new, Mlp) and isinstance(old, Mlp):
        return new.inner / old.inner
    return 1.0


def _sublayers(ax: Axes, sublayer: str, plan: Plan) -> None:
    """Draw one sublayer of all layers: bars, and marks of removed ones."""
    pairs = list(zip(plan.pruned.layers, plan.dense.layers))
    own = [i for i, (_, dense) in enumerate(pairs) if dense.has(sublayer)]
    same = [i for i in own if getattr(plan.layers[i], sublayer) == "dense"]
    gone = [i for i in own if not pairs[i][0].has(sublayer)]
    linear = [i for i in own if i not in same and isinstance(pairs[i][0].of(sublayer), Linear)]
    less = [i for i in own if i not in (*linear, *gone, *same)]
    shares = [kept(sublayer, *pairs[i]) for i in less]
    bars: tuple[tuple[str, list[int], Any, Look], ...] = (
        ("dense", own, 1.0, {"color": EMPTY}),
        ("unchanged", same, 1.0, {"color": UNCHANGED}),
        ("smaller", less, shares, {"color": BLUE}),
        ("linear", linear, 1.0, _LINEAR),
    )
    for name, layers, heights, look in bars:
        ax.bar(layers, heights, label=name, zorder=2, **look)
    size = min(4.0, 260.0 / len(pairs))
    ax.plot(gone, [0.5] * len(gone), markersize=size, label="removed", zorder=3, **_REMOVED)
    ax.set(ylim=(0.0, 1.04), ylabel="MLP" if sublayer == "mlp" else sublayer)
    layout.fixed_ticks(ax.yaxis, [0.0, 0.5, 1.0], lambda value, _: f"{100 * value:.0f} %")
    _layer_axis(ax, len(pairs), named=False)


def _layer_axis(ax: Axes, layers: int, *, named: bool) -> None:
    most = min(20, int(layout.width_of(2) / 0.25))
    ax.set_xlim(-0.8, layers - 0.2)
    ax.grid(axis="x", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))
    ax.tick_params(axis="x", labelbottom=named, length=2.5 if named else 0)


def _losses(ax: Axes, plan: Plan) -> None:
    values = np.array([row.score for row in plan.layers])
    ax.bar(range(len(values)), values, width=0.8, color=INK, zorder=2, label="loss")
    usual = float(np.median(values[values > 0.0])) if (values > 0.0).any() else 1.0
    wide = min(70, int(layout.width_of(2) / 0.058) - 20)
    title = f"{textwrap.shorten(plan.metric, wide)} of each layer"
    if values.max() > STEEP * usual:
        ax.set_yscale("symlog", linthresh=2.0 * usual)
        top = 10.0 ** np.floor(np.log10(values.max()))
        layout.fixed_ticks(ax.yaxis, [0.0, top], lambda value, _: f"{value:g}")
        title = _folded(f"{title} (linear to {2.0 * usual:.2g}, then logarithmic)", 120)
    else:
        ax.locator_params(axis="y", nbins=3)
    ax.set(xlabel="layer", ylabel="quality\nloss")
    ax.xaxis.labelpad = 2
    _layer_axis(ax, len(values), named=True)
    ax.text(1.0, 1.0, title, transform=ax.transAxes, ha="right", va="bottom", color=PALE_INK)


def _drawn(ax: Axes, points: Sequence[PlanPoint], label: str, **look: Any) -> Line2D:
    """Draw plans with their intervals; return the entry of a legend."""
    values = np.array([(p.score, p.speedup, p.speedup_lower, p.speedup_upper) for p in points])
    loss, speedup, *ends = values.T
    return layout.with_intervals(ax, loss, speedup, ends, label=_folded(label), **look)


def _draw_plans(ax: Axes, plan: Plan, chosen: PlanPoint) -> Line2D:
    """Draw the frontier; return the entry of a legend."""
    end = NEARBY * abs(chosen.score)
    near = [p for p in plan.frontier if p.score <= end or end == 0.0]
    name = "plans of least loss"
    if (hidden := len(plan.frontier) - len(near)) > 0:
        most = max(p.score for p in plan.frontier)
        name += f" ({hidden} more, up to a loss of {most:.3g}, are not shown)"
    return _drawn(ax, near, name, **_FRONTIER)


def _draw_targets(ax: Axes, plan: Plan, chosen: PlanPoint) -> list[Any]:
    """Draw the targets of the first setting; return the entries of a legend."""
    setting = attrgetter("hardware", "engine", "phase", "batch", "seq")
    chance = f" (probability\N{NO-BREAK SPACE}{100 * plan.confidence:.0f}\N{NO-BREAK SPACE}%)"
    own = [t for t in plan.targets if setting(t) == setting(plan.results[0]) and t.target in SPEEDS]
    handles = list[Any]()
    for t, line in zip(own, ("--", "-.", ":")):
        share = t.reached / t.wanted if t.target == "latency_s" else t.wanted / t.reached
        name = f"target: {NAMES[t.target]} {target_text(t.target, t.wanted)}"
        look: Look = {"color": PALE_INK, "linewidth": 0.8, "linestyle": line, "zorder": 1.6}
        look["label"] = _folded(name + (chance if plan.confidence > 0.5 else ""))
        handles.append(ax.axhline(chosen.speedup * share, **look))
    return handles


def _frontier(ax: Axes, plan: Plan) -> list[Any]:
    """Draw the frontier, the chosen plan and the targets; return the entries of a legend."""
    first = plan.results[0]
    chosen = next(point for point in plan.frontier if point.chosen)
    ends = f"{ratio(chosen.speedup_lower)}–{ratio(chosen.speedup_upper)}"
    reached = f"chosen plan, {ratio(chosen.speedup)}× ({ends})"
    handles = [
        _drawn(ax, [chosen], reached, zorder=5, **_CHOSEN),
        _draw_plans(ax, plan, chosen),
        layout.bar(first.level, up=True),
        *_draw_targets(ax, plan, chosen),
    ]
    ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    layout.log_axis(ax, "y", 7)
    many = f"{first.devices} × " if first.devices > 1 else ""
    title = f"{many}{layout.device(first)}, {layout.setting_label(first, seq=True)}"
    several = f"\n(first of {len(plan.results)} settings)" if len(plan.results) > 1 else ""
    share = 0.62 if layout.width_of(2) >= _BESIDE_IN else 1.0
    ax.set_title(_folded(title, 52, share) + several, pad=5)
    loss = f"quality loss: {plan.metric}, sum over the layers"
    ax.set_xlabel(_folded(loss, 74, share), labelpad=2)
    ax.set_ylabel("speedup (log scale)")
    return handles
