"""Predict speedups: of the product of models, devices, engines, prunings and requests
(:func:`table`), of one pruning (:func:`predict`), or of workloads (:func:`speedup`,
:func:`speedups`).

In a table, a combination that a family does not support (2:4 at 0.25) is excluded with a note if
there are several prunings, and an error if there is only one; likewise a device that cannot run the
dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from simulator.arguments import OneOrMore, listed
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.model import Model
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import request_results, results_of
from simulator.prediction.notes import (
    above_bound,
    computed_wide,
    dense_notes,
    differences,
    overridden,
)
from simulator.prediction.prunings import (
    KEYWORDS,
    Excluded,
    Pruning,
    applied,
    asked,
    exclude,
    excluded_lines,
    in_formats,
)
from simulator.prediction.requests import check_measured, engines_of, models_of, profiles
from simulator.prediction.result import Result, Results
from simulator.pruning._steps import PruningStep
from simulator.request import SETTINGS, Request, known
from simulator.workload import Workload


def table(
    models: OneOrMore[str | Model],
    hardware: OneOrMore[str | HardwareProfile],
    family: OneOrMore[str] | None = None,
    sparsity: OneOrMore[float] | None = None,
    **settings: Any,
) -> Results:
    """Predict the speedups of every combination.

    Parameters
    ----------
    models, hardware : one or more
        Names, paths or loaded objects; each is used once.
    family, sparsity : one or more
        Keys of :data:`simulator.FAMILIES`, or ``all``, the default; fractions removed, each in [0,
        1), by default :data:`simulator.prediction.prunings.SPARSITIES`.
    **settings
        Instead of families, one or more of ``pruned`` (existing pruned models, with one dense
        model), ``prune`` (texts such as ``"width mlp=0.3 + depth 0.25"``, paths of plans, or
        methods) and ``method`` (keys of :data:`simulator.METHODS`, paths of method files, or
        :class:`simulator.Method`, by default at the sparsities of their papers). A single family
        may have ``options``, a mapping.

        Then fields of :class:`simulator.Request`, such as ``phase``, ``batch``, ``seq`` and
        ``engine``; each is one value or a list, and lists are combined. Of several number formats,
        speedups are against the dense model in the first; in the others, the dense model has
        results too.

    Returns
    -------
    Results
        Ordered by model, the settings in the order of the fields of the request, pruning, hardware.

    Raises
    ------
    InputError
        For an unknown name or a value out of range, and if no combination can be predicted.

    Examples
    --------
    >>> found = table("llama-3.1-8b", "h100", ["depth", "semi_structured"], 0.25)
    >>> [(r.family, r.sparsity) for r in found]
    [('depth', 0.25)]
    >>> len(found.notes)
    1
    """
    loaded, devices = models_of(models), profiles(hardware)
    stated, every, skipped = asked(loaded, {"family": family, "sparsity": sparsity, **settings})
    prunings, requests = in_formats(stated, every)
    check_measured(requests, devices)
    rows = _Rows(prunings, devices)
    notes = dict.fromkeys((*skipped, *differences(loaded, prunings)))
    parts = []
    for request in requests:
        results = request_results([request], prunings, devices, rows.reject)
        able = [hw for hw in devices if hw.label not in rows.without]
        notes |= dict.fromkeys(
            (
                *overridden(request, (request.model, *(p.model for p in prunings))),
                *computed_wide(request, able, (p.model for p in prunings)),
                *(note for p in prunings for note in computed_wide(p.request(request), able, ())),
                *dense_notes(results, request, able),
                *above_bound(results, prunings, request, able),
            )
        )
        if len(results):
            parts.append(results)
    excluded = excluded_lines(rows.excluded)
    if not parts:
        raise InputError(next(iter((*rows.without.values(), *excluded)), "nothing to predict"))
    notes |= dict.fromkeys(
        f"{device} is excluded: {reason}" for device, reason in rows.without.items()
    )
    return replace(Results.join(parts, (*excluded, *notes)), prunings=prunings, requests=requests)


@dataclass(frozen=True)
class _Rows:
    """What a table excludes."""

    prunings: Sequence[Pruning]
    devices: Sequence[HardwareProfile]
    excluded: Excluded = field(default_factory=Excluded)
    # devices that cannot run the dense model, with the reason
    without: dict[str, str] = field(default_factory=dict)

    def reject(self, pruning: int | None, reason: str, device: str) -> None:
        if pruning is None and device and len(self.devices) > 1:
            self.without[device] = reason
        if device in self.without:
            return
        if pruning is None or len({(p.title, p.label) for p in self.prunings}) == 1:
            raise InputError(reason)
        exclude(self.excluded, self.prunings[pruning], reason, device)


def unable(
    model: str, hardware: Sequence[HardwareProfile], settings: dict[str, Any]
) -> dict[str, str]:
    """Return why some engines can run none of the prunings (default: one of depth), unless all
    cannot, by engine."""
    first = {n: v[:1] if n in SETTINGS and isinstance(v, list) else v for n, v in settings.items()}
    first |= {} if first.keys() & set(KEYWORDS) else {"prune": "depth 0.25"}
    reasons, engines = dict[str, str](), engines_of(settings["engine"])
    for engine in engines:
        try:
            table(model, hardware, **(first | {"engine": engine}))
        except InputError as error:
            reasons[engine] = str(error)
    return reasons if len(reasons) < len(engines) else {}


@overload
def predict(
    model: str | Model, prune: str, hardware: str | HardwareProfile, **settings: Any
) -> Result: ...


@overload
def predict(
    model: str | Model, prune: Sequence[str], hardware: str | HardwareProfile, **settings: Any
) -> Results: ...


def predict(
    model: str | Model,
    prune: str | Sequence[str],
    hardware: str | HardwareProfile,
    **settings: Any,
) -> Result | Results:
    """Predict one speedup; names are enough.

    Parameters
    ----------
    model : str or Model
        Name, path or shapes of the dense model.
    prune : str, or list of str
        Pruning as text, such as ``"width mlp=0.3 heads=0.2"``, or the path of a plan; or several.
    hardware : str or HardwareProfile
        The device.
    **settings
        Fields of :class:`simulator.Request`, such as ``phase``, ``batch``, ``seq`` and ``engine``.

    Returns
    -------
    Result or Results
        The speedup with its interval, times, bounds, bottleneck, memory and serving numbers; of a
        list of prunings, one result for each.

    Raises
    ------
    InputError
        For an unknown name, an invalid text or a value out of range, and if the engine or the
        device cannot run it.

    Examples
    --------
    >>> r = predict("llama-3.1-8b", "width mlp=0.3 attention=0.2", "h100", phase="decode", batch=8)
    >>> bool(1.1 < r.lower < r.speedup < r.upper < 1.4), r.realised_sparsity > 0.25
    (True, True)
    """
    for name, value in {"model": model, "hardware": hardware, **settings}.items():
        if isinstance(value, list | tuple):
            raise InputError(
                f"{name}: expected one value, got {len(value)}; simulator.table takes lists"
            )
    several = isinstance(prune, list | tuple)
    every = listed("prune", prune) if several else [prune]
    found = table(
        [Request(model=model, **known(settings)).model], [hardware], prune=every, **settings
    )
    return found if several else found[0]


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
        Pruned versions, from :func:`simulator.prune`, or of another model (such as a pruned
        checkpoint) lowered for the same request.
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
        If the device lacks a number format or 2:4 tensor cores that a workload needs, or if the
        workloads are not of the same phase, batch, lengths, engine and devices.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode")
    >>> pruned = [simulator.prune(dense, "depth", s) for s in (0.0, 0.25)]
    >>> [round(r.speedup, 2) for r in speedups(dense, pruned, simulator.load_hardware("h100"))]
    [1.0, 1.3]
    """
    hw = load_hardware(hw)
    # the batch checks the workloads
    batch, steps = batch_with(dense, pruned), [applied(dense, w) for w in pruned]
    prunings = [Pruning((PruningStep(family, requested),)) for family, requested, _ in steps]
    requested, realised = (np.array([0.0, *(step[i] for step in steps)]) for i in (1, 2))
    batch = replace(batch, sparsity=requested, realised=realised)
    level, dense_s = SETTINGS["level"].check(level), SETTINGS["dense_s"].check(dense_s)
    request = replace(dense.meta.asked, level=level, dense_s=dense_s)
    return results_of(batch, prunings, [hw], [request])


def speedup(
    dense: Workload,
    pruned: Workload,
    hw: str | HardwareProfile,
    level: float = 0.9,
    *,
    dense_s: float | None = None,
) -> Result:
    """Predict the speedup of one pruned workload over its dense workload on a device.

    Parameters
    ----------
    dense, pruned : Workload
        The two workloads; ``pruned`` may be of another model, such as a pruned checkpoint, lowered
        for the same request.
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
    >>> dense = simulator.lower("llama-3.1-8b", phase="decode", batch=1, seq=2048)
    >>> r = simulator.speedup(dense, simulator.prune(dense, "depth", sparsity=0.25), "h100")
    >>> bool(1.15 < r.lower < r.speedup < r.upper < 1 / 0.75)
    True
    """
    return speedups(dense, [pruned], hw, level, dense_s=dense_s)[0]
