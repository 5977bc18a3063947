"""Draw energy per token over batch, length or sparsity, and the share of energy that prunings save
against that of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulator.figures import layout
from simulator.figures.speedup import AXES, varying
from simulator.figures.style import DENSE, GREY, INK, Style, label, paper_style, styles_of
from simulator.prediction.energy_sentences import ends_of
from simulator.prediction.requests import by_key
from simulator.prediction.result import Result
from simulator.prediction.tariff import Energy, Tariff

_TICKS = 9  # most values that an axis names


def energies_of(results: Sequence[Result], tariff: Tariff) -> Figure:
    """Draw two panels per device and setting: energy per token, and energy saved against time
    saved; below the diagonal, a pruning saves less energy than time."""
    axis = varying(results)
    names = {r: label(r.name) if axis == "sparsity" else r.pruning for r in results}
    looks = styles_of({names[r]: r.family for r in results})
    groups = by_key(results, lambda r: _title(r, axis))
    handles = [
        layout.entry(name, **style.marks(markersize=3.5))
        for name, style in {"dense": DENSE, **looks}.items()
    ]
    handles.append(layout.entry(layout.interval(results[0].level), color=INK, linewidth=0.6))
    handles.append(layout.entry("as much energy as time", color=GREY, linestyle=":"))
    with paper_style():
        figure, axes, _ = layout.panel_list(2 * len(groups), 2.2, 0.4, 2, handles=handles)
        for (title, group), left, right in zip(groups.items(), axes[::2], axes[1::2]):
            left.set_title(title, pad=5)
            for name, some in by_key(group, names.__getitem__).items():
                energies = [Energy.of(r, tariff) for r in some]
                _draw_use(left, looks[name], some, energies, axis)
                _draw_saved(right, looks[name], some, energies)
            _finish(left, right, axis, group)
        return layout.laid_out(figure)


def _title(r: Result, axis: str) -> str:
    sizes = [f"{name} {getattr(r, name)}" for name in ("batch", "seq") if name != axis]
    return f"{r.model} on {layout.device(r)}\n{', '.join([r.phase, *sizes])}"


def _draw_use(
    ax: Axes, style: Style, some: Sequence[Result], energies: Sequence[Energy], axis: str
) -> None:
    at = [getattr(r, axis) * (100.0 if axis == "sparsity" else 1.0) for r in some]
    ax.plot(at, [e.pruned_joules_per_token for e in energies], **style.marks(markersize=3))
    where = [0.0] if axis == "sparsity" else at
    dense = [e.dense_joules_per_token for e in energies][: len(where)]
    ax.plot(where, dense, **DENSE.marks(markersize=3))


def _draw_saved(ax: Axes, style: Style, some: Sequence[Result], energies: Sequence[Energy]) -> None:
    of_time = 100.0 * (1.0 - 1.0 / np.array([ends_of(r, "speedup") for r in some]))
    of_energy = 100.0 * np.array([ends_of(e, "energy_saved") for e in energies])
    (x, *across), (y, *along) = of_time.T, of_energy.T
    for pair, ends in zip(zip(x, y), zip(*across, *along)):
        ax.hlines(pair[1], *ends[:2], color=style.color, linewidth=0.6, alpha=0.6)
        ax.vlines(pair[0], *ends[2:], color=style.color, linewidth=0.6, alpha=0.6)
    ax.plot(x, y, **style.marks(markersize=4, linestyle="none"))


def _finish(left: Axes, right: Axes, axis: str, group: Sequence[Result]) -> None:
    per = "prompt token" if group[0].phase == "prefill" else "new token"
    left.set(xlabel=AXES[axis], ylabel=f"energy per {per} (J)", yscale="log")
    layout.log_axis(left.yaxis, *left.get_ylim(), 6)
    if axis != "sparsity":
        left.set_xscale("log")
        values = sorted({getattr(r, axis) for r in group})
        layout.fixed_ticks(
            left.xaxis, values[:: -(-len(values) // _TICKS)], lambda x, _: f"{x:,.0f}"
        )
    ends = [
        min(right.get_xlim()[0], right.get_ylim()[0]),
        max(right.get_xlim()[1], right.get_ylim()[1]),
    ]
    right.plot(ends, ends, color=GREY, linestyle=":", linewidth=0.9, zorder=1)
    right.set(xlabel="time saved (%)", ylabel="energy saved (%)", xlim=ends, ylim=ends)
