"""The engine of every table: a model in a setting, requests, families at sparsities, devices and runtimes in; columns of predictions out.

Use :func:`work_of` to prune a :class:`Piece`, :func:`columns_of` for its rows on some devices, :func:`records` for rows as objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.kernels.memory import bytes_needed
from simulator.kernels.optime import BOUNDS
from simulator.kernels.stack import F, Rows, Stack
from simulator.models.library import load_model
from simulator.predict.compare import Comparison, Pairs, compare
from simulator.predict.requests import Requests, picked, prune_all
from simulator.predict.settings import Setting

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig


@dataclass(frozen=True)
class Record:
    """One prediction with everything that identifies it; the order of the fields is the order of keys in JSON and of columns in CSV."""

    model: str
    hardware: str
    family: str
    sparsity: float
    realised_sparsity: float
    phase: str
    batch: int
    seq: int
    dtype: str
    runtime: str
    dense_s: float
    pruned_s: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    limit: str
    # beyond the stable keys
    measured_bound: float | None
    efficiency: float
    limit_share: float
    level: float
    calibrated: bool
    new_tokens: int
    weight_dtype: str
    kv_dtype: str
    devices: int
    parallel: str
    ideal: bool
    dense_memory_bytes: float
    pruned_memory_bytes: float
    capacity_bytes: float
    dense_fits: bool
    pruned_fits: bool


_TYPES = {"str": str, "float": float, "float | None": float, "int": int, "bool": bool}

COLUMNS: Mapping[str, type] = {**{f.name: _TYPES[str(f.type)] for f in fields(Record)}, "options": str}
"""Columns of a table and what they hold: those of a record, and the options of the family."""


@dataclass(frozen=True)
class Text:
    """A column of texts: codes and what they stand for."""

    codes: NDArray[np.int32]
    values: tuple[str, ...]

    def __getitem__(self, index: Any) -> Text:
        return Text(self.codes[index], self.values)

    def __len__(self) -> int:
        return len(self.codes)


Columns = dict[str, Any]
"""Name -> float64, int64 or bool array, or :class:`Text`; beside :data:`COLUMNS` ``choice``, the place of a row's choice in its piece."""


def plain(column: Any) -> NDArray[Any]:
    """A column as an array; texts as objects."""
    return np.array(column.values, dtype=object)[column.codes] if isinstance(column, Text) else column


@dataclass(frozen=True)
class FamilyChoice:
    """A family and the options it is run with, as sorted pairs.

    >>> FamilyChoice("width", (("align", 64),)).label
    'align=64'
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The options as text."""
        return ",".join(f"{name}={value}" for name, value in self.options)


Choice = tuple[FamilyChoice, Any]
"""A family and its sparsity, of any form that :func:`simulator.prune` takes."""

Refuse = Callable[[int | None, str, str], None]
"""Told what is left out: the place of a choice (None: the dense model), why, and the device ("": on all). May raise instead."""


@dataclass(frozen=True)
class Piece:
    """What is pruned and timed in one pass: requests of one model, setting and phase, each by every choice.

    The setting's runtime is not looked at, since one pass times several.
    """

    model: str | ModelConfig
    setting: Setting
    phase: str
    shapes: tuple[tuple[int, int], ...]  # (batch, seq)
    choices: tuple[Choice, ...]
    ideal: bool = False


@dataclass(frozen=True)
class Work:
    """Dense workloads of a piece, then their pruned versions, by choice and request; and what each of the pruned is."""

    piece: Piece
    requests: Requests
    pairs: Pairs
    request: Rows
    choice: Rows
    asked: F
    realised: F

    @cached_property
    def bytes_needed(self) -> F:
        """Of every workload, on the device that holds most."""
        return bytes_needed(self.pairs.stack)

    def only(self, pruned: Rows) -> Pairs:
        """All the dense workloads and some of the pruned ones."""
        dense = len(self.requests.workloads)
        at = np.r_[np.arange(dense), dense + pruned]
        return Pairs(picked(self.pairs.stack, at), self.pairs.dense[at])


