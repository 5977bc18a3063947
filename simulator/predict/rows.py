"""The one way to every table: a model in a setting, requests, families at sparsities and devices in; columns of
predictions out.

Use :func:`work_of` to prune a :class:`Piece`, :func:`columns_of` for its rows on some devices, :func:`records` for rows
as objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray, IndexArray
from simulator.cost.base import BOTTLENECKS
from simulator.cost.forward import refusal
from simulator.display import Displayed
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.predict.choices import Choice, Existing, FamilyChoice
from simulator.predict.compare import Comparison, Pairs, compare, known
from simulator.predict.gain import gain, gain_html
from simulator.predict.requests import Group, Requests, prune_all
from simulator.predict.settings import Setting
from simulator.pruning import FAMILIES
from simulator.workload_batch import WorkloadBatch, activation_bytes, bytes_needed, cache_bytes

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig


@dataclass(frozen=True, repr=False)
class Record(Displayed):
    """One prediction with everything that identifies it; the order of the fields is the order of keys in JSON and of
    columns in CSV."""

    model: str
    hardware: str
    engine: str
    family: str
    sparsity: float
    realised_sparsity: float
    phase: str
    batch: int
    seq: int
    dtype: str
    dense_s: float
    dense_lower: float
    dense_upper: float
    pruned_s: float
    pruned_lower: float
    pruned_upper: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    bottleneck: str
    tokens_per_s: float | None  # of the pruned model, new ones, on all devices; None where the phase has none
    ttft_s: float | None
    tpot_s: float | None
    # beyond the stable keys
    dense_tokens_per_s: float | None
    dense_ttft_s: float | None
    dense_tpot_s: float | None
    pruned: str  # name of the pruned model, where one exists; "" for a family
    measured_bound: float | None
    efficiency: float
    bottleneck_share: float
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
    dense_largest_batch: int  # sequences that fit
    pruned_largest_batch: int
    method: str  # published one, "" where a family was asked for; its family may be two joined by "+"

    def _title(self) -> str:
        where = f"{self.model} on {self.hardware}, {self.engine}, {self.phase}, batch {self.batch}, seq {self.seq}"
        return f"{where}, {self.dtype}: {gain(self, self.speedup_lower, self.speedup_upper)}"

    def _html(self) -> str:
        return gain_html(self, self.speedup_lower, self.speedup_upper)


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
"""Name -> float64, int64 or bool array, or :class:`Text`; beside :data:`COLUMNS` ``choice``, the place of a row's
choice in its piece."""


def plain(column: Any) -> NDArray[Any]:
    """A column as an array; texts as objects."""
    return np.array(column.values, dtype=object)[column.codes] if isinstance(column, Text) else column


Refuse = Callable[[int | None, str, str], None]
"""Told what is left out: the place of a choice (None: the dense model), why, and the device ("": on all). May raise
instead."""


@dataclass(frozen=True)
class Piece:
    """What is pruned and timed in one pass: requests of one model, setting and phase, each by every choice."""

    model: str | ModelConfig
    setting: Setting
    phase: str
    shapes: tuple[tuple[int, int], ...]  # (batch, seq)
    choices: tuple[Choice, ...]
    ideal: bool = False


@dataclass(frozen=True)
class Work:
    """Dense workloads of a piece, then their pruned versions; and of each of the pruned its request, its choice, and
    the sparsity asked for and realised."""

    piece: Piece
    requests: Requests
    pairs: Pairs
    request: IndexArray
    choice: IndexArray
    asked: FloatArray
    realised: FloatArray

    @cached_property
    def bytes_needed(self) -> FloatArray:
        """Of every workload, on the device that holds most."""
        return bytes_needed(self.pairs.workloads)

    @cached_property
    def sequence_bytes(self) -> FloatArray:
        """Of every workload: what one more sequence needs, its cache and, but in a serve, whose prompts go one at a
        time, its activations."""
        workloads = self.pairs.workloads
        assert workloads.sequences is not None
        grows = cache_bytes(workloads) + (0.0 if self.piece.phase == "serve" else activation_bytes(workloads))
        return np.asarray(grows / workloads.sequences)

    def only(self, pruned: IndexArray) -> Pairs:
        """All the dense workloads and some of the pruned ones."""
        workloads, dense = self.pairs.workloads, len(self.requests.workloads)
        at = np.r_[np.arange(dense), dense + pruned]
        lengths = workloads.lengths[at]
        rows = np.repeat(workloads.starts[at] - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
        sequences = None if workloads.sequences is None else workloads.sequences[at]
        return Pairs(WorkloadBatch(workloads.rows.take(rows), lengths, sequences), self.pairs.dense[at])


def work_of(piece: Piece, refuse: Refuse) -> Work:
    """The workloads of a piece; choices that a family or the engine does not support are refused."""
    requests = Requests.of(load_model(piece.model), piece.setting, piece.phase, piece.shapes)
    dense, found = WorkloadBatch.of(requests.workloads), []
    unable = refusal(dense)
    if unable:
        refuse(None, unable, "")
    for i, (chosen, sparsity) in enumerate(piece.choices):
        parts, refused = _parts(piece, requests, chosen, sparsity)
        lacking = [unable or refusal(workloads) for _, workloads in parts]
        for reason in dict.fromkeys((*refused, *filter(None, lacking))):
            refuse(i, reason, "")
        found += [(i, group, workloads) for (group, workloads), reason in zip(parts, lacking) if not reason]
    request = np.array([r for _, group, _ in found for r in group], dtype=np.intp)
    workloads = WorkloadBatch.join([dense, *(workloads for _, _, workloads in found)])
    steps, choices = [workloads.rows.meta.applied for _, _, workloads in found], [piece.choices[i] for i, _, _ in found]
    realised_of = [1.0 - math.prod(1.0 - step.realised for step in each) for each in steps]  # as simulator.Speedup
    asked_of = [share if chosen.method else each[-1].sparsity for (chosen, share), each in zip(choices, steps)]
    of_parts = [i for i, _, _ in found], asked_of, realised_of
    choice, asked, realised = (np.repeat(values, [len(group) for _, group, _ in found]) for values in of_parts)
    pairs = Pairs(workloads, np.r_[np.arange(len(requests.workloads)), request])
    return Work(piece, requests, pairs, request, choice.astype(np.intp), asked, realised)


def _parts(
    piece: Piece, requests: Requests, chosen: FamilyChoice | Existing, sparsity: Any
) -> tuple[list[tuple[Group, WorkloadBatch]], tuple[str, ...]]:
    """Requests by one choice, some at a time, and why others are refused."""
    if isinstance(chosen, Existing):
        pruned = [chosen.pruned(dense, sparsity, piece.setting) for dense in requests.workloads]
        return [((i,), WorkloadBatch.of([w])) for i, w in enumerate(pruned)], ()
    model = load_model(piece.model)
    if not chosen.method and (lacks := FAMILIES[chosen.name].needs) and not getattr(model, lacks):
        return [], (f"{model.name} has no routed {lacks}",)
    how: dict[str, Any] = {"ideal": piece.ideal, "options": dict(chosen.options), "method": chosen.method}
    return prune_all(requests, chosen.name, sparsity, **how)


def columns_of(work: Work, hardware: Sequence[HardwareProfile], refuse: Refuse) -> Columns:
    """Rows of a piece by request, choice and device; choices that a device cannot run are refused."""
    blocks = [
        (device, pruned, comparison)
        for device, hw in enumerate(hardware)
        for pruned, comparison in _compared(work, hw, refuse)
    ]
    if not blocks:
        return empty_columns()
    piece, setting, dense = work.piece, work.piece.setting, len(work.requests.workloads)
    device = np.repeat([device for device, _, _ in blocks], [len(pruned) for _, pruned, _ in blocks])
    pruned = np.concatenate([pruned for _, pruned, _ in blocks])
    order = np.lexsort((device, work.choice[pruned], work.request[pruned]))
    device, pruned = device[order], pruned[order]
    request, choice, at = work.request[pruned], work.choice[pruned], dense + pruned
    names = [f.name for f in fields(Comparison)]
    timed = {name: np.concatenate([getattr(found, name)[dense:] for _, _, found in blocks])[order] for name in names}
    batch, seq = np.array(piece.shapes, dtype=np.int64)[request].T
    gain = timed["roofline_bound"] - 1.0
    need, need_pruned = work.bytes_needed[request], work.bytes_needed[at]
    capacity = np.array([float(hw.memory_bytes) for hw in hardware])[device]
    families = [family for family, _ in piece.choices]
    texts: dict[str, tuple[Any, Iterable[str]]] = {
        "hardware": (device, (hw.label for hw in hardware)),
        "family": (choice, (f.name for f in families)),
        "options": (choice, (f.label for f in families)),
        "method": (choice, (f.method for f in families)),
        "pruned": (choice, (f.title if isinstance(f, Existing) else "" for f in families)),
        "bottleneck": (timed["bottleneck"], BOTTLENECKS),
        "model": (0, [load_model(piece.model).name]),
        "engine": (0, [setting.engine_name]),
        "phase": (0, [piece.phase]),
        "dtype": (0, [setting.dtype]),
        "weight_dtype": (0, [setting.weight_dtype or load_model(piece.model).weight_dtype or setting.dtype]),
        "kv_dtype": (0, [setting.cache_dtype]),
        "parallel": (0, [setting.parallel if setting.devices > 1 else "none"]),
    }
    values: dict[str, Any] = {
        **timed,
        "sparsity": work.asked[pruned],
        "realised_sparsity": work.realised[pruned],
        "batch": batch,
        "seq": seq,
        "speedup_lower": timed["lower"],
        "speedup_upper": timed["upper"],
        "flop_bound": work.pairs.flop_bound[at],
        "byte_bound": work.pairs.byte_bound[at],
        "measured_bound": np.nan,
        "efficiency": np.divide(timed["speedup"] - 1.0, gain, out=np.full(len(at), np.nan), where=gain > 1e-9),
        "level": setting.level,
        "new_tokens": work.requests.workloads[0].meta.new_tokens,
        "devices": setting.devices,
        "ideal": piece.ideal,
        "dense_memory_bytes": need,
        "pruned_memory_bytes": need_pruned,
        "capacity_bytes": capacity,
        "dense_fits": need <= capacity,
        "pruned_fits": need_pruned <= capacity,
        "dense_largest_batch": _largest(batch, capacity, need, work.sequence_bytes[request]),
        "pruned_largest_batch": _largest(batch, capacity, need_pruned, work.sequence_bytes[at]),
        "choice": choice,
    }
    columns: Columns = {name: np.full(len(at), v) if np.ndim(v) == 0 else v for name, v in values.items()}
    for name, (codes, words) in texts.items():
        columns[name] = Text(np.broadcast_to(codes, len(at)).astype(np.int32), tuple(words))
    return {name: columns[name] for name in (*COLUMNS, "choice")}


def empty_columns() -> Columns:
    """No rows."""
    kinds = {float: np.float64, int: np.int64, bool: np.bool_}
    none = Text(np.zeros(0, dtype=np.int32), ())
    columns: Columns = {name: none if kind is str else np.zeros(0, dtype=kinds[kind]) for name, kind in COLUMNS.items()}
    return {**columns, "choice": np.zeros(0, dtype=np.intp)}


def _largest(batch: NDArray[np.int64], capacity: FloatArray, need: FloatArray, each: FloatArray) -> NDArray[np.int64]:
    """Sequences that fit, where ``batch`` of them of ``each`` bytes are in what is needed; 0 where not one does."""
    left = np.maximum(capacity - (need - batch * each), 0.0)
    return np.floor(left / np.maximum(each, 1.0) + 1e-9).astype(np.int64)


def _compared(work: Work, hw: HardwareProfile, refuse: Refuse) -> Iterator[tuple[IndexArray, Comparison]]:
    """Some of the pruned workloads and their comparison, after those of the dense ones."""
    every, setting = np.arange(len(work.choice)), work.piece.setting

    def compared(some: IndexArray) -> Comparison:
        pairs = work.pairs if some is every else work.only(some)
        return compare(pairs, hw, setting.level, setting.dense_s)[0]

    if not len(every):
        return
    try:
        yield every, compared(every)
        return
    except InputError:
        choices = np.unique(work.choice).tolist()
    try:
        compared(every[:0])
    except InputError as error:
        refuse(None, str(error), hw.label)
        for i in choices:
            refuse(i, str(error), hw.label)
        return
    for i in choices:
        some = np.flatnonzero(work.choice == i)
        try:
            yield some, compared(some)
        except InputError as error:
            refuse(i, str(error), hw.label)


def records(columns: Columns) -> list[Record]:
    """Rows as records, not known values as None."""
    maybe = {f.name: f.type == "float | None" for f in fields(Record)}
    lists = [known(columns[name]) if yes else plain(columns[name]).tolist() for name, yes in maybe.items()]
    return [Record(*row) for row in zip(*lists)]


Notes = dict[str, list[float]]
"""Reason -> sparsities at which something is left out for it."""


def note(notes: Notes, choice: Choice, reason: str, device: str) -> None:
    """Keep why a choice is left out."""
    family, sparsity = choice[0].title, choice[1]
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
