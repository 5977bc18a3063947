"""Many predictions at once: the product of devices, families, sparsities, phases, batches and lengths as plain records.

Use :func:`table` for a table of speedups, :func:`explanations` for the waterfalls of a few of them. A combination that
a family does not support (2:4 at 0.25) is left out with a note when several families were asked for, and refused when
it was named alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from simulator.arguments import listed, shown
from simulator.display import Displayed, few, items_html, table_html
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.predict.caveats import BETTER, better_than_bound, beyond_measured, fallback, inferred_line
from simulator.predict.choices import Existing, choices_of, found_in
from simulator.predict.compare import compare
from simulator.predict.rows import Notes, Piece, Record, columns_of, note, note_lines, records, work_of
from simulator.predict.settings import (
    MAX_TOKENS,
    Setting,
    batch_name,
    check_fraction,
    one_measured,
    profiles,
    requests_of,
    settings_of,
)
from simulator.predict.speedup import Waterfall, pairs_of, waterfall
from simulator.uncertainty.forward import forward_passes
from simulator.uncertainty.intervals import Inferred
from simulator.workload_batch import WorkloadBatch, memory

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload


# fmt: off
SETTING = ("model", "hardware", "engine", "method", "pruned", "family", "phase", "batch", "seq", "dtype")
PREDICTED = ("sparsity", "dense_s", "pruned_s", "speedup", "speedup_lower", "speedup_upper", "roofline_bound",
             "bottleneck")
# fmt: on
"""Columns that a notebook shows: those that differ, and always."""


@dataclass(frozen=True, repr=False)
class Table(Displayed):
    """Predictions; iterates over its records."""

    records: tuple[Record, ...]
    notes: tuple[str, ...]  # what a person should know beside them: combinations left out, models that do not fit

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def _title(self) -> str:
        models, devices = (few(getattr(r, name) for r in self) for name in ("model", "hardware"))
        return f"{len(self):,} predictions of {models} on {devices}{f'; {len(self.notes)} notes' if self.notes else ''}"

    def _columns(self) -> Mapping[str, Any]:
        """A row a record."""
        return {f.name: [getattr(r, f.name) for r in self] for f in fields(Record)}

    def _html(self) -> str:
        """What tells the rows apart, and what is predicted; then the notes."""
        columns = self._columns()
        apart = [name for name in SETTING if len(set(columns[name])) > 1]
        return table_html({name: columns[name] for name in (*apart, *PREDICTED)}) + items_html(self.notes)


@dataclass(frozen=True, repr=False)
class Explanation(Displayed):
    """A prediction, its waterfall, and what it is of."""

    record: Record
    steps: Waterfall
    dense: Workload = field(repr=False)
    pruned: Workload = field(repr=False)
    hardware: HardwareProfile = field(repr=False)
    inferred: Inferred | None = None  # what a measured time of the dense model says
    dense_s: float | None = None  # that time

    def _title(self) -> str:
        return self.record._title()

    def _html(self) -> str:
        return self.steps._html()

    @cached_property
    def layer_s(self) -> float:
        """What the host takes to launch a layer of the dense model where it sets the pace of either, s; else 0."""
        if self.inferred is not None and self.inferred.consistent:
            return self.inferred.layer_s if self.inferred.host_bound else 0.0
        p = forward_passes(WorkloadBatch.of([self.dense, self.pruned]), self.hardware)
        return float(p.host.layer[0]) if p.host_bound.any() else 0.0

    @cached_property
    def reason(self) -> str:
        """Why the speedup lies above its roofline bound; "" where it does not."""
        r = self.record
        return better_than_bound(self.dense, self.pruned, self.hardware, r.speedup, r.roofline_bound)


def table(
    models: Sequence[str | ModelConfig],
    hardware: Sequence[str | HardwareProfile],
    family: Sequence[str] | None = None,
    sparsity: Sequence[float] | None = None,
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    method: Sequence[str] = (),
    pruned: Sequence[str | ModelConfig] = (),
    engine: Sequence[str] = (),
    setting: Setting | None = None,
    ideal: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Speedups of every combination, each dense workload and its pruned versions timed in one vectorised pass a device.

    Parameters
    ----------
    models, hardware : sequences
        Names, paths or loaded ones; a device named twice counts once.
    family, sparsity : sequences
        Keys of :data:`simulator.FAMILIES`, or ``all``, as where none is named; fractions removed, each in [0, 1),
        :data:`simulator.predict.choices.SPARSITIES` where none is given.
    phase, batch, seq : sequences
        Of :data:`simulator.workload.PHASES`; of sequences, and tokens (prefill) or cached positions (decode) of each.
    method : sequence
        Published methods in place of families, keys of :data:`simulator.METHODS`; where no sparsity is given, at those
        that their papers report.
    pruned : sequence
        Pruned models that exist (paths of checkpoints), in place of families, beside one dense model.
    engine : sequence
        Names or paths (:func:`simulator.list_engines`); none: that of the setting.
    ideal : bool
        Leave out the work that pruning adds (routers, gathers).
    setting : Setting
        Number formats, devices, new tokens and level of all (:class:`simulator.predict.settings.Setting`).
    options : mapping
        Further options of the one family asked for.
    progress : callable
        Called with combinations done and their number.

    Returns
    -------
    Table
        Ordered by model, engine, phase, batch, seq, family, sparsity, hardware.

    Raises
    ------
    InputError
        For what is unknown or out of range, and where nothing is left to predict.

    Examples
    --------
    >>> found = table(["llama-3.1-8b"], ["h100_sxm"], ["depth", "semi_structured"], [0.25])
    >>> [(r.family, r.sparsity) for r in found]
    [('depth', 0.25)]
    >>> len(found.notes)
    1
    """
    models, hardware, engine = listed("models", models), listed("hardware", hardware), listed("engine", engine)
    phase, batch, seq = listed("phase", phase), listed("batch", batch), listed("seq", seq)
    family, sparsity = (None if v is None else listed(n, v) for n, v in (("family", family), ("sparsity", sparsity)))
    method, pruned = listed("method", method), listed("pruned", pruned)
    if not isinstance(options, Mapping | None):
        raise InputError(f"options: expected a mapping from option to value, got {shown(options)}")
    requests, settings = requests_of(phase, batch, seq), settings_of(setting, engine)
    devices, loaded = profiles(hardware), [load_model(m) for m in models]
    choices = choices_of(loaded, family, method, pruned, sparsity, options)
    several = len({(choice.title, choice.label) for choice, _ in choices}) > 1
    axes: dict[str, Sequence[Any]] = {"model": loaded, "hardware": devices, "engine": settings}
    axes |= {"phase": phase}
    for name, values in {**axes, "shape": batch and seq}.items():
        if not values:
            raise InputError(f"{name}: expected at least one")
    for _, b, s in requests:
        if b * s > MAX_TOKENS and set(phase) != {"decode"}:
            raise InputError(f"batch {b} x seq {s}: expected at most {MAX_TOKENS} tokens in a pass")
    one_measured(settings[0], axes, requests)
    notes: Notes = {}

    def refuse(choice: int | None, reason: str, device: str) -> None:
        if choice is None or not several:
            raise InputError(reason)
        note(notes, choices[choice], reason, device)

    found: list[Record] = []
    # in order, once each
    models_of = [(m, one.model if isinstance(one, Existing) else m) for m in loaded for one, _ in choices]
    unfit: dict[str, None] = {line: None for pair in models_of for line in found_in(*pair)}
    jobs = list(itertools.product(loaded, settings, requests))
    for done, (model, setting, (p, b, s)) in enumerate(jobs, start=1):
        piece = Piece(model, setting, p, ((b, s),), choices, ideal)
        work = work_of(piece, refuse)
        (dense,), need = work.requests.workloads, work.bytes_needed[0]
        if (reached := s + dense.meta.new_tokens) > model.max_positions:
            made = f"{model.name} is made for {model.max_positions} positions"
            unfit[f"{made}, fewer than the {reached} asked for; timed as if it took them"] = None
        for hw in devices:
            if need > hw.memory_bytes:
                where = f"{model.name} at {p}, {batch_name(p)} {b}, seq {s} on {hw.label}"
                unfit[f"{where} {_too_large(dense, hw)}; its times are hypothetical"] = None
            if far := beyond_measured(dense, hw):
                unfit[far] = None
        columns = columns_of(work, devices, refuse)
        rows = records(columns)
        for hw in devices:
            told = inferred_by(dense, hw, setting)
            if told and setting.dense_s:
                unfit[inferred_line(told, hw.label, setting.dense_s)] = None
            if stands_in := fallback(hw, dense):
                unfit[stands_in] = None
        unfit |= dict.fromkeys(_gains(rows, columns["choice"], piece, dense, devices))
        found += rows
        if progress is not None:
            progress(done * len(devices), len(jobs) * len(devices))
    lines = note_lines(notes)
    if not found:
        raise InputError(lines[0] if lines else "nothing to predict")
    return Table(tuple(found), (*lines, *unfit))


