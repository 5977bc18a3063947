"""Draw the plan of a search: what stays of each layer, its quality loss, and the frontier with plans of other rules.

The upper panels have one column per layer: the shares of attention and MLP that stay, and the layer's quality loss. The
lower panel has speedup against quality loss in the first setting of the search.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from simulator.figures import layout
from simulator.figures.labels import write_labels
from simulator.figures.panels import device, interval
from simulator.figures.style import BLACK, BLUE, GREEN, GREY, INK, PAGE_IN, PALE_INK, VERMILLION, Style, paper_style
from simulator.figures.titles import model_title
from simulator.models.block import Block
from simulator.plans.solve import NAMES, target_text
from simulator.plans.variants import SUBLAYERS, has
from simulator.prediction.scenario import batch_name
from simulator.units import percent, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simulator.plans.search import AlternativePlan, Plan, PlanPoint
    from simulator.prediction.result import Result

UNCHANGED, EMPTY = "#C4C4C4", "#F1F1F1"
"""Colours of unchanged sublayers, and of the part that goes."""

RULES: dict[str, Style] = {
    "parameters": Style(VERMILLION, "s"),
    "FLOPs": Style(BLUE, "^"),
    "library times": Style(GREEN, "D"),
}
"""Look of the plans that other rules choose."""

BUDGETS = {"same": "as many", "targets": "until targets are met"}
"""Budgets of other rules in words; the first has hollow markers."""

STEEP = 4.0
"""A loss axis becomes logarithmic at a value that is this many times smaller than its end."""

NEARBY = 3.0
"""The axis of the frontier ends at this many times the loss of the chosen plan."""

_LINE = 0.075  # height of a target's text, as a share of the panel's height
_TARGETS = ("speedup", "latency_s", "tokens_per_s")  # targets that are a speedup in their setting


def plan_figure(plan: Plan) -> Figure:
    """Draw a plan: its layers above, its frontier below.

    Parameters
    ----------
    plan : Plan
        The plan of a search.

    Returns
    -------
    Figure
        A figure as wide as a page: panels of attention, MLP and quality loss by layer, the frontier, and its legend.

    Examples
    --------
    >>> from simulator.plans.search import search
    >>> figure = plan_figure(search("llama-2-7b", "h100", 1.3, batch=8))
    >>> [ax.get_label() for ax in figure.axes]
    ['attention', 'mlp', 'loss', 'frontier', 'legend']
    """
    from matplotlib.figure import Figure

    with paper_style():
        figure = Figure(figsize=(PAGE_IN, 4.8), layout="constrained")
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.04)
        rows = [["attention"] * 2, ["mlp"] * 2, ["loss"] * 2, ["frontier", "legend"]]
        sizes = {"height_ratios": [0.5, 0.6, 0.45, 2.0], "width_ratios": [4.0, 2.5]}
        axes: dict[str, Any] = figure.subplot_mosaic(rows, gridspec_kw=sizes)
        for name in SUBLAYERS:
            _sublayers(axes[name], name, plan)
        axes["attention"].set_title(layout.wrapped(_title(plan), PAGE_IN - 0.6), loc="left", pad=14)
        _legend_of_layers(axes["attention"])
        _losses(axes["loss"], plan)
        lines = _frontier_axes(axes["frontier"], plan)
        _legend_of_plans(axes["legend"], plan)
        layout.laid_out(figure)
        _frontier(axes["frontier"], plan, lines)
    return figure


def _title(plan: Plan) -> str:
    changed = sum((row.attention, row.mlp) != ("dense", "dense") for row in plan.layers)
    return f"{model_title(plan.model)}: {changed} of {len(plan.layers)} layers changed"


# -- the layers --------------------------------------------------------------------------------------------------------


def kept(sublayer: str, block: Block, dense: Block) -> float:
    """Return the share of a sublayer that stays: of an MLP its width, of experts their number times their width, of
    attention its heads or its KV heads, the smaller share.

    >>> dense = Block(32, 8, 14336)
    >>> kept("attention", Block(32, 4, 14336), dense), kept("mlp", Block(32, 8, 3584), dense)
    (0.5, 0.25)
    """
    if sublayer == "attention":
        return min(block.heads / dense.heads, block.kv_heads / dense.kv_heads)
    if dense.experts:
        return block.experts * block.expert_inner / (dense.experts * dense.expert_inner)
    return block.inner / dense.inner


def _sublayers(ax: Axes, sublayer: str, plan: Plan) -> None:
    """Draw one sublayer of all layers: bars, and marks of removed ones."""
    pairs = list(zip(plan.pruned.layout, plan.dense.layout))
    own = [i for i, (_, dense) in enumerate(pairs) if has(sublayer, dense)]
    linear = [i for i in own if sublayer in pairs[i][0].linear and sublayer not in pairs[i][1].linear]
    gone = [i for i in own if not has(sublayer, pairs[i][0])]
    sized = [i for i in own if i not in linear and i not in gone]
    text = dict(zip((row.layer for row in plan.layers), (getattr(row, sublayer) for row in plan.layers)))
    same = [i for i in sized if text[i] == "dense"]
    less = [i for i in sized if text[i] != "dense"]
    _bars(ax, own, [1.0] * len(own), color=EMPTY, zorder=1.5, label="dense")
    _bars(ax, same, [1.0] * len(same), color=UNCHANGED, label="unchanged")
    _bars(ax, less, [kept(sublayer, *pairs[i]) for i in less], color=BLUE, label="smaller")
    _bars(ax, linear, [1.0] * len(linear), **_LINEAR, label="linear")
    size = min(4.0, 260.0 / len(pairs))
    ax.plot(gone, [0.5] * len(gone), markersize=size, label="removed", zorder=3, **_REMOVED)
    ax.set(xlim=(-0.8, len(pairs) - 0.2), ylim=(0.0, 1.04), ylabel="MLP" if sublayer == "mlp" else sublayer)
    layout.fixed_ticks(ax.yaxis, [0.0, 0.5, 1.0], lambda value, _: f"{100 * value:.0f} %")
    _layer_axis(ax, len(pairs), named=False)


_REMOVED: dict[str, Any] = {"linestyle": "none", "marker": "x", "color": VERMILLION, "markeredgewidth": 0.9}
_LINEAR: dict[str, Any] = {"facecolor": "white", "edgecolor": GREEN, "hatch": "//////", "linewidth": 0.4}


def _bars(ax: Axes, at: Sequence[int], height: Sequence[float], **look: Any) -> None:
    """Draw bars of layers; without a layer, there is no bar, but the container has the label all the same."""
    ax.bar(at, height, width=0.8, **{"zorder": 2, "linewidth": 0, **look})


def _layer_axis(ax: Axes, layers: int, *, named: bool) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if layers / step <= 20)
    ax.grid(axis="x", visible=False)
    layout.fixed_ticks(ax.xaxis, range(0, layers, step), lambda value, _: f"{value:.0f}")
    ax.tick_params(axis="x", labelbottom=named, length=2.5 if named else 0)


def _losses(ax: Axes, plan: Plan) -> None:
    """Draw the quality loss of each layer."""
    values = np.array([row.score for row in plan.layers])
    ax.bar([row.layer for row in plan.layers], values, width=0.8, color=INK, linewidth=0, zorder=2, label="loss")
    rises = values[values > 0.0]
    bend = _loss_axis(ax.yaxis, values, float(np.median(rises)) if len(rises) else 0.0, most=3)
    ax.axhline(0.0, color=INK, linewidth=0.5, zorder=1.8)
    ax.set(xlim=(-0.8, len(plan.layers) - 0.2), xlabel="layer", ylabel="quality\nloss")
    ax.xaxis.labelpad = 2
    _layer_axis(ax, len(plan.layers), named=True)
    title = f"{textwrap.shorten(plan.metric, 70)} of each layer{_scale(bend)}"
    where: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 6, "color": PALE_INK}
    ax.text(1.0, 1.0, title, transform=ax.transAxes, **where)


def _legend_of_layers(ax: Axes) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=UNCHANGED, linewidth=0, label="unchanged"),
        Patch(facecolor=BLUE, linewidth=0, label="smaller (share of heads or width that stays)"),
        Patch(**_LINEAR, label="replaced by a linear layer"),
        Line2D([], [], **_REMOVED, markersize=4, label="removed"),
    ]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, "borderpad": 0.0}
    ax.legend(handles=handles, ncols=4, handlelength=1.2, columnspacing=1.0, **place)


# -- axes of losses ----------------------------------------------------------------------------------------------------


def _loss_axis(axis: Any, values: ArrayLike, usual: float, most: int) -> float | None:
    """Set the scale of an axis of losses: linear, or logarithmic from a value near the usual ones on if its end is
    far beyond; return that value."""
    numbers = np.asarray(values, dtype=float)
    low, high = min(0.0, float(numbers.min())), max(0.0, float(numbers.max()))
    if high == low:
        high = 1.0
    bend = next((t for t in _round_numbers(high) if t >= 1.5 * usual), high) if usual > 0.0 else high
    name, pad = axis.axis_name, 0.06 * (high - low)
    if high <= STEEP * bend or -low > bend:
        from matplotlib.ticker import MaxNLocator

        getattr(axis.axes, f"set_{name}lim")(low - pad if low < 0.0 else low, high + pad)
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(_plain)
        return None
    # the linear part takes half of the axis
    linear = 0.9 * np.log10(high / bend)
    getattr(axis.axes, f"set_{name}scale")("symlog", linthresh=bend, linscale=linear)
    getattr(axis.axes, f"set_{name}lim")(low * 1.05, high * 1.4)
    beyond = layout.log_ticks(bend * (high / bend) ** (1.0 / most), high, most // 2 + 1)
    few = [0.0, bend, *beyond[-1:]]
    layout.fixed_ticks(axis, few if most < 5 else [0.0, 0.5 * bend, bend, *beyond], _plain)
    getattr(axis.axes, "axvline" if name == "x" else "axhline")(bend, **_BEND)
    return bend


_BEND: dict[str, Any] = {"color": GREY, "linewidth": 0.7, "linestyle": (0, (1, 2)), "zorder": 1.4}


def _plain(value: float, _: object = None) -> str:
    return f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")


def _round_numbers(last: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten up to a value, ascending."""
    power = int(np.floor(np.log10(last)))
    return [t for p in range(power - 12, power + 1) for m in (1, 2, 5) if (t := float(f"{m}e{p}")) <= last]