def work_of(piece: Piece, refuse: Refuse) -> Work:
    """The workloads of a piece; choices that a family does not support are refused."""
    requests = Requests.of(load_model(piece.model), piece.setting, piece.phase, piece.shapes)
    stacks, many = [Stack.of(requests.workloads)], np.arange(len(requests.workloads))
    none = np.zeros(0, dtype=np.intp)
    request, choice, asked, realised = [none], [none], [none * 1.0], [none * 1.0]
    for i, (family, sparsity) in enumerate(piece.choices):
        pruned = prune_all(requests, family.name, sparsity, ideal=piece.ideal, options=dict(family.options))
        for reason in pruned.refused:
            refuse(i, reason, "")
        if pruned.stack is not None:
            stacks.append(pruned.stack)
            request.append(pruned.kept)
            choice.append(np.full(len(pruned.kept), i))
            asked.append(pruned.asked)
            realised.append(pruned.realised)
    pairs = Pairs(Stack.join(stacks), np.concatenate([many, *request]))
    return Work(piece, requests, pairs, *(np.concatenate(values) for values in (request, choice, asked, realised)))


def columns_of(work: Work, hardware: Sequence[HardwareProfile], runtimes: tuple[str, ...], refuse: Refuse) -> Columns:
    """Rows of a piece by request, choice, device and runtime; choices that a device cannot run are refused.

    Everything has to run under ``refuse(None, ...)``: where not even the dense model does, no choice of that device has a row.
    """
    blocks = [
        (device, runtime, pruned, comparison)
        for device, hw in enumerate(hardware)
        for pruned, comparisons in _compared(work, hw, runtimes, refuse)
        for runtime, comparison in enumerate(comparisons)
    ]
    if not blocks:
        return empty_columns()
    piece, setting, dense = work.piece, work.piece.setting, len(work.requests.workloads)
    sizes = [len(pruned) for _, _, pruned, _ in blocks]
    device, runtime = (np.repeat([block[i] for block in blocks], sizes) for i in (0, 1))
    pruned = np.concatenate([block[2] for block in blocks])
    rank = np.empty(len(work.choice), dtype=np.intp)
    rank[np.lexsort((work.choice, work.request))] = np.arange(len(rank))
    order = np.argsort((rank[pruned] * len(hardware) + device) * len(runtimes) + runtime)
    device, runtime, pruned = device[order], runtime[order], pruned[order]
    request, choice, at = work.request[pruned], work.choice[pruned], dense + pruned
    timed = {
        f.name: np.concatenate([getattr(block[3], f.name)[dense:] for block in blocks])[order]
        for f in fields(Comparison)
    }
    batch, seq = np.array(piece.shapes, dtype=np.int64)[request].T
    need, need_pruned = work.bytes_needed[request], work.bytes_needed[at]
    capacity = np.array([float(hw.memory_bytes) for hw in hardware])[device]
    gain = timed["roofline_bound"] - 1.0
    families = [family for family, _ in piece.choices]

    def text(codes: NDArray[Any] | int, *values: str) -> Text:
        return Text(np.broadcast_to(codes, len(at)).astype(np.int32), values)

    def same(value: float | bool) -> NDArray[Any]:
        return np.full(len(at), value)

    return {
        "model": text(0, load_model(piece.model).name),
        "hardware": text(device, *(hw.name for hw in hardware)),
        "family": text(choice, *(f.name for f in families)),
        "sparsity": work.asked[pruned],
        "realised_sparsity": work.realised[pruned],
        "phase": text(0, piece.phase),
        "batch": batch,
        "seq": seq,
        "dtype": text(0, setting.dtype),
        "runtime": text(runtime, *runtimes),
        "dense_s": timed["dense_s"],
        "pruned_s": timed["pruned_s"],
        "speedup": timed["speedup"],
        "speedup_lower": timed["lower"],
        "speedup_upper": timed["upper"],
        "flop_bound": work.pairs.flop_bound[at],
        "byte_bound": work.pairs.byte_bound[at],
        "roofline_bound": timed["roofline_bound"],
        "limit": text(timed["limit"], *BOUNDS),
        "measured_bound": same(np.nan),
        "efficiency": np.where(gain > 1e-9, (timed["speedup"] - 1.0) / np.where(gain > 1e-9, gain, 1.0), np.nan),
        "limit_share": timed["limit_share"],
        "level": same(setting.level),
        "calibrated": timed["calibrated"].astype(bool),
        "new_tokens": same(setting.new_tokens if piece.phase == "generate" else 0),
        "weight_dtype": text(0, setting.weight_dtype or setting.dtype),
        "kv_dtype": text(0, setting.kv_dtype or setting.dtype),
        "devices": same(setting.devices),
        "parallel": text(0, setting.parallel if setting.devices > 1 else "none"),
        "ideal": same(piece.ideal),
        "dense_memory_bytes": need,
        "pruned_memory_bytes": need_pruned,
        "capacity_bytes": capacity,
        "dense_fits": need <= capacity,
        "pruned_fits": need_pruned <= capacity,
        "options": text(choice, *(f.label for f in families)),
        "choice": choice,
    }


