"""Predict the content of the page: the table, explanations of the pruning in detail, curves and the map of winners.

Use :func:`predictions`, :func:`curves`, :func:`services` and :func:`winners`; they cache the last states. A state that
cannot be predicted gives a line of text, never an exception.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from simulator.errors import InputError
from simulator.explore.state import EXISTING, State, seconds_of
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.figures.style import label
from simulator.prediction.caveats import uncalibrated
from simulator.prediction.compare import scenario_results
from simulator.prediction.crossover import winners as fastest
from simulator.prediction.explain import Explanation, explanations
from simulator.prediction.operating import Service
from simulator.prediction.prunings import Excluded, Pruning, exclude, excluded_lines
from simulator.prediction.result import Result
from simulator.prediction.service import serve
from simulator.prediction.table import table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.prediction.scenario import Scenario

KEPT = 8
"""Number of cached states: those of one page and its pin, of a few tabs. A state of all GPUs has 7 MB."""


class Candidate(NamedTuple):
    """A prediction and what it is of: a family, a text of ``--prune`` or EXISTING."""

    key: str
    result: Result

    @property
    def title(self) -> str:
        """Name of the family, text or existing pruned model."""
        return self.result.pruned or label(self.key)


@dataclass(frozen=True)
class Predictions:
    """Predictions of a state."""

    table: tuple[Result, ...] = ()  # every drawn family, sparsity and GPU; empty if there is a problem
    prunings: tuple[Result, ...] = ()  # texts of --prune on every GPU
    existing: tuple[Result, ...] = ()  # the existing pruned model, one per GPU
    details: tuple[Explanation, ...] = ()  # the pruning in detail, one per GPU that can run it
    versus: tuple[Explanation, ...] = ()  # the same explanations in the second engine
    notes: tuple[str, ...] = ()  # one line each
    gpus: tuple[HardwareProfile, ...] = ()  # GPUs that support the number format
    problem: str = ""  # why the table is empty

    @property
    def results(self) -> tuple[Result, ...]:
        """All predictions except those of the curves and the map."""
        return (*self.table, *self.prunings, *self.existing)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All results with their keys."""
        families = (Candidate(r.family, r) for r in self.table)
        return (*families, *(Candidate(r.prune or EXISTING, r) for r in (*self.prunings, *self.existing)))


@dataclass(frozen=True)
class MapCell:
    """The fastest family of one cell of the map; ``winner`` is empty if it is not faster than the dense model."""

    best: Result
    winner: str
    certain: bool


def predictions(state: State) -> Predictions:
    """Return the table and the explanations of a state; a changed profile file is read again.

    >>> found = predictions(State(families=("depth", "width"), sparsities=(0.25,), at=0.25))
    >>> [(r.family, r.sparsity) for r in found.table], len(found.details), found.problem
    ([('depth', 0.25), ('width', 0.25)], 1, '')
    """
    return _predictions(replace(state, pin=None), state.profiles)


@lru_cache(maxsize=KEPT)
def _predictions(state: State, profiles: tuple[HardwareProfile, ...]) -> Predictions:
    gpus, excluded = _gpus(state, profiles)
    scenario, request = state.scenario, ([state.phase], [state.batch], [state.seq])
    try:
        model = state.load()
        found = table([model], gpus, state.drawn, state.fractions, *request, scenario=scenario)
    except InputError as error:
        hint = f"; weights alone may be in {state.dtype}" if state.dtype in ("fp8", "int8") and excluded is None else ""
        return Predictions(problem=f"{error}{hint}")
    notes = [*(excluded or ()), *_measured(state), *found.notes]
    prunings = _others(state, gpus, notes, prune=state.texts)
    pruned = state.load_pruned()
    existing = () if pruned is None else _others(state, gpus, notes, pruned=[pruned])
    notes += uncalibrated(found)
    if state.arithmetic != state.dtype:
        notes.append(f"{found[0].weight_dtype} weights are computed in {state.arithmetic}, not {state.dtype}")
    details = _explained(state, model, gpus, scenario, notes)
    versus = _explained(state, model, gpus, state.scenario_versus, notes) if state.scenario_versus else ()
    return Predictions(found.rows, prunings, existing, details, versus, tuple(notes), gpus)


def _others(
    state: State,
    gpus: tuple[HardwareProfile, ...],
    notes: list[str],
    prune: Sequence[str] = (),
    pruned: Sequence[ModelConfig] = (),
) -> tuple[Result, ...]:
    """Return the predictions of texts of ``--prune`` or of the existing pruned model; add their notes to ``notes``."""
    if not prune and not pruned:
        return ()
    request = [state.phase], [state.batch], [state.seq]
    try:
        found = table([state.load()], gpus, None, None, *request, pruned=pruned, prune=prune, scenario=state.scenario)
    except InputError as error:
        notes.append("; ".join([*(f"{model.name}: {error}" for model in pruned)] or [str(error)]))
        return ()
    notes += (note for note in found.notes if note not in notes)
    return found.rows


def _explained(
    state: State, model: ModelConfig, gpus: tuple[HardwareProfile, ...], scenario: Scenario, notes: list[str]
) -> tuple[Explanation, ...]:
    """Return the explanations in detail of each GPU; note each GPU without one, unless there is a note already."""
    out: list[Explanation] = []
    request: dict[str, Any] = {"phase": [state.phase], "batch": [state.batch], "seq": [state.seq]}
    which = _in_detail(state)
    for gpu in gpus:
        try:
            out += explanations(model, [gpu], scenario=scenario, **request, **which)
        except InputError as error:
            if not any(str(error) in note for note in notes):
                at = f" at {state.at:g}" if "family" in which else ""
                notes.append(f"{state.explained} on {gpu.label}{at}: {error}")
    return tuple(out)


