"""Aligned widths around a sparsity, and where time steps down between them: part of :mod:`simulator.predict.advise`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.errors import InputError
from simulator.pruning import prune
from simulator.workload import Workload

if TYPE_CHECKING:
    from simulator.predict.compare import Comparison

ALIGN = 16
"""Widths looked at are multiples of it, as the families round to."""

REACH = 0.06
"""How far around the width that was found, as a share of the dense one."""

STEPS = 3
"""Steps named at most."""

STEEP = 3.0
"""A step is a fall of the time so many times the average over its surroundings."""


@dataclass(frozen=True)
class WidthStep:
    """A width at which time has just stepped down.

    Attributes
    ----------
    name : str
        What is that wide: "inner" (of the MLP), "hidden", or "rank" (of the down projection).
    width : int
    sparsity : float
        Fraction to ask the family for to get it (width: of the MLP alone, attention as advised).
    pruned_s, speedup : float
    saved : float
        Share of the time saved against the next wider aligned width.
    reached : bool
        Whether the target is reached there.
    """

    name: str
    width: int
    sparsity: float
    pruned_s: float
    speedup: float
    saved: float
    reached: bool


def width_steps(
    dense: Workload,
    family: str,
    sparsity: float,
    compare: Callable[[Sequence[Workload]], Comparison],
    target: float,
    ideal: bool,
) -> tuple[WidthStep, ...]:
    """Where time steps down around a sparsity.

    Parameters
    ----------
    dense : Workload
    family : str
        Families that change no width have no steps.
    sparsity : float
        Around which to look; for "width" its KV groups are kept and the inner width varied.
    compare : callable
        Workloads -> their times against the dense one, which is at index 0.
    target : float
    ideal : bool

    Returns
    -------
    tuple of WidthStep
        At most :data:`STEPS`, wider first.
    """
    name, widths, fractions, asked = _candidates(dense, family, sparsity)
    made: list[Workload] = []
    kept: list[int] = []
    for i, choice in enumerate(asked):
        try:
            made.append(prune(dense, family, choice, ideal=ideal))
        except InputError:
            continue
        kept.append(i)
    if len(made) < 4:
        return ()
    c = compare(made)
    time, speed = c.pruned_s[1:], c.speedup[1:]
    width = np.array([widths[i] for i in kept])
    fall = time[1:] / time[:-1] - 1.0  # widths rise, and time with them: what the next wider one costs more
    steep = np.flatnonzero(fall > max(1e-4, STEEP * max(float(np.log(time[-1] / time[0])) / len(fall), 0.0)))
    steep = steep[np.argsort(-fall[steep], kind="stable")][:STEPS]
    return tuple(
        WidthStep(
            name,
            int(width[i]),
            fractions[kept[i]],
            float(time[i]),
            float(speed[i]),
            float(1.0 - time[i] / time[i + 1]),
            bool(speed[i] >= target),
        )
        for i in sorted(steep.tolist(), reverse=True)
    )


def _candidates(dense: Workload, family: str, sparsity: float) -> tuple[str, list[int], list[float], list[Any]]:
    """Name of the width a family changes, widths around the one at a sparsity, and the fraction and the choice that give each."""
    down = np.flatnonzero(dense.is_role("down") & (dense.stage == 0))
    if not len(down):
        return "", [], [], []
    hidden, inner = int(dense.n[down].max()), int(dense.k[down].max())
    if family == "width":
        widths = _around(inner, (1.0 - sparsity) * inner)
        fractions = [1.0 - w / inner for w in widths]
        return "inner", widths, fractions, [{"attention": sparsity, "mlp": f} for f in fractions]
    if family == "width_cross":
        widths = _around(hidden, (1.0 - sparsity) * hidden)
        fractions = [1.0 - w / hidden for w in widths]
        return "hidden", widths, fractions, list(fractions)
    if family == "low_rank":
        most = hidden * inner / (hidden + inner)  # rank at which the factors are as large as the weight
        widths = _around(int(most), (1.0 - sparsity) * most)
        fractions = [1.0 - w / most for w in widths]
        return "rank", widths, fractions, list(fractions)
    return "", [], [], []


def _around(largest: int, width: float) -> list[int]:
    """Aligned widths around one, rising; fractions stay within [0, 1)."""
    low = max(ALIGN, round((width - REACH * largest) / ALIGN) * ALIGN)
    high = min(largest // ALIGN * ALIGN, round((width + REACH * largest) / ALIGN) * ALIGN)
    return list(range(low, high + 1, ALIGN))
