"""What the simulator says about a state: the table, the explanations of the family in detail, and the map of winners.

Use :func:`answer` and :func:`winners`; both remember the last states, so going back is free. What cannot be predicted
is a line of text, never an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.errors import InputError
from simulator.explore.state import EXISTING, State
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.predict.choices import FamilyChoice
from simulator.predict.crossover import fastest
from simulator.predict.grid import Formats, Grid
from simulator.predict.rows import Record, records
from simulator.predict.sweep import sweep_columns
from simulator.predict.table import Explanation, Table, explanations, table
from simulator.predict.words import uncalibrated

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.predict.settings import Setting

KEPT = 64
"""Answers that are remembered."""

_EMPTY = Table((), ())


@dataclass(frozen=True)
class Answer:
    """Predictions of a state."""

    table: Table = _EMPTY  # every family drawn, at every sparsity, on every GPU; empty when nothing could be predicted
    existing: tuple[Record, ...] = ()  # the pruned model that exists, one a GPU
    details: tuple[Explanation, ...] = ()  # the family in detail at its sparsity, one a GPU that can run it
    versus: tuple[Explanation, ...] = ()  # the same in the engine beside
    notes: tuple[str, ...] = ()  # what a person should know, one line each
    gpus: tuple[HardwareProfile, ...] = ()  # GPUs of the state that have its number format
    refused: str = ""  # why there is no table; empty when there is one

    @property
    def records(self) -> tuple[Record, ...]:
        """All predictions but those of the map."""
        return (*self.table.records, *self.existing)


@dataclass(frozen=True)
class Cell:
    """The fastest family of one cell of the map; ``winner`` is empty where it is not faster than the dense model."""

    best: Record
    winner: str
    sure: bool


def answer(state: State) -> Answer:
    """The table and the explanations of a state; a profile whose file was changed is read anew.

    >>> found = answer(State(families=("depth", "width"), sparsities=(0.25,), at=0.25))
    >>> [(r.family, r.sparsity) for r in found.table], len(found.details), found.refused
    ([('depth', 0.25), ('width', 0.25)], 1, '')
    """
    return _answer(state, state.profiles)


@lru_cache(maxsize=KEPT)
def _answer(state: State, profiles: tuple[HardwareProfile, ...]) -> Answer:
    gpus, without = _able(state, profiles)
    try:
        model = state.load()
        found = table([model], gpus, state.drawn, state.fractions, *_request(state), setting=state.setting)
    except InputError as error:
        alone = f"; weights alone may be in {state.dtype}" if state.dtype in ("fp8", "int8") and without is None else ""
        return Answer(refused=f"{error}{alone}")
    notes = [*(without or ()), *_measured(state), *found.notes]
    existing = _existing(state, model, gpus, notes)
    notes += uncalibrated(found.records)
    if state.arithmetic != state.dtype:
        notes.append(f"{found.records[0].weight_dtype} weights are computed in {state.arithmetic}, not {state.dtype}")
    details = _explained(state, model, gpus, state.setting, notes)
    versus = _explained(state, model, gpus, state.setting_versus, notes) if state.setting_versus else ()
    return Answer(found, existing, details, versus, tuple(notes), gpus)


def _request(state: State) -> tuple[list[str], list[int], list[int]]:
    return [state.phase], [state.batch], [state.seq]


def _existing(
    state: State, model: ModelConfig, gpus: tuple[HardwareProfile, ...], notes: list[str]
) -> tuple[Record, ...]:
    """The pruned model that exists beside the dense one; what is to be known of it is noted."""
    pruned = state.load_pruned()
    if pruned is None:
        return ()
    try:
        found = table([model], gpus, None, None, *_request(state), pruned=[pruned], setting=state.setting)
    except InputError as error:
        notes.append(f"{pruned.name}: {error}")
        return ()
    notes += (note for note in found.notes if note not in notes)
    return found.records


def _explained(
    state: State, model: ModelConfig, gpus: tuple[HardwareProfile, ...], setting: Setting, notes: list[str]
) -> tuple[Explanation, ...]:
    """What is in detail on each GPU; a note on each that cannot run it, unless one says so already."""
    found: list[Explanation] = []
    pruned = state.load_pruned()
    of_model = pruned is not None and state.explained == EXISTING
    what: Any = {"pruned": [pruned]} if of_model else {"family": state.explained, "sparsity": state.at}
    for gpu in gpus:
        phase, batch, seq = _request(state)
        try:
            found += explanations(model, [gpu], phase=phase, batch=batch, seq=seq, setting=setting, **what)
        except InputError as error:
            if not any(str(error) in note for note in notes):
                notes.append(f"{state.explained} on {gpu.label} at {state.at:g}: {error}")
    return tuple(found)


def _measured(state: State) -> list[str]:
    """Why a measured time is not used; what it says where it is, the table's notes tell."""
    if state.dense_ms is None or state.setting.dense_s is not None:
        return []
    return [f"measured dense time: not used, for it is of one GPU and {len(state.gpus)} are chosen"]


def _able(state: State, profiles: tuple[HardwareProfile, ...]) -> tuple[tuple[HardwareProfile, ...], list[str] | None]:
    """GPUs that have the number format, and a line on each that lacks it; all of them, so that the reason is given, and
    None where none has it."""
    able, notes = [], []
    for gpu in profiles:
        try:
            gpu.peak_flop_per_s(state.arithmetic)
            able.append(gpu)
        except InputError as error:
            notes.append(f"{error}: left out")
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
    families, formats = tuple(map(FamilyChoice, state.drawn)), (Formats(state.arithmetic, state.weights or None),)
    axes = ((state.at,), (state.phase,), BATCHES, LENGTHS, families, formats, (state.engine,), (state.devices,))
    try:
        grid = Grid((state.load(),), profiles, *axes, new_tokens=state.new_tokens, level=state.setting.level)
        columns, notes = sweep_columns(grid)
    except InputError as error:
        return (), str(error)
    if not len(columns["speedup"]):
        return (), "; ".join(notes) or "nothing to predict"
    gpu = {name: i for i, name in enumerate(dict.fromkeys(columns["hardware"]))}
    where = np.stack([[gpu[name] for name in columns["hardware"]], columns["seq"], columns["batch"]])
    cell = np.unique(where, axis=1, return_inverse=True)[1]
    won = fastest(cell, *(columns[name] for name in ("family", "speedup", "speedup_lower", "speedup_upper")))
    best = records({name: values[won.row] for name, values in columns.items()})
    return tuple(
        Cell(r, r.family if gains else "", sure) for r, gains, sure in zip(best, won.gains.tolist(), won.sure.tolist())
    ), ""