def _scale(bend: float | None) -> str:
    """Return the part of an axis label that names its scale."""
    return "" if bend is None else f" (linear to {bend:g}, then logarithmic)"


# -- the frontier ------------------------------------------------------------------------------------------------------


def _chosen(plan: Plan) -> PlanPoint:
    return next(point for point in plan.frontier if point.chosen)


def _near(plan: Plan) -> list[PlanPoint]:
    """Return the plans of the frontier near the chosen plan and those of other rules."""
    chosen = _chosen(plan)
    most = max([NEARBY * abs(chosen.score), *(1.25 * a.point.score for a in plan.alternatives)])
    by_loss = sorted(plan.frontier, key=lambda p: p.score)
    near = [point for point in by_loss if point.score <= most]
    few = by_loss.index(chosen) + 2  # one more than the chosen one, however far
    return by_loss[: max(len(near), few)] if most > 0.0 else by_loss


def _others(plan: Plan) -> list[AlternativePlan]:
    """Return the plans of other rules that are not the chosen one."""
    chosen = _chosen(plan)
    return [a for a in plan.alternatives if (a.point.score, a.point.speedup) != (chosen.score, chosen.speedup)]


def _frontier_axes(ax: Axes, plan: Plan) -> list[tuple[float, str]]:
    """Set the axes of the frontier, and return the targets: the speedup and the text of each."""
    chosen, near = _chosen(plan), _near(plan)
    points = [*near, *(a.point for a in plan.alternatives)]
    lines = _targets(plan)
    ends = [e for p in points for e in (p.speedup_lower, p.speedup_upper)]
    low, high = min(1.0, *ends, *(x for x, _ in lines)), max(1.05, *ends, *(x for x, _ in lines))
    pad = (high / low) ** 0.05
    ax.set(yscale="log", ylim=(low / pad, high * pad))
    layout.log_axis(ax.yaxis, low / pad, high * pad, 7)
    bend = _loss_axis(ax.xaxis, [p.score for p in points], chosen.score, most=7)
    left, right = ax.get_xlim()
    ax.set_xlim(left - 0.02 * (right if bend is None else bend), right)
    first = plan.results[0]
    ax.set_title(textwrap.fill(_setting(first), 52) + _first(len(plan.results)), pad=5)
    ax.set_xlabel(textwrap.fill(f"quality loss: {plan.metric}, sum over the layers{_scale(bend)}", 74), labelpad=2)
    ax.set_ylabel("speedup (log scale)")
    _target_lines(ax, lines)
    return lines


