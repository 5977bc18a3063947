"""Predict speedups of pruned workloads over their dense workload on a device.

Use :func:`speedup` for one pair, :func:`speedups` for many pruned versions of one dense workload (one vectorised pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import results_of
from simulator.prediction.prunings import Pruning, applied
from simulator.prediction.result import Result, Results
from simulator.prediction.scenario import Scenario
from simulator.pruning._steps import PruningStep
from simulator.workload import Workload


def speedups(
    dense: Workload,
    pruned: Sequence[Workload],
    hw: str | HardwareProfile,
    level: float = 0.9,
    *,
    dense_s: float | None = None,
) -> Results:
    """Predict the speedups of many pruned versions of a dense workload on one device.

    Parameters
    ----------
    dense : Workload
        The dense workload, from :func:`simulator.lower`.
    pruned : sequence of Workload
        Pruned versions, from :func:`simulator.prune`, or of another model (such as a pruned checkpoint) lowered for the
        same request.
    hw : str or HardwareProfile
        The device: a name, or a profile from :func:`simulator.load_hardware`.
    level : float
        Level of the intervals, in (0, 1).
    dense_s : float, optional
        Measured time of ``dense``, s. Shifts predictions and narrows intervals.

    Returns
    -------
    Results
        One :class:`~simulator.prediction.result.Result` per pruned workload, in order.

    Raises
    ------
    InputError
        If the device lacks a number format or 2:4 tensor cores that a workload needs, or if the workloads are not of
        the same phase, batch, lengths, engine and devices.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode")
    >>> pruned = [simulator.prune(dense, "depth", s) for s in (0.0, 0.25)]
    >>> [round(r.speedup, 2) for r in speedups(dense, pruned, simulator.load_hardware("h100"))]
    [1.0, 1.27]
    """
    hw = load_hardware(hw)
    batch, steps = batch_with(dense, pruned), [applied(dense, w) for w in pruned]
    prunings = [Pruning((PruningStep(family, requested),)) for family, requested, _ in steps]
    requested, realised = (np.array([0.0, *(step[i] for step in steps)]) for i in (1, 2))
    batch = replace(batch, sparsity=requested, realised=realised)
    about = dense.meta
    scenario = Scenario(phase=about.phase, shapes=((about.batch, about.seq),), level=level, dense_s=dense_s)
    return results_of(batch, prunings, [hw], scenario)


def speedup(
    dense: Workload, pruned: Workload, hw: str | HardwareProfile, level: float = 0.9, *, dense_s: float | None = None
) -> Result:
    """Predict the speedup of one pruned workload over its dense workload on a device.

    Parameters
    ----------
    dense, pruned : Workload
        The two workloads; ``pruned`` may be of another model, such as a pruned checkpoint, lowered for the same
        request.
    hw : str or HardwareProfile
        The device: a name, or a profile.
    level : float
        Level of the intervals, in (0, 1).
    dense_s : float, optional
        Measured time of ``dense``, s. Shifts predictions and narrows intervals.

    Returns
    -------
    Result
        Times, the speedup with its interval, bounds, bottleneck, memory and serving numbers.

    Raises
    ------
    InputError
        As :func:`speedups`.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", batch=1, seq=2048)
    >>> r = simulator.speedup(dense, simulator.prune(dense, "depth", sparsity=0.25), "h100")
    >>> bool(1.15 < r.lower < r.speedup < r.upper < 1 / 0.75)
    True
    """
    return speedups(dense, [pruned], hw, level, dense_s=dense_s)[0]
