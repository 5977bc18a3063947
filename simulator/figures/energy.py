"""Draw energy per token over batch, length or sparsity, and the share of energy that prunings save
against that of time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulator.figures import layout
from simulator.figures.speedup import AXES, varying
from simulator.figures.style import DENSE, GREY, Style, label, paper_style, styles_of
from simulator.models.library import model_title
from simulator.prediction.energy_sentences import ends_of, token_name
from simulator.prediction.requests import by_key
from simulator.prediction.result import Result
from simulator.prediction.tariff import Energy, Tariff


def energies_of(results: Sequence[Result], tariff: Tariff) -> Figure:
    """Draw two panels per device and setting: energy per token, and energy saved against time
    saved; above the diagonal, a pruning saves more energy than time."""
    axis = varying(results)
    names = {r: label(r.name if axis == "sparsity" else r.pruning) for r in results}
    looks = styles_of({names[r]: r.family for r in results})
    groups = by_key(results, lambda r: _title(r, axis))
    diagonal = layout.entry("as much energy as time", color=GREY, linestyle=":")
    handles = [*layout.marks({"dense": DENSE, **looks}), layout.bar(results[0].level), diagonal]
    with paper_style():
        titles = [*itertools.chain(*zip(groups, itertools.repeat("")))]
        figure, axes = layout.panel_list(
            2 * len(groups), 2.2, 0.4, 2, handles=handles, titles=titles, beside_in=1.0
        )
        for group, left, right in zip(groups.values(), axes[::2], axes[1::2]):
            for name, some in by_key(group, names.__getitem__).items():
                _draw_saved(right, looks[name], some, tariff)
                _draw_energies(left, looks[name], some, tariff, axis)
            _finish(left, right, axis, group[0])
        return layout.laid_out(figure)


def _finish(left: Axes, right: Axes, axis: str, first: Result) -> None:
    left.set(xlabel=AXES[axis], ylabel=f"energy per {token_name(first)} (J)")
    layout.log_axis(left, "y", 6)
    if axis != "sparsity":
        layout.log_axis(left, "x", 6)
    both = [*right.get_xlim(), *right.get_ylim()]
    ends = [min(both), max(both)]
    right.plot(ends, ends, color=GREY, linestyle=":", zorder=1)
    right.set(xlabel="time saved (%)", ylabel="energy saved (%)", xlim=ends, ylim=ends)


def _title(r: Result, axis: str) -> str:
    setting = layout.setting_label(r, batch=axis != "batch", seq=axis != "seq")
    return f"{model_title(r.model)} on {layout.device(r)}\n{setting}"


def _draw_energies(
    ax: Axes, style: Style, some: Sequence[Result], tariff: Tariff, axis: str
) -> None:
    energies = [Energy.of(r, tariff) for r in some]
    at = [getattr(r, axis) * (100.0 if axis == "sparsity" else 1.0) for r in some]
    ax.plot(at, [e.pruned_joules_per_token for e in energies], **style.marks())
    dense = [e.dense_joules_per_token for e in energies]
    ax.plot(*(([0.0], dense[:1]) if axis == "sparsity" else (at, dense)), **DENSE.marks())


def _draw_saved(ax: Axes, style: Style, some: Sequence[Result], tariff: Tariff) -> None:
    of_time = 1.0 - 1.0 / np.array([ends_of(r, "speedup") for r in some])
    of_energy = np.array([ends_of(Energy.of(r, tariff), "energy_saved") for r in some])
    (x, *across), (y, *along) = 100.0 * of_time.T, 100.0 * of_energy.T
    errors = {"xerr": np.abs(np.array(across) - x), "yerr": np.abs(np.array(along) - y)}
    ax.errorbar(x, y, **errors, elinewidth=0.6, **style.marks(linestyle="none"))
