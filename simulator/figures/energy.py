"""Draw energy per token over batch, length or sparsity, and the share of energy that prunings save
against that of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulator.figures import layout
from simulator.figures.speedup import AXES, varying
from simulator.figures.style import DENSE, GREY, INK, Style, label, paper_style, styles_of
from simulator.models.library import model_title
from simulator.prediction.energy_sentences import ends_of, token_name
from simulator.prediction.requests import by_key
from simulator.prediction.result import Result
from simulator.prediction.tariff import Energy, Tariff


def energies_of(results: Sequence[Result], tariff: Tariff) -> Figure:
    """Draw two panels per device and setting: energy per token, and energy saved against time
    saved; above the diagonal, a pruning saves more energy than time."""
    axis = varying(results)
    names = {r: label(r.name) if axis == "sparsity" else r.pruning for r in results}
    looks = styles_of({names[r]: r.family for r in results})
    groups = by_key(results, lambda r: _title(r, axis))
    with paper_style():
        figure, axes, columns = layout.panel_list(
            2 * len(groups), 2.2, 0.4, 2, handles=_handles(looks, results[0])
        )
        for (title, group), left, right in zip(groups.items(), axes[::2], axes[1::2]):
            left.set_title(layout.wrapped(title, layout.width_of(2) / columns - 0.5), pad=5)
            for name, some in by_key(group, names.__getitem__).items():
                _draw((left, right), looks[name], some, tariff, axis)
            _finish(left, right, axis, group[0])
        return layout.laid_out(figure)


def _handles(looks: Mapping[str, Style], first: Result) -> list[Any]:
    return [
        *(layout.entry(n, **style.marks()) for n, style in {"dense": DENSE, **looks}.items()),
        layout.entry(layout.interval(first.level), color=INK, linewidth=0.6),
        layout.entry("as much energy as time", color=GREY, linestyle=":"),
    ]


def _title(r: Result, axis: str) -> str:
    sizes = [f"{name} {getattr(r, name)}" for name in ("batch", "seq") if name != axis]
    return f"{model_title(r.model)} on {layout.device(r)}\n{', '.join([r.phase, *sizes])}"


def _draw(
    axes: tuple[Axes, Axes], style: Style, some: Sequence[Result], tariff: Tariff, axis: str
) -> None:
    energies, sparsity = [Energy.of(r, tariff) for r in some], axis == "sparsity"
    at = [getattr(r, axis) * (100.0 if sparsity else 1.0) for r in some]
    dense = [e.dense_joules_per_token for e in energies]
    axes[0].plot(at, [e.pruned_joules_per_token for e in energies], **style.marks())
    axes[0].plot([0.0] if sparsity else at, dense[:1] if sparsity else dense, **DENSE.marks())
    of_time = 1.0 - 1.0 / np.array([ends_of(r, "speedup") for r in some])
    of_energy = np.array([ends_of(e, "energy_saved") for e in energies])
    (x, *across), (y, *along) = 100.0 * of_time.T, 100.0 * of_energy.T
    errors = {"xerr": np.abs(np.array(across) - x), "yerr": np.abs(np.array(along) - y)}
    axes[1].errorbar(x, y, **errors, elinewidth=0.6, **style.marks(linestyle="none"))


def _finish(left: Axes, right: Axes, axis: str, first: Result) -> None:
    left.set(xlabel=AXES[axis], ylabel=f"energy per {token_name(first)} (J)", yscale="log")
    layout.log_axis(left.yaxis, *left.get_ylim(), 6)
    if axis != "sparsity":
        left.set_xscale("log")
        layout.log_axis(left.xaxis, *left.get_xlim(), 6)
    both = [*right.get_xlim(), *right.get_ylim()]
    ends = [min(both), max(both)]
    right.plot(ends, ends, color=GREY, linestyle=":", zorder=1)
    right.set(xlabel="time saved (%)", ylabel="energy saved (%)", xlim=ends, ylim=ends)