def _setting(r: Result) -> str:
    many = f"{r.devices} × " if r.devices > 1 else ""
    return f"{many}{device(r)}, {r.phase}, {batch_name(r.phase)} {r.batch}, seq {r.seq}"


def _first(settings: int) -> str:
    return f"\n(first of {settings} settings)" if settings > 1 else ""


def _targets(plan: Plan) -> list[tuple[float, str]]:
    """Return targets of the first setting that are a speedup, the highest first, each with its text."""
    first, chosen, found = plan.results[0], _chosen(plan), []
    setting = (first.hardware, first.engine, first.phase, first.batch, first.seq)
    for t in plan.targets:
        if (t.hardware, t.engine, t.phase, t.batch, t.seq) == setting and t.target in _TARGETS:
            share = t.reached / t.wanted if t.target == "latency_s" else t.wanted / t.reached
            text = target_text(t.target, t.wanted)
            texts = {"speedup": f"target {ratio(t.wanted)}×", "latency_s": f"{NAMES[t.target]} {text}"}
            found.append((chosen.speedup * share, texts.get(t.target, text)))
    return sorted(dict.fromkeys(found), reverse=True)


def _target_lines(ax: Axes, lines: Sequence[tuple[float, str]]) -> None:
    """Draw the targets as lines, with their texts right of the panel, below each other."""
    bottom, top = np.log(ax.get_ylim())
    height = 1.0 + _LINE
    for speedup, text in lines:
        place = float((np.log(speedup) - bottom) / (top - bottom))
        height = min(place, height - _LINE)
        ax.axhline(speedup, color=PALE_INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.6)
        where: dict[str, Any] = {"transform": ax.transAxes, "va": "center", "fontsize": 6, "color": PALE_INK}
        ax.text(1.015, height, text, **where)


