"""From explanations to the panels that figures take: steps of a waterfall, GEMMs on a roofline.

Use :func:`steps_of` and :func:`roof_of` with an :class:`simulator.predict.table.Explanation`; the paper's figures, the
command line and the page all draw these panels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.figures.roofline import Roof
from simulator.figures.waterfall import Steps
from simulator.predict.gemms import gemm_points

if TYPE_CHECKING:
    from simulator.predict.table import Explanation


def steps_of(e: Explanation, title: str) -> Steps:
    """The loss waterfall of an explanation as a panel.

    >>> from simulator.predict.table import explanations
    >>> (e,) = explanations("llama-3.1-8b", ["h100"], "width", 0.25)
    >>> steps_of(e, "h100").names[-1], bool(steps_of(e, "h100").lower == e.record.speedup_lower)
    ('launch or host time', True)
    """
    return Steps(
        title,
        [s.name for s in e.steps[1:]],
        [s.factor for s in e.steps[1:]],
        e.steps[0].speedup,
        e.record.speedup_lower,
        e.record.speedup_upper,
    )


def roof_of(e: Explanation, title: str, *, layers_only: bool = False) -> Roof:
    """Dense and pruned GEMMs of an explanation on its device's datasheet roofline, as a panel.

    Parameters
    ----------
    e : Explanation
    title : str
    layers_only : bool
        Leave out the head, which computes one position of a prompt and lies far off the others.
    """
    models = [w.take(w.layer >= 0) if layers_only else w for w in (e.dense, e.pruned)]
    dense, pruned = (gemm_points(w, e.hardware, e.record.runtime) for w in models)
    return Roof(
        title,
        e.hardware.peak_flop_per_s(e.record.dtype),
        e.hardware.bandwidth_bytes_per_s,
        (*dense.role, *pruned.role),
        [*dense.intensity, *pruned.intensity],
        [*dense.achieved_flop_per_s, *pruned.achieved_flop_per_s],
        [False] * len(dense.role) + [True] * len(pruned.role),
    )
