"""What the simulator says about a state: the table, the explanations of the family in detail, and the map of winners.

Use :func:`answer` and :func:`winners`; both remember the last states, so going back is free. What cannot be predicted is a line of text,
never an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.explore.state import State
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.hardware.library import load_hardware
from simulator.predict.crossover import fastest
from simulator.predict.grid import Formats, Grid
from simulator.predict.rows import FamilyChoice, Record
from simulator.predict.sweep import sweep_columns
from simulator.predict.table import Explanation, Table, explanations, table
from simulator.predict.words import uncalibrated

KEPT = 64
"""Answers that are remembered."""

_EMPTY = Table((), ())


@dataclass(frozen=True)
class Answer:
    """Predictions of a state.

    Attributes
    ----------
    table : Table
        Every family drawn, at every sparsity, on every GPU; empty when nothing could be predicted.
    details : tuple of Explanation
        The family in detail at its sparsity, one a GPU that can run it.
    notes : tuple of str
        What a person should know, one line each.
    gpus : tuple of str
        GPUs of the state that have its number format.
    refused : str
        Why there is no table; empty when there is one.
    """

    table: Table
    details: tuple[Explanation, ...]
    notes: tuple[str, ...]
    gpus: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class Cells:
    """The fastest family of each cell of the map, one entry a cell.

    Attributes
    ----------
    gpu, winner : object array of str
        ``winner`` is empty where no family is faster than the dense model.
    batch, seq : int array
    speedup, lower, upper : float array
    sure, fits : bool array
        Whether the winner is certain; whether the dense model fits the GPU's memory.
    refused : str
        Why there are no cells.
    """

    gpu: NDArray[np.object_]
    batch: NDArray[np.int64]
    seq: NDArray[np.int64]
    winner: NDArray[np.object_]
    speedup: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    sure: NDArray[np.bool_]
    fits: NDArray[np.bool_]
    refused: str = ""


@lru_cache(maxsize=KEPT)
def answer(state: State) -> Answer:
    """The found and the explanations of a state.

    Examples
    --------
    >>> found = answer(State(families=("depth", "width"), sparsities=(0.25,), at=0.25))
    >>> [(r.family, r.sparsity) for r in found.table], len(found.details), found.refused
    ([('depth', 0.25), ('width', 0.25)], 1, '')
    """
    gpus, without = _able(state)
    try:
        model = state.load()
        found = table(
            [model],
            gpus,
            state.drawn,
            state.fractions,
            [state.phase],
            [state.batch],
            [state.seq],
            setting=state.setting,
        )
    except InputError as error:
        return Answer(_EMPTY, (), (), refused=str(error))
    details: list[Explanation] = []
    notes = [*without, *found.notes, *uncalibrated(found.records)]
    for gpu in gpus:
        try:
            details += explanations(
                model, [gpu], state.detail, state.at, [state.phase], [state.batch], [state.seq], setting=state.setting
            )
        except InputError as error:
            line = f"{state.detail} on {gpu} at {state.at:g}: {error}"
            if not any(str(error) in note for note in notes):
                notes.append(line)
    return Answer(found, tuple(details), tuple(notes), gpus)


def _able(state: State) -> tuple[tuple[str, ...], list[str]]:
    """GPUs that have the number format, and a line on each that lacks it; all of them, so that the reason is given, where none has it."""
    able, notes = [], []
    for gpu in state.gpus:
        try:
            load_hardware(gpu).peak_flop_per_s(state.dtype)
            able.append(gpu)
        except InputError as error:
            notes.append(f"{error}: left out")
    return (tuple(able), notes) if able else (state.gpus, [])


@lru_cache(maxsize=KEPT)
def winners(state: State) -> Cells:
    """The map of a state: the fastest of its families at its sparsity over :data:`simulator.figures.paper.BATCHES` and ``LENGTHS``.

    Examples
    --------
    >>> found = winners(State(phase="decode"))
    >>> len(found.batch), found.winner[found.batch == 1].tolist()[0]
    (81, 'depth')
    """
    setting = state.setting
    try:
        grid = Grid(
            (state.load(),),
            state.gpus,
            (state.at,),
            (state.phase,),
            BATCHES,
            LENGTHS,
            tuple(FamilyChoice(name) for name in state.drawn),
            (Formats(state.dtype),),
            (state.runtime,),
            new_tokens=state.new_tokens,
            level=setting.level,
        )
        columns, notes = sweep_columns(grid)
    except InputError as error:
        return _no_cells(str(error))
    if not len(columns["speedup"]):
        return _no_cells("; ".join(notes) or "nothing to predict")
    order = {name: i for i, name in enumerate(dict.fromkeys(columns["hardware"]))}
    gpu = np.array([order[name] for name in columns["hardware"]])
    cell = (gpu * len(LENGTHS) + np.searchsorted(LENGTHS, columns["seq"])) * len(BATCHES) + np.searchsorted(
        BATCHES, columns["batch"]
    )
    won = fastest(cell, columns["family"], columns["speedup"], columns["speedup_lower"], columns["speedup_upper"])
    best = {name: columns[name][won.row] for name in ("hardware", "batch", "seq", "family", "speedup", "dense_fits")}
    lower, upper = (columns[f"speedup_{end}"][won.row] for end in ("lower", "upper"))
    return Cells(
        best["hardware"],
        best["batch"],
        best["seq"],
        np.where(won.gains, best["family"], ""),
        best["speedup"],
        lower,
        upper,
        won.sure,
        best["dense_fits"],
    )


def _no_cells(why: str) -> Cells:
    text, number, flag = np.zeros(0, dtype=object), np.zeros(0), np.zeros(0, dtype=bool)
    whole = np.zeros(0, dtype=np.int64)
    return Cells(text, whole, whole, text, number, number, number, flag, flag, why)


def dense_of(records: tuple[Record, ...]) -> dict[str, Record]:
    """One record of each GPU, for what they say of the dense model."""
    out: dict[str, Record] = {}
    for r in records:
        out.setdefault(r.hardware, r)
    return out