def _frontier(ax: Axes, plan: Plan, lines: Sequence[tuple[float, str]]) -> None:
    """Draw the plans; the layout must be final, because the name of the chosen plan depends on it."""
    chosen, others = _chosen(plan), _others(plan)
    points = [*sorted(plan.frontier, key=lambda p: p.speedup), *(a.point for a in others)]
    x, y, lower, upper = (
        np.array([getattr(p, name) for p in points]) for name in ("score", "speedup", "speedup_lower", "speedup_upper")
    )
    many = len(plan.frontier)
    ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    ax.vlines(x[:many], lower[:many], upper[:many], color=INK, linewidth=0.8, alpha=0.45, zorder=2)
    ax.plot(x[:many], y[:many], **_FRONTIER, zorder=3, label="frontier")
    for i, a in enumerate(others, start=many):
        color = RULES[a.chosen_by].color
        ax.vlines(x[i], lower[i], upper[i], color=color, linewidth=0.8, alpha=0.7, zorder=3.5)
        ax.plot(x[i : i + 1], y[i : i + 1], **_look(a), zorder=4, label=_name(a))
    ax.vlines(chosen.score, chosen.speedup_lower, chosen.speedup_upper, color=BLACK, linewidth=1.1, zorder=4.5)
    ax.plot([chosen.score], [chosen.speedup], **_CHOSEN, zorder=5, label="chosen plan")
    text = f"{ratio(chosen.speedup)}× ({ratio(chosen.speedup_lower)}–{ratio(chosen.speedup_upper)})"
    along = np.linspace(0.0, 1.0, 30)[:, None]
    bars = lower * (1.0 - along) + upper * along
    across = ax.transData.inverted().transform(ax.transAxes.transform(np.linspace((0.0, 0.0), (1.0, 0.0), 80)))[:, 0]
    corners = np.linspace(0, many - 1, 12 * many)
    curve = [np.interp(corners, np.arange(many), v[:many]) for v in (x, y)]
    clear_of = [(x, y), (np.broadcast_to(x, bars.shape).ravel(), bars.ravel()), (curve[0], curve[1])]
    clear_of += [(across, np.full_like(across, level)) for level in (1.0, *(v for v, _ in lines))]
    write_labels(ax, [chosen.score], [chosen.speedup], [text], clear_of, reach_pt=65.0)