def _measured(state: State) -> list[str]:
    """Return why a measured time is not used; if it is used, the table has a note."""
    if state.dense_ms is None or state.scenario.dense_s is not None:
        return []
    return [f"measured dense time: not used: it applies to one GPU, but {len(state.gpus)} are selected"]


def _gpus(state: State, profiles: tuple[HardwareProfile, ...]) -> tuple[tuple[HardwareProfile, ...], list[str] | None]:
    """Return the GPUs that support the number format and a note on each of the others; if no GPU supports it, all GPUs
    (so that predictions fail with the reason) and None."""
    supported, notes = [], []
    for gpu in profiles:
        try:
            gpu.peak_flop_per_s(state.arithmetic)
            supported.append(gpu)
        except InputError as error:
            notes.append(f"{error}: excluded")
    return (tuple(supported), notes) if supported else (profiles, None)


@dataclass(frozen=True)
class Curves:
    """Speedups along an axis: every drawn family at its sparsity, text of ``--prune`` and the existing pruned model."""

    candidates: tuple[Candidate, ...] = ()
    problem: str = ""  # why there are none


def curves(state: State, over: str) -> Curves:
    """Return the speedups of a state over :data:`simulator.explore.state.AXES`.

    >>> found = curves(State(families=("depth",), detail="depth", prune=("width mlp=0.5",), phase="decode"), "batch")
    >>> [(c.key, c.result.batch) for c in found.candidates[::9]]
    [('depth', 1), ('width mlp=0.5', 16)]
    """
    return _curves(replace(state, pin=None), over, state.profiles)


@lru_cache(maxsize=KEPT)
def _curves(state: State, over: str, profiles: tuple[HardwareProfile, ...]) -> Curves:
    gpus, _ = _gpus(state, profiles)
    excluded = Excluded()

    def reject(pruning: int | None, reason: str, device: str = "") -> None:
        if pruning is None:
            raise InputError(reason)
        exclude(excluded, prunings[pruning], reason, device)

    try:
        model, pruned = state.load(), state.load_pruned()
        prunings = [Pruning.of(family, state.at) for family in state.drawn]
        prunings += [Pruning.read(text) for text in state.texts]
        prunings += [Pruning.of_model(model, pruned)] if pruned is not None else []
        keys = [*state.drawn, *state.texts, EXISTING]
        shapes = state.shapes(over)
        one = replace(state.scenario, model=model, phase=state.phase, shapes=shapes, dense_s=None)
        found = scenario_results(one, prunings, gpus, reject)
    except InputError as error:
        return Curves(problem=str(error))
    candidates = tuple(Candidate(keys[i], r) for i, r in zip(found.pruning.tolist(), found.rows))
    return Curves(candidates, "" if candidates else next(iter(excluded_lines(excluded)), "nothing to predict"))


@dataclass(frozen=True)
class Services:
    """Services of the dense model and the pruning in detail, one per GPU."""

    found: tuple[Service, ...] = ()
    problem: str = ""  # why there is none for the first GPU without one


def services(state: State) -> Services:
    """Return the services of a serve, at its concurrency and within its limits.

    >>> found = services(State(phase="serve", detail="depth", tpot_ms=20.0)).found
    >>> [point.concurrency for point in found[0].points][:2]
    [1, 1]
    """
    return _services(replace(state, pin=None), state.profiles)


@lru_cache(maxsize=KEPT)
def _services(state: State, profiles: tuple[HardwareProfile, ...]) -> Services:
    gpus, _ = _gpus(state, profiles)
    found, problems = list[Service](), list[str]()
    for gpu in gpus:
        try:
            one = serve(
                state.load(),
                gpu,
                seq=state.seq,
                engine=state.engine,
                concurrency=state.batch,
                ttft_s=seconds_of(state.ttft_ms),
                tpot_s=seconds_of(state.tpot_ms),
                price=state.price,
                scenario=replace(state.scenario, dense_s=None),
                **_in_detail(state),
            )
            found += one.services
        except InputError as error:
            problems.append(str(error))
    return Services(tuple(found), next(iter(problems), ""))


def _in_detail(state: State) -> dict[str, Any]:
    """Return the pruning in detail as arguments of predictions."""
    pruned = state.load_pruned() if state.explained == EXISTING else None
    if pruned is not None:
        return {"pruned": [pruned]}
    if state.explained in state.texts:
        return {"prune": [state.explained]}
    return {"family": state.explained, "sparsity": state.at}


def winners(state: State) -> tuple[tuple[MapCell, ...], str]:
    """Return the map of a state, or why there is none: the fastest family at its sparsity over
    :data:`simulator.figures.paper.BATCHES` and ``LENGTHS``.

    >>> cells, problem = winners(State(phase="decode"))
    >>> len(cells), cells[0].winner, cells[0].best.batch, problem
    (81, 'depth', 1, '')
    """
    return _winners(replace(state, pin=None), state.profiles)


@lru_cache(maxsize=KEPT)
def _winners(state: State, profiles: tuple[HardwareProfile, ...]) -> tuple[tuple[MapCell, ...], str]:
    shapes = tuple(itertools.product(BATCHES, LENGTHS))
    try:
        scenario = replace(state.scenario, model=state.load(), phase=state.phase, shapes=shapes, dense_s=None)
        won = fastest(scenario, [Pruning.of(family, state.at) for family in state.drawn], profiles)
    except InputError as error:
        return (), str(error)
    return tuple(
        MapCell(r, r.family if gains else "", certain)
        for r, gains, certain in zip(won.best, won.gains.tolist(), won.certain.tolist())
    ), ""