def inferred_by(dense: Workload, hw: HardwareProfile, setting: Setting) -> Inferred | None:
    """What the measured time of a setting says of a device and its host; None where none was measured."""
    if setting.dense_s is None:
        return None
    return compare(pairs_of(dense, [dense]), hw, setting.level, setting.dense_s)[1]


def _gains(
    rows: Sequence[Record], choices: Any, piece: Piece, dense: Workload, devices: Sequence[HardwareProfile]
) -> Iterator[str]:
    """A note a device on the speedup that lies farthest above its roofline bound."""
    for hw in devices:
        mine = [(r, piece.choices[i]) for r, i in zip(rows, choices.tolist()) if r.hardware == hw.label]
        if not mine:
            continue
        r, (chosen, sparsity) = max(mine, key=lambda row: row[0].speedup / row[0].roofline_bound)
        if r.speedup > BETTER * r.roofline_bound:
            pruned = chosen.pruned(dense, sparsity, piece.setting, piece.ideal)
            why = better_than_bound(dense, pruned, hw, r.speedup, r.roofline_bound)
            at = f"{r.phase}, batch {r.batch}, seq {r.seq}"
            yield f"{hw.label}, {at}: {chosen.title} at {r.sparsity:g} ({r.speedup:.2f}x) is {why}"


