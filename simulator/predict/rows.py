"""The rows of one partition of a sweep, as columns: what :func:`simulator.predict.table.table` says one by one, for thousands at once.

Use :func:`partitions` to cut a grid into pieces of bounded memory and :func:`partition_columns` for the rows of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.kernels.intervals import BOUNDS
from simulator.kernels.stack import F, Rows, Stack, bytes_needed
from simulator.models.library import load_model
from simulator.predict.compare import Comparison, Pairs, compare
from simulator.predict.grid import FamilyChoice, Formats, Grid
from simulator.predict.table import Record
from simulator.predict.variants import Requests, prune_many, reordered

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig

PART_ROWS = 40_000
"""Configurations of a partition, about: a few megabytes of table."""

OPERATOR_ROWS = 120_000
"""Operators of a partition, about: 25 MB of columns, some 100 MB while they are timed."""

REQUESTS = 64
"""Requests (batch, seq) pruned together."""

_TYPES = {"str": str, "float": float, "float | None": float, "int": int, "bool": bool}

COLUMNS: Mapping[str, type] = {**{f.name: _TYPES[str(f.type)] for f in fields(Record)}, "options": str}
"""Columns of a sweep's table and what they hold: those of a record, and the options of the family."""


@dataclass(frozen=True)
class Partition:
    """A piece of a grid: one model, format, number of devices and phase; some requests; some families at some sparsities."""

    model: str | ModelConfig
    formats: Formats
    devices: int
    phase: str
    shapes: tuple[tuple[int, int], ...]  # (batch, seq)
    choices: tuple[tuple[FamilyChoice, float], ...]


@dataclass(frozen=True)
class Text:
    """A column of texts: codes and what they stand for."""

    codes: NDArray[np.int32]
    values: tuple[str, ...]

    def __getitem__(self, index: Any) -> Text:
        return Text(self.codes[index], self.values)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def array(self) -> NDArray[Any]:
        """The texts themselves."""
        return np.array(self.values, dtype=object)[self.codes]


_NUMPY: Mapping[type, Any] = {float: np.float64, int: np.int64, bool: np.bool_}
_COMPARISON = {f.name: {"limit": np.int8, "calibrated": np.bool_}.get(f.name, np.float64) for f in fields(Comparison)}

Columns = dict[str, Any]
"""Name -> float64, int64 or bool array, or :class:`Text`."""


