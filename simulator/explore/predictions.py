"""Predict the content of the page: the table, explanations of the family in detail, and the map of winners.

Use :func:`predictions` and :func:`winners`; both cache the last states. A state that cannot be predicted gives a line
of text, never an exception.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from simulator.errors import InputError
from simulator.explore.state import EXISTING, State
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.predict.caveats import uncalibrated
from simulator.predict.crossover import winners as fastest
from simulator.predict.explain import Explanation, explanations
from simulator.predict.prunings import Pruning
from simulator.predict.result import Result
from simulator.predict.table import table

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.predict.scenario import Scenario

KEPT = 64
"""Number of cached states."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of a state."""

    table: tuple[Result, ...] = ()  # every drawn family, sparsity and GPU; empty if there is a problem
    existing: tuple[Result, ...] = ()  # the existing pruned model, one per GPU
    details: tuple[Explanation, ...] = ()  # the family in detail at its sparsity, one per GPU that can run it
    versus: tuple[Explanation, ...] = ()  # the same explanations in the second engine
    notes: tuple[str, ...] = ()  # one line each
    gpus: tuple[HardwareProfile, ...] = ()  # GPUs that support the number format
    problem: str = ""  # why the table is empty

    @property
    def results(self) -> tuple[Result, ...]:
        """All predictions except those of the map."""
        return (*self.table, *self.existing)


@dataclass(frozen=True)
class Cell:
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
    return _predictions(state, state.profiles)


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
    existing = _existing(state, model, gpus, notes)
    notes += uncalibrated(found)
    if state.arithmetic != state.dtype:
        notes.append(f"{found[0].weight_dtype} weights are computed in {state.arithmetic}, not {state.dtype}")
    details = _explained(state, model, gpus, scenario, notes)
    versus = _explained(state, model, gpus, state.scenario_versus, notes) if state.scenario_versus else ()
    return Predictions(found.rows, existing, details, versus, tuple(notes), gpus)


def _existing(
    state: State, model: ModelConfig, gpus: tuple[HardwareProfile, ...], notes: list[str]
) -> tuple[Result, ...]:
    """Return the predictions of the existing pruned model; add its notes to ``notes``."""
    pruned = state.load_pruned()
    if pruned is None:
        return ()
    request = [state.phase], [state.batch], [state.seq]
    try:
        found = table([model], gpus, None, None, *request, pruned=[pruned], scenario=state.scenario)
    except InputError as error:
        notes.append(f"{pruned.name}: {error}")
        return ()
    notes += (note for note in found.notes if note not in notes)
    return found.rows


def _explained(
    state: State, model: ModelConfig, gpus: tuple[HardwareProfile, ...], scenario: Scenario, notes: list[str]
) -> tuple[Explanation, ...]:
    """Return the explanations in detail of each GPU; note each GPU without one, unless there is a note already."""
    out: list[Explanation] = []
    pruned = state.load_pruned() if state.explained == EXISTING else None
    family, sparsity = (state.explained, state.at) if pruned is None else (None, None)
    request = [state.phase], [state.batch], [state.seq]
    existing = [] if pruned is None else [pruned]
    for gpu in gpus:
        try:
            out += explanations(model, [gpu], family, sparsity, *request, pruned=existing, scenario=scenario)
        except InputError as error:
            if not any(str(error) in note for note in notes):
                notes.append(f"{state.explained} on {gpu.label} at {state.at:g}: {error}")
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


def winners(state: State) -> tuple[tuple[Cell, ...], str]:
    """Return the map of a state, or why there is none: the fastest family at its sparsity over
    :data:`simulator.figures.paper.BATCHES` and ``LENGTHS``.

    >>> cells, problem = winners(State(phase="decode"))
    >>> len(cells), cells[0].winner, cells[0].best.batch, problem
    (81, 'depth', 1, '')
    """
    return _winners(state, state.profiles)


@lru_cache(maxsize=KEPT)
def _winners(state: State, profiles: tuple[HardwareProfile, ...]) -> tuple[tuple[Cell, ...], str]:
    shapes = tuple(itertools.product(BATCHES, LENGTHS))
    try:
        scenario = replace(state.scenario, model=state.load(), phase=state.phase, shapes=shapes, dense_s=None)
        won = fastest(scenario, [Pruning.of(family, state.at) for family in state.drawn], profiles)
    except InputError as error:
        return (), str(error)
    return tuple(
        Cell(r, r.family if gains else "", certain)
        for r, gains, certain in zip(won.best, won.gains.tolist(), won.certain.tolist())
    ), ""