def _too_large(dense: Workload, hw: HardwareProfile) -> str:
    """Why a model does not fit, and what would."""
    m, name = memory(dense, hw), batch_name(dense.meta.phase)
    way = f"fits on {m.devices_needed} devices" if m.devices_needed else "no number of devices tried is enough"
    room = hw.memory_bytes - (m.total_bytes - m.cache_bytes)
    largest = int(max(room, 0.0) / max(m.cache_bytes / dense.meta.batch, 1.0))
    way += f"; the largest {name} that fits here is {largest}" if largest else ""
    return f"needs {m.total_bytes / 2**30:.1f} GiB of {m.capacity_bytes / 2**30:.1f} GiB ({way})"


def explanations(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    family: str | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    method: str | None = None,
    pruned: Sequence[str | ModelConfig] = (),
    engine: Sequence[str] = (),
    setting: Setting | None = None,
    ideal: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Explanation, ...]:
    """The loss waterfall of one family at one sparsity (or a mapping from projection kind to fraction), of a
    published method in its place, or of each of some pruned models, for every phase, batch, length, engine and device;
    see :func:`table`. ``progress`` is called with explanations done and their number.

    >>> import math
    >>> (e,) = explanations("llama-3.1-8b", ["h100"], "width", 0.25)
    >>> bool(abs(math.prod(step.factor for step in e.steps) - e.record.speedup) < 1e-9)
    True
    """
    config, devices = load_model(model), profiles(hardware)
    if not pruned and family is None and method is None:
        raise InputError("family: expected one family or method to explain, or a pruned model")
    if family == "all":
        raise InputError("family 'all': expected one family to explain")
    given: Any = [0.0] if isinstance(sparsity, Mapping) else None if sparsity is None else [sparsity]
    names = None if family is None else [family]
    choices = choices_of([config], names, [method] if method else [], pruned, given, options)
    if len(choices) > 1 and not pruned:
        raise InputError(f"sparsity: expected one to explain {method or family}, such as {choices[0][1]:g}")
    if isinstance(sparsity, Mapping):
        choices = ((choices[0][0], {kind: check_fraction(s) for kind, s in sparsity.items()}),)
    settings, requests = settings_of(setting, engine), requests_of(phase, batch, seq)
    one_measured(settings[0], {"hardware": devices, "engine": settings}, requests)

    def refuse(_choice: int | None, reason: str, _device: str) -> None:
        raise InputError(reason)

    out: list[Explanation] = []
    jobs = list(itertools.product(requests, settings, choices))
    for (p, b, s), setting, choice in jobs:
        work = work_of(Piece(config, setting, p, ((b, s),), (choice,), ideal), refuse)
        (dense,) = work.requests.workloads
        w = choice[0].pruned(dense, choice[1], setting, ideal)
        for hw, record in zip(devices, records(columns_of(work, devices, refuse))):
            asked = 1.0 - (1.0 - record.sparsity)  # as simulator.Speedup composes it, to the last digit
            steps = waterfall(dense, w, hw, dense_s=setting.dense_s)
            told = inferred_by(dense, hw, setting)
            out.append(Explanation(replace(record, sparsity=asked), steps, dense, w, hw, told, setting.dense_s))
            progress(len(out), len(jobs) * len(devices))
    return tuple(out)