def partitions(grid: Grid) -> Iterator[Partition]:
    """The pieces of a grid in the order of the table: by model, format, devices, phase, then pieces of requests by length and batch."""
    shapes = [(b, s) for s in grid.seqs for b in grid.batches]
    choices = list(itertools.product(grid.families, grid.sparsities))
    for model, formats, devices, phase in itertools.product(grid.models, grid.dtypes, grid.devices, grid.phases):
        operators = 30 if phase != "generate" else 60 + 2 * grid.new_tokens
        workloads = max(1, min(PART_ROWS // (len(grid.hardware) * len(grid.runtimes)), OPERATOR_ROWS // operators))
        many = min(len(shapes), REQUESTS, workloads)
        of_choices = max(1, workloads // many)
        if of_choices >= len(choices):  # room for more requests
            many = max(1, min(len(shapes), 4 * REQUESTS, workloads // len(choices)))
        for some, chosen in itertools.product(_pieces(shapes, many), _pieces(choices, of_choices)):
            yield Partition(model, formats, devices, phase, tuple(some), tuple(chosen))


def _pieces(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Values in even pieces of at most a size."""
    many = -(-len(values) // size)
    each = -(-len(values) // many)
    return [values[i : i + each] for i in range(0, len(values), each)]


@dataclass(frozen=True)
class _Work:
    """Dense workloads of a partition, then their pruned versions, and what each of the pruned is."""

    pairs: Pairs
    dense: int  # how many
    request: Rows
    choice: Rows
    realised: F
    need: F  # bytes, of all


def partition_columns(grid: Grid, part: Partition) -> tuple[Columns, dict[str, list[float]]]:
    """Rows of a partition, by request, family, sparsity, device and runtime; and why combinations are left out, with their sparsities.

    Raises
    ------
    InputError
        Only for names that do not load.
    """
    notes: dict[str, list[float]] = {}
    work = _pruned(grid, part, notes)
    if work is None:
        return empty_columns(), notes
    profiles = [load_hardware(name) for name in grid.hardware]
    found, runs = [], np.ones((len(work.request), len(profiles)), dtype=bool)
    for h, hw in enumerate(profiles):
        comparisons, errors = _on_device(work, hw, grid)
        found.append(comparisons)
        for i, error in errors.items():
            runs[work.choice == i, h] = False
            notes.setdefault(f"{part.choices[i][0].name} on {hw.name}: {error}", []).append(part.choices[i][1])
    order = np.lexsort((work.choice, work.request))
    columns = _columns(grid, part, work, order, profiles, found)
    if not runs.all():
        kept = np.repeat(runs[order].reshape(-1), len(grid.runtimes))
        columns = {name: column[kept] for name, column in columns.items()}
    return columns, notes


def empty_columns() -> Columns:
    """No rows."""
    none = Text(np.zeros(0, dtype=np.int32), ())
    return {name: none if kind is str else np.zeros(0, dtype=_NUMPY[kind]) for name, kind in COLUMNS.items()}


def _pruned(grid: Grid, part: Partition, notes: dict[str, list[float]]) -> _Work | None:
    model, setting = load_model(part.model), grid.setting(part.formats, part.devices)
    requests = Requests.of(lambda b, s: setting.lower(model, part.phase, b, s), part.shapes)
    stacks, request, choice, realised = [Stack.of(requests.workloads)], [], [], []
    for i, (family, sparsity) in enumerate(part.choices):
        pruned = prune_many(requests, family.name, sparsity, ideal=grid.ideal, options=dict(family.options))
        for reason in pruned.refused:
            reason = reason.replace(f" at sparsity {sparsity:g}", "")
            notes.setdefault(reason if family.name in reason else f"{family.name}: {reason}", []).append(sparsity)
        if pruned.stack is not None:
            stacks.append(pruned.stack)
            request.append(pruned.kept)
            choice.append(np.full(len(pruned.kept), i))
            realised.append(pruned.realised)
    if len(stacks) == 1:
        return None
    whose, stack = np.concatenate(request), Stack.join(stacks)
    dense = len(part.shapes)
    pairs = Pairs(stack, np.concatenate([np.arange(dense), whose]))
    need = bytes_needed(stack)
    return _Work(pairs, dense, whose, np.concatenate(choice), np.concatenate(realised), need)


def _on_device(work: _Work, hw: HardwareProfile, grid: Grid) -> tuple[tuple[Comparison, ...], dict[int, str]]:
    """Comparisons under each runtime, and the choices the device cannot run, with the reason; their numbers mean nothing."""
    try:
        return compare(work.pairs, hw, grid.runtimes, grid.level), {}
    except InputError as error:
        reason = str(error)
    many, size = work.dense, len(work.pairs.stack)
    choices = np.unique(work.choice)
    out = tuple(
        Comparison(*(np.ones(size, dtype=_COMPARISON[f.name]) for f in fields(Comparison))) for _ in grid.runtimes
    )
    errors: dict[int, str] = {}
    try:
        compare(Pairs(reordered(work.pairs.stack, np.arange(many)), np.arange(many)), hw, grid.runtimes, grid.level)
    except InputError:
        return out, {int(i): reason for i in choices}  # not even the dense model
    for i in choices:
        at = np.r_[np.arange(many), many + np.flatnonzero(work.choice == i)]
        try:
            found = compare(Pairs(reordered(work.pairs.stack, at), work.pairs.dense[at]), hw, grid.runtimes, grid.level)
        except InputError as error:
            errors[int(i)] = str(error)
            continue
        for into, one in zip(out, found):
            for f in fields(Comparison):
                getattr(into, f.name)[at] = getattr(one, f.name)
    return out, errors


def _columns(
    grid: Grid,
    part: Partition,
    work: _Work,
    order: Rows,
    profiles: Sequence[HardwareProfile],
    found: Sequence[tuple[Comparison, ...]],
) -> Columns:
    """The table's columns: workloads in order, on every device, under every runtime."""
    shape = (len(order), len(profiles), len(grid.runtimes))
    size = int(np.prod(shape))
    pruned, request, choice = work.dense + order, work.request[order], work.choice[order]

    def spread(values: NDArray[Any], axis: int) -> NDArray[Any]:
        """Values along one axis of the three, repeated along the others."""
        return np.ascontiguousarray(
            np.broadcast_to(values.reshape([-1 if a == axis else 1 for a in range(3)]), shape)
        ).reshape(-1)

    def text(codes: NDArray[Any], values: Sequence[str], axis: int) -> Text:
        return Text(spread(codes.astype(np.int32), axis), tuple(values))

    def same(value: str) -> Text:
        return Text(np.zeros(size, dtype=np.int32), (value,))

    def timed(name: str) -> NDArray[Any]:
        table = [[getattr(c, name) for c in comparisons] for comparisons in found]
        return np.stack([np.stack(row, axis=-1) for row in table], axis=1)[pruned].reshape(-1)

    families = list(dict.fromkeys(family for family, _ in part.choices))
    family_code = np.array([families.index(family) for family, _ in part.choices])[choice]
    capacity = np.array([float(hw.memory_bytes) for hw in profiles])
    dense_need, pruned_need = (spread(work.need[at], 0) for at in (request, pruned))
    room = spread(capacity, 1)
    gain, speedup = timed("roofline_bound") - 1.0, timed("speedup")
    tokens = grid.new_tokens if part.phase == "generate" else 0
    columns: Columns = {
        "model": same(load_model(part.model).name),
        "hardware": text(np.arange(len(profiles)), [hw.name for hw in profiles], 1),
        "family": text(family_code, [f.name for f in families], 0),
        "sparsity": spread(np.array([s for _, s in part.choices])[choice], 0),
        "realised_sparsity": spread(work.realised[order], 0),
        "phase": same(part.phase),
        "batch": spread(np.array([b for b, _ in part.shapes], dtype=np.int64)[request], 0),
        "seq": spread(np.array([s for _, s in part.shapes], dtype=np.int64)[request], 0),
        "dtype": same(part.formats.dtype),
        "runtime": text(np.arange(len(grid.runtimes)), grid.runtimes, 2),
        "dense_s": timed("dense_s"),
        "pruned_s": timed("pruned_s"),
        "speedup": speedup,
        "speedup_lower": timed("lower"),
        "speedup_upper": timed("upper"),
        "flop_bound": spread(work.pairs.flop_bound[pruned], 0),
        "byte_bound": spread(work.pairs.byte_bound[pruned], 0),
        "roofline_bound": gain + 1.0,
        "limit": Text(timed("limit").astype(np.int32), BOUNDS),
        "measured_bound": np.full(size, np.nan),
        "efficiency": np.where(gain > 1e-9, (speedup - 1.0) / np.where(gain > 1e-9, gain, 1.0), np.nan),
        "limit_share": timed("limit_share"),
        "level": np.full(size, grid.level),
        "calibrated": timed("calibrated").astype(bool),
        "new_tokens": np.full(size, tokens, dtype=np.int64),
        "weight_dtype": same(part.formats.weight_dtype or part.formats.dtype),
        "kv_dtype": same(part.formats.kv_dtype or part.formats.dtype),
        "devices": np.full(size, part.devices, dtype=np.int64),
        "parallel": same(grid.parallel if part.devices > 1 else "none"),
        "ideal": np.full(size, grid.ideal),
        "dense_memory_bytes": dense_need,
        "pruned_memory_bytes": pruned_need,
        "capacity_bytes": room,
        "dense_fits": dense_need <= room,
        "pruned_fits": pruned_need <= room,
        "options": text(family_code, [f.label for f in families], 0),
    }
    return {name: columns[name] for name in COLUMNS}
