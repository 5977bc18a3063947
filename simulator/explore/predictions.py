"""What is predicted for a state: the table, the explanations of the family in detail, and the map of winners.

Use :func:`predictions` and :func:`winners`; both remember the last states, so going back is free. What cannot be
predicted is a line of text, never an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from simulator.errors import InputError
from simulator.explore.state import EXISTING, State
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.predict.caveats import uncalibrated
from simulator.predict.crossover import fastest
from simulator.predict.explain import Explanation, explanations
from simulator.predict.grid import Formats, Grid
from simulator.predict.prunings import Pruning
from simulator.predict.result import Result, Results, plain
from simulator.predict.sweep import sweep_results
from simulator.predict.table import table

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.predict.scenario import Scenario

KEPT = 64
"""States that are remembered."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of a state."""

    table: tuple[Result, ...] = ()  # every family drawn, at every sparsity, on every GPU; none where there is an error
    existing: tuple[Result, ...] = ()  # the existing pruned model, one per GPU
    details: tuple[Explanation, ...] = ()  # the family in detail at its sparsity, one per GPU that can run it
    versus: tuple[Explanation, ...] = ()  # the same in the second engine
    notes: tuple[str, ...] = ()  # one line each
    gpus: tuple[HardwareProfile, ...] = ()  # GPUs of the state that have its number format
    refused: str = ""  # why there is no table

    @property
    def results(self) -> tuple[Result, ...]:
        """All predictions except those of the map."""
        return (*self.table, *self.existing)


@dataclass(frozen=True)
class Cell:
    """The fastest family of one cell of the map; ``winner`` is empty where it is not faster than the dense model."""

    best: Result
    winner: str
    sure: bool


def predictions(state: State) -> Predictions:
    """The table and the explanations of a state; a profile whose file was changed is read again.

    >>> found = predictions(State(families=("depth", "width"), sparsities=(0.25,), at=0.25))
    >>> [(r.family, r.sparsity) for r in found.table], len(found.details), found.refused
    ([('depth', 0.25), ('width', 0.25)], 1, '')
    """
    return _predictions(state, state.profiles)


@lru_cache(maxsize=KEPT)
def _predictions(state: State, profiles: tuple[HardwareProfile, ...]) -> Predictions:
    gpus, without = _able(state, profiles)
    scenario, request = state.scenario, ([state.phase], [state.batch], [state.seq])
    try:
        model = state.load()
        found = table([model], gpus, state.drawn, state.fractions, *request, scenario=scenario)
    except InputError as error:
        alone = f"; weights alone may be in {state.dtype}" if state.dtype in ("fp8", "int8") and without is None else ""
        return Predictions(refused=f"{error}{alone}")
    notes = [*(without or ()), *_measured(state), *found.notes]
    existing = _existing(state, model, gpus, notes)
    notes += uncalibrated(plain(found.columns["hardware"]), found.columns["calibrated"])
    if state.arithmetic != state.dtype:
        notes.append(f"{found[0].weight_dtype} weights are computed in {state.arithmetic}, not {state.dtype}")
    details = _explained(state, model, gpus, scenario, notes)
    versus = _explained(state, model, gpus, state.scenario_versus, notes) if state.scenario_versus else ()
    return Predictions(found.rows, existing, details, versus, tuple(notes), gpus)


def _existing(
    state: State, model: ModelConfig, gpus: tuple[HardwareProfile, ...], notes: list[str]
) -> tuple[Result, ...]:
    """The existing pruned model against the dense one; its notes are added."""
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
    """What is in detail on each GPU; a note on each that cannot run it, unless there is one already."""
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
    """Why a measured time is not used; what it says is among the notes of the table."""
    if state.dense_ms is None or state.scenario.dense_s is not None:
        return []
    return [f"measured dense time: not used: it is of one GPU and {len(state.gpus)} are chosen"]


def _able(state: State, profiles: tuple[HardwareProfile, ...]) -> tuple[tuple[HardwareProfile, ...], list[str] | None]:
    """GPUs that have the number format, and a line on each that lacks it; all of them, so that the reason is given, and
    None where none has it."""
    able, notes = [], []
    for gpu in profiles:
        try:
            gpu.peak_flop_per_s(state.arithmetic)
            able.append(gpu)
        except InputError as error:
            notes.append(f"{error}: excluded")
    return (tuple(able), notes) if able else (profiles, None)


def winners(state: State) -> tuple[tuple[Cell, ...], str]:
    """The map of a state: the fastest of its families at its sparsity over :data:`simulator.figures.paper.BATCHES` and
    ``LENGTHS``; or why there is none.

    >>> cells, refused = winners(State(phase="decode"))
    >>> len(cells), cells[0].winner, cells[0].best.batch, refused
    (81, 'depth', 1, '')
    """
    return _winners(state, state.profiles)


@lru_cache(maxsize=KEPT)
def _winners(state: State, profiles: tuple[HardwareProfile, ...]) -> tuple[tuple[Cell, ...], str]:
    families, formats = tuple(map(Pruning, state.drawn)), (Formats(state.arithmetic, state.weights or None),)
    axes = ((state.at,), (state.phase,), BATCHES, LENGTHS, families, formats, (state.engine,), (state.devices,))
    try:
        grid = Grid((state.load(),), profiles, *axes, new_tokens=state.new_tokens, level=state.scenario.level)
        found = sweep_results(grid)
    except InputError as error:
        return (), str(error)
    if not len(found):
        return (), "; ".join(found.notes) or "nothing to predict"
    family, hardware, *others = (plain(found.columns[name]) for name in ("family", "hardware", "seq", "batch"))
    gpu = {name: i for i, name in enumerate(dict.fromkeys(hardware))}
    cell = np.unique(np.stack([[gpu[name] for name in hardware], *others]), axis=1, return_inverse=True)[1]
    won = fastest(cell, family, *(found.columns[name] for name in ("speedup", "speedup_lower", "speedup_upper")))
    best: Results = found.take(won.row)
    return tuple(
        Cell(r, r.family if gains else "", sure) for r, gains, sure in zip(best, won.gains.tolist(), won.sure.tolist())
    ), ""