def empty_columns() -> Columns:
    """No rows."""
    kinds = {float: np.float64, int: np.int64, bool: np.bool_}
    none = Text(np.zeros(0, dtype=np.int32), ())
    columns = {name: none if kind is str else np.zeros(0, dtype=kinds[kind]) for name, kind in COLUMNS.items()}
    return {**columns, "choice": np.zeros(0, dtype=np.intp)}


def _compared(
    work: Work, hw: HardwareProfile, runtimes: tuple[str, ...], refuse: Refuse
) -> Iterator[tuple[Rows, tuple[Comparison, ...]]]:
    """Some of the pruned workloads and their comparisons under each runtime, after those of the dense ones."""
    every, level = np.arange(len(work.choice)), work.piece.setting.level
    if not len(every):
        return
    try:
        yield every, compare(work.pairs, hw, runtimes, level)
        return
    except InputError:
        choices = np.unique(work.choice).tolist()
    try:
        compare(work.only(every[:0]), hw, runtimes, level)
    except InputError as error:
        refuse(None, str(error), hw.name)
        for i in choices:
            refuse(i, str(error), hw.name)
        return
    for i in choices:
        some = np.flatnonzero(work.choice == i)
        try:
            yield some, compare(work.only(some), hw, runtimes, level)
        except InputError as error:
            refuse(i, str(error), hw.name)


def records(columns: Columns) -> list[Record]:
    """Rows as records, not known values as None, the realised sparsity as :class:`simulator.Speedup` composes it, to the last digit."""
    realised = 1.0 - (1.0 - columns["realised_sparsity"])
    unknown = [None] * len(realised)
    values = {**columns, "realised_sparsity": realised}
    lists = [unknown if f.name == "measured_bound" else plain(values[f.name]).tolist() for f in fields(Record)]
    return [Record(*row) for row in zip(*lists)]


# -- what is left out -------------------------------------------------------------------------------------------------------------

Notes = dict[str, list[float]]
"""Reason -> sparsities at which something is left out for it."""


def note(notes: Notes, choice: Choice, reason: str, device: str) -> None:
    """Keep why a choice is left out."""
    family, sparsity = choice[0].name, choice[1]
    if device:
        reason = f"{family} on {device}: {reason}"
    else:
        reason = reason.replace(f" at sparsity {sparsity:g}", "")
        reason = reason if family in reason else f"{family}: {reason}"
    notes.setdefault(reason, []).append(sparsity)


def note_lines(notes: Notes, shown: int | None = None) -> tuple[str, ...]:
    """One line a reason, with the sparsities it holds for; of more than ``shown`` only the ends."""
    out = []
    for reason, at in notes.items():
        values = [f"{s:g}" for s in sorted(set(at))]
        if shown is not None and len(values) > shown:
            values = [*values[: shown // 2], "...", values[-1]]
        out.append(f"{reason}: left out at sparsity {', '.join(values)}")
    return tuple(out)