_FRONTIER: dict[str, Any] = {"color": INK, "linewidth": 0.8, "marker": "o", "markersize": 2.6, "markeredgewidth": 0}
_CHOSEN: dict[str, Any] = {"color": BLACK, "linestyle": "none", "marker": "*", "markersize": 8, "markeredgewidth": 0}


def _look(a: AlternativePlan) -> dict[str, Any]:
    style = RULES[a.chosen_by]
    face = "white" if a.budget == "same" else style.color
    return style.marks(linestyle="none", markersize=4.4, markerfacecolor=face, markeredgewidth=0.9)


def _name(a: AlternativePlan) -> str:
    return f"by {a.chosen_by}, {BUDGETS[a.budget]}"


def _chosen_name(plan: Plan) -> str:
    """Return the name of the chosen plan, with the rules that choose it too."""
    others = _others(plan)
    same = [a for a in plan.alternatives if a not in others]
    partly = {a.chosen_by for a in others}
    names = dict.fromkeys(_name(a) if a.chosen_by in partly else f"by {a.chosen_by}" for a in same)
    return textwrap.fill(f"chosen plan{', also ' if names else ''}{'; '.join(names)}", _WIDE)


_WIDE = 38  # characters of a line of the legend


def _legend_of_plans(ax: Axes, plan: Plan) -> None:
    """Write the legend of the frontier into a panel of its own."""
    from matplotlib.lines import Line2D

    hidden = len(plan.frontier) - len(_near(plan))
    last = _plain(float(f"{max(p.score for p in plan.frontier):.3g}"))
    more = f" ({hidden} more, up to a loss of {last}, are outside the panel)" if hidden else ""
    bar: dict[str, Any] = {"marker": "|", "markersize": 6, "markeredgewidth": 0.9, "linestyle": "none"}
    handles = [
        Line2D([], [], **_CHOSEN, label=_chosen_name(plan)),
        Line2D([], [], **_FRONTIER, label=textwrap.fill(f"plans of least loss{more}", _WIDE)),
        Line2D([], [], color=INK, **bar, alpha=0.6, label=interval(plan.results[0].level)),
    ]
    if _targets(plan):
        sure = f" (probability {percent(plan.confidence)})" if plan.confidence > 0.5 else ""
        handles.append(Line2D([], [], color=PALE_INK, linewidth=0.8, linestyle=(0, (4, 2)), label=f"target{sure}"))
    handles += [Line2D([], [], **_look(a), label=_name(a)) for a in _others(plan)]
    ax.axis("off")
    legend = ax.legend(handles=handles, loc="center left", borderaxespad=0.0, borderpad=0.0)
    legend.set_in_layout(False)  # else a long line would make the panels of the layers narrower
