"""Predict speedups: of the product of models, devices, engines, prunings and requests (:func:`table`), of one pruning
(:func:`predict`), or of workloads (:func:`speedup`, :func:`speedups`).

In a table, a combination that a family does not support (2:4 at 0.25) is excluded with a note if there are several
prunings, and an error if there is only one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.arguments import OneOrMore, listed, shown
from simulator.engines import DEFAULT_ENGINE
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import results_of, scenario_results
from simulator.prediction.prunings import Excluded, Pruning, applied, exclude, excluded_lines, prunings_of, readable
from simulator.prediction.result import Result, Results
from simulator.prediction.scenario import Scenario, check_measured, models_of, profiles, scenarios
from simulator.prediction.sentences import above_bound, dense_notes, difference_lines
from simulator.pruning._steps import PruningStep
from simulator.workload import Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload


def table(
    models: OneOrMore[str | ModelConfig],
    hardware: OneOrMore[str | HardwareProfile],
    family: OneOrMore[str] | None = None,
    sparsity: OneOrMore[float] | None = None,
    phase: OneOrMore[str] = "decode",
    batch: OneOrMore[int] = 1,
    seq: OneOrMore[int] = 2048,
    *,
    method: OneOrMore[str] = (),
    pruned: OneOrMore[str | ModelConfig] = (),
    prune: OneOrMore[str] = (),
    engine: OneOrMore[str] = (),
    scenario: Scenario | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Predict the speedups of every combination.

    Parameters
    ----------
    models, hardware : one or more
        Names, paths or loaded objects; each is used once. Every axis is one value or a sequence.
    family, sparsity : one or more
        Keys of :data:`simulator.FAMILIES`, or ``all``, the default; fractions removed, each in [0, 1), by default
        :data:`simulator.prediction.prunings.SPARSITIES`.
    phase, batch, seq : one or more
        Phases of :data:`simulator.codes.PHASES`; sequences; tokens (prefill) or cached positions (decode) each.
    method : one or more
        Published methods instead of families, keys of :data:`simulator.METHODS`; by default at the sparsities that
        their papers report.
    pruned : one or more
        Existing pruned models (paths of checkpoints) instead of families, with one dense model.
    prune : one or more
        Texts such as ``"width mlp=0.3 + depth 0.25"``, or paths of plans, instead of families
        (:mod:`simulator.pruning._grammar`).
    engine : one or more
        Names or paths (:func:`simulator.list_engines`); by default the scenario's engine.
    scenario : Scenario
        Common inputs: number formats, devices, new tokens, level of the intervals, a measured dense time, and whether
        work that pruning adds is excluded (:class:`simulator.prediction.scenario.Scenario`).
    options : mapping
        Further options of a single family.
    progress : callable
        Called with combinations done and their number.

    Returns
    -------
    Results
        Ordered by model, engine, phase, batch, seq, pruning, hardware.

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
    if not isinstance(options, Mapping | None):
        raise InputError(f"options: expected a mapping from option to value, got {shown(options)}")
    loaded, devices = models_of(models), profiles(hardware)
    requested = scenarios(scenario, loaded, engine, phase, batch, seq)
    chosen, fractions = (None if v is None else listed(n, v) for n, v in (("family", family), ("sparsity", sparsity)))
    existing, skipped = readable(listed("pruned", pruned))
    texts = listed("prune", prune)
    prunings = prunings_of(loaded, chosen, listed("method", method), existing, fractions, options, texts)
    check_measured(requested, devices)
    several, excluded = len({(p.title, p.label) for p in prunings}) > 1, Excluded()

    def reject(pruning: int | None, reason: str, device: str) -> None:
        if pruning is None or not several:
            raise InputError(reason)
        exclude(excluded, prunings[pruning], reason, device)

    pairs = dict.fromkeys((m, p.model or m) for m in loaded for p in prunings)
    notes = dict.fromkeys((*skipped, *(line for pair in pairs for line in difference_lines(*pair))))
    found = []
    for done, one in enumerate(requested, start=1):
        results = scenario_results(one, prunings, devices, reject)
        lines = [*dense_notes(results, one, devices), *above_bound(results, prunings, one, devices)]
        notes |= dict.fromkeys(lines)
        if len(results):
            found.append(results)
        if progress is not None:
            progress(done * len(devices), len(requested) * len(devices))
    if not found:
        raise InputError(next(iter(excluded_lines(excluded)), "nothing to predict"))
    return replace(Results.join(found, (*notes, *excluded_lines(excluded))), prunings=prunings)


def predict(
    model: str | ModelConfig,
    prune: str,
    hardware: str | HardwareProfile,
    *,
    phase: str = "decode",
    batch: int = 1,
    seq: int = 2048,
    engine: str = DEFAULT_ENGINE,
    new_tokens: int = 128,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kv_dtype: str | None = None,
    devices: int = 1,
    parallel: str = "tensor",
    link: str | None = None,
    ideal: bool = False,
    level: float = 0.9,
    dense_s: float | None = None,
) -> Result:
    """Predict one speedup; names are enough.

    Parameters
    ----------
    model : str or ModelConfig
        Name, path or shapes of the dense model.
    prune : str
        Pruning as text, such as ``"width mlp=0.3 heads=0.2"``, or the path of a plan.
    hardware : str or HardwareProfile
        The device.
    phase : {"prefill", "decode", "generate", "serve"}
        Phase of inference.
    batch : int
        Sequences, or requests in flight of serve; at least 1.
    seq : int
        Prompt tokens (prefill) or cached positions (decode) of each sequence; at least 1.
    engine : str
        Name or path of the engine.
    new_tokens : int
        Tokens that generate and serve decode.
    dtype : str
        Number format of activations and arithmetic.
    weight_dtype, kv_dtype : str, optional
        Number formats of weights and of the K/V cache, as in :class:`simulator.Scenario`.
    devices : int
        Number of devices.
    parallel : {"tensor", "expert", "pipeline"}
        How devices share the model.
    link : str, optional
        What joins the devices, as in :class:`simulator.Scenario`.
    ideal : bool
        Exclude the work that pruning adds.
    level : float
        Level of the intervals, in (0, 1).
    dense_s : float, optional
        Measured time of the dense model's pass, s.

    Returns
    -------
    Result
        The speedup with its interval, times, bounds, bottleneck, memory and serving numbers.

    Raises
    ------
    InputError
        For an unknown name, an invalid text or a value out of range, and if the engine or the device cannot run it.

    Examples
    --------
    >>> r = predict("llama-3.1-8b", "width mlp=0.3 attention=0.2", "h100", phase="decode", batch=8)
    >>> bool(1.1 < r.lower < r.speedup < r.upper < 1.4), r.realised_sparsity > 0.25
    (True, True)
    """
    scenario = Scenario(
        new_tokens=new_tokens,
        engine=engine,
        dtype=dtype,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        devices=devices,
        parallel=parallel,
        link=link,
        ideal=ideal,
        level=level,
        dense_s=dense_s,
    )
    return table([model], [hardware], prune=[prune], phase=[phase], batch=[batch], seq=[seq], scenario=scenario)[0]


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
