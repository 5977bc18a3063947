"""The inverse question: which pruning reaches a target?

Use :func:`advise`. Configurations (:mod:`simulator.predict.configurations`) reach it on all devices, engines and
requests at once. Families are asked on one after the other: the least sparsity of each is searched on a grid of
sparsities, and then between the last that misses the target and the first that reaches it. Around it, for families that
change widths, the aligned widths are timed one by one: time falls in steps, and a width just above a step wastes what
the next one grants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.display import Displayed, by_column, few, items_html, table_html
from simulator.errors import InputError
from simulator.models.changes import content_of
from simulator.models.library import load_model
from simulator.predict.choices import FamilyChoice, families
from simulator.predict.configurations import FAMILIES, Configuration, Place, Target, configurations_of
from simulator.predict.configurations import LARGEST_SPARSITY as LARGEST_SPARSITY
from simulator.predict.rows import Columns, Piece, columns_of, plain, work_of
from simulator.predict.settings import Setting, one_measured, profiles, requests_of, settings_of
from simulator.predict.speedup import speedups
from simulator.pruning import prune
from simulator.units import percent, ratio

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload

COARSE, FINE = 0.02, 0.001
"""Steps of the search, first and then between the two neighbours it found."""

PAIRS: tuple[tuple[str, str], ...] = (
    ("depth", "semi_structured"), ("width", "semi_structured"),
    ("depth", "kv_cache"), ("width", "kv_cache"), ("depth", "token"),
)  # fmt: skip
"""Families that go together, are not the same lever twice, and not a configuration."""

FORMATS: tuple[tuple[str | None, str | None], ...] = (("int8", None), ("int4", None), (None, "fp8"))
"""Formats of weights and cache to set beside pruning."""

ALIGN = 16  # widths looked at are multiples of it, as the families round to
REACH = 0.06  # how far around the width that was found, as a share of the dense one
MOST_WIDTHS = 1000  # of a model that is wider than any, every so many
STEPS = 3  # named at most
STEEP = 3.0  # a step is a fall of the time so many times the average over its surroundings

Quality = Mapping[str, Sequence[tuple[float, float, str]]]
"""Family -> (sparsity, quality lost, where it was measured)."""


@dataclass(frozen=True)
class WidthStep:
    """A width at which time has just stepped down."""

    name: str  # what is that wide: inner (of the MLP), hidden, or rank (of the down projection)
    width: int
    sparsity: float  # to ask the family for to get it (width: of the MLP alone, attention as advised)
    pruned_s: float
    speedup: float
    saved: float  # share of the time, against the next wider aligned width
    reached: bool  # whether the target is


@dataclass(frozen=True, repr=False)
class Advice(Displayed):
    """A family for one device and request, at the least sparsity that reaches the target, or else at the fastest."""

    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    dtype: str
    engine: str
    family: str
    target: float
    reached: bool  # by some sparsity up to LARGEST_SPARSITY
    sparsity: float
    realised_sparsity: float
    sure_sparsity: float | None  # the least whose whole interval reaches the target
    dense_s: float
    pruned_s: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    bottleneck: str
    calibrated: bool
    quality_loss: float | None  # at the nearest sparsity measured at or above, where given
    quality_at: float | None
    quality_source: str
    steps: tuple[WidthStep, ...]  # aligned widths around it where time steps down; none for families that change none

    def _title(self) -> str:
        where = f"{self.model} on {self.hardware}, {self.phase}, batch {self.batch}, seq {self.seq}, {self.engine}"
        least = f"{self.family} reaches {ratio(self.target)}x from {percent(self.sparsity)}"
        most = f"{self.family} misses {ratio(self.target)}x, {ratio(self.speedup)}x at {percent(self.sparsity)}"
        return f"{where}: {least if self.reached else most}"


@dataclass(frozen=True)
class Alternative:
    """Something other than one family that may reach the target: what, and how fast it is."""

    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    engine: str
    what: str
    speedup: float
    speedup_lower: float
    speedup_upper: float
    reached: bool


# fmt: off
_COLUMNS = {
    "configurations": "hardware engine configuration layers hidden kv_heads inner kept pruned_s speedup probability "
    "bottleneck",
    "advice": "hardware engine family reached sparsity sure_sparsity pruned_s speedup speedup_lower speedup_upper",
    "alternatives": "hardware engine what reached speedup speedup_lower speedup_upper",
}
# fmt: on
"""Columns that a notebook shows of each table of :class:`Advised`."""


@dataclass(frozen=True, repr=False)
class Advised(Displayed):
    """Advice by family, best first for each device and request; what else there is; what was left out; and
    configurations, the one that keeps most parameters first."""

    advice: tuple[Advice, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]
    configurations: tuple[Configuration, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """Advice, then configurations, which are of no family, as dictionaries."""
        return [*(a.to_dict() for a in self.advice), *({"family": None, **c.to_dict()} for c in self.configurations)]

    def _title(self) -> str:
        reached = few((a.family for a in self.advice if a.reached), 8) or "no family"
        families, shapes = ({a.family for a in self.advice}, {c.configuration for c in self.configurations})
        return f"reached by {reached} of {len(families)} families, and by {len(shapes)} configurations"

    def _columns(self) -> Mapping[str, Any]:
        """A row for each of :meth:`rows`."""
        return by_column(self.rows())

    def _html(self) -> str:
        parts = []
        for name, columns in _COLUMNS.items():
            if rows := getattr(self, name):
                parts += [f"<p>{name}", table_html({c: [getattr(row, c) for row in rows] for c in columns.split()})]
        return "".join((*parts, items_html(self.notes)))


def advise(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    target: float | Target,
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    family: Sequence[str] = ("all",),
    *,
    engine: Sequence[str] = (),
    setting: Setting | None = None,
    ideal: bool = False,
    quality: Quality = MappingProxyType({}),
    probability: float = 0.5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Advised:
    """What reaches a target, a speedup above 1 unless told otherwise; requests, engines and setting are those of
    :func:`simulator.table`.

    ``probability`` are those with which a configuration must reach it, by its interval; ``progress`` is told steps done
    and steps in all.

    >>> found = advise("llama-3.1-8b", ["h100"], 1.3, ["decode"], family=["depth", "unstructured"])
    >>> [(a.family, a.reached) for a in found.advice]
    [('depth', True), ('unstructured', False)]
    >>> 1.3 <= found.advice[0].speedup < 1.4
    True
    """
    target = target if isinstance(target, Target) else Target(target)
    settings, chosen = settings_of(setting, engine), families(family, [load_model(model)])
    devices, requests = profiles(hardware), requests_of(phase, batch, seq)
    one_measured(settings[0], {"hardware": devices, "engine": settings}, requests)
    for name, values in {"hardware": devices, "family": chosen, "request": requests}.items():
        if not values:
            raise InputError(f"{name}: expected at least one")
    shapes = load_model(model)
    places = [Place.of(shapes, s, r, devices, target) for r, s in itertools.product(requests, settings)]
    kinds, rest = 0, len(places) * len(devices)

    def of_kinds(done: int, total: int) -> None:
        nonlocal kinds
        kinds = total
        progress(done, total + rest)

    advice: list[Advice] = []
    others: list[Alternative] = []
    configurations: list[Configuration] = []
    notes: dict[str, None] = {}
    if set(chosen) & set(FAMILIES.values()) and max(t for place in places for t in place.targets) > 1.0:
        configurations, said = configurations_of(
            shapes, places, chosen, probability, content_of(model, shapes), of_kinds
        )
        notes |= dict.fromkeys(said)
    steps = itertools.count(kinds + 1)
    for place in places:
        meta = place.dense.meta
        request = meta.phase, ((meta.batch, meta.seq),)
        search = _Search(Piece(shapes, place.setting, *request, (), ideal), chosen, notes)
        for hw, needed in zip(devices, place.targets):
            if needed > 1.0:
                found, more = search.on(hw, needed, quality)
                advice, others = [*advice, *found], [*others, *more]
            else:
                where = f"{hw.label}, {place.setting.engine_name}, {meta.phase}, batch {meta.batch}, seq {meta.seq}"
                notes[f"{where}: the dense model reaches it"] = None
            progress(next(steps), kinds + rest)
    if not (advice or configurations) and min(t for place in places for t in place.targets) > 1.0:
        raise InputError("; ".join(notes) or "nothing to advise")
    return Advised(tuple(advice), tuple(others), tuple(notes), tuple(configurations))


class _Search:
    """One request: every family on the coarse grid, pruned once for all devices, and what is asked around it."""

    target: float

    def __init__(self, piece: Piece, chosen: Sequence[str], notes: dict[str, None]) -> None:
        self.piece, self.notes = piece, notes
        grid = [round(COARSE * i, 6) for i in range(1, round(LARGEST_SPARSITY / COARSE) + 1)]
        choices = tuple(itertools.product(map(FamilyChoice, chosen), grid))
        refused: list[tuple[Any, str]] = []
        self.coarse = work_of(replace(piece, choices=choices), lambda choice, why, _: refused.append((choice, why)))
        (self.dense,) = self.coarse.requests.workloads
        supported = {choices[i][0].name for i in self.coarse.choice}
        self.families = [name for name in chosen if name in supported]
        reasons: dict[str, list[str]] = {}
        for choice, error in refused:
            reasons.setdefault(choices[choice][0].name, []).append(error)
        for name, errors in reasons.items():
            if name not in supported:  # one sparsity may be right, and the engine have no kernels
                error = min(errors, key=lambda text: "at sparsity" in text)
                notes[error if name in error else f"{name}: {error}"] = None

    def on(self, hw: HardwareProfile, target: float, quality: Quality) -> tuple[list[Advice], list[Alternative]]:
        """Advice of every family on a device, best first, and the alternatives there."""
        self.target = target
        coarse = columns_of(self.coarse, [hw], _refuse)
        least, sure = (self.least(coarse, hw, name) for name in ("speedup", "speedup_lower"))
        family, advice = plain(coarse["family"]), []
        for name in self.families:
            sparsity = least.get(name)
            if sparsity is None:  # none reaches the target: the fastest
                sparsity = float(coarse["sparsity"][np.argmax(np.where(family == name, coarse["speedup"], 0.0))])
            reached = name in least
            measured = sorted(q for q in quality.get(name, ()) if q[0] >= sparsity - 1e-9)
            at, loss, source = measured[0] if measured and reached else (None, None, "")
            row = {key: plain(column).tolist()[0] for key, column in self.rows([(name, sparsity)], hw).items()}
            advice.append(
                Advice(
                    **{f.name: row[f.name] for f in fields(Advice) if f.name in row},
                    target=self.target,
                    reached=reached,
                    sure_sparsity=sure.get(name),
                    quality_loss=loss,
                    quality_at=at,
                    quality_source=source,
                    steps=self.steps(name, sparsity, hw) if reached else (),
                )
            )
        # those that reach the target first, by sparsity; then the others by how close they come
        advice.sort(key=lambda a: (not a.reached, a.sparsity if a.reached else -a.speedup))
        others = [*self.pairs(hw, coarse, least), *self.formats(hw)]
        return advice, sorted(others, key=lambda o: (not o.reached, -o.speedup))

    def rows(self, asked: Iterable[tuple[str, Any]], hw: HardwareProfile) -> Columns:
        """Rows of some families at some sparsities; what is not supported has none."""
        choices = tuple((FamilyChoice(name), sparsity) for name, sparsity in asked)
        work = work_of(replace(self.piece, choices=choices), _refuse)
        return columns_of(work, [hw], _refuse)

    def least(self, coarse: Columns, hw: HardwareProfile, name: str) -> dict[str, float]:
        """The least sparsity of each family whose speedup (or its lower end) reaches the target."""
        first = self.first(coarse, name)
        fine = []
        for family, (row, sparsity) in first.items():
            same = row > 0 and plain(coarse["family"])[row - 1] == family
            before = float(coarse["sparsity"][row - 1]) if same else 0.0
            many = round((sparsity - before) / FINE)
            fine += [(family, round(before + FINE * i, 6)) for i in range(1, many)]
        finer = self.first(self.rows(fine, hw), name)
        return {family: sparsity for family, (_, sparsity) in {**first, **finer}.items()}

    def first(self, columns: Columns, name: str) -> dict[str, tuple[int, float]]:
        """The first row of each family that reaches the target, and its sparsity."""
        family, sparsity = plain(columns["family"]), columns["sparsity"].tolist()
        reaches = np.flatnonzero(columns[name] >= self.target).tolist()
        return {family[row]: (row, sparsity[row]) for row in reversed(reaches)}

    def steps(self, family: str, sparsity: float, hw: HardwareProfile) -> tuple[WidthStep, ...]:
        """Where time steps down around a sparsity, wider first; "width" keeps its KV groups, varies the inner width."""
        down = np.flatnonzero(self.dense.is_role("down") & (self.dense.stage == 0))
        if not len(down) or family not in ("width", "width_cross", "low_rank"):
            return ()
        hidden, inner = int(self.dense.n[down].max()), int(self.dense.k[down].max())
        name, whole = {
            "width": ("inner", float(inner)),
            "width_cross": ("hidden", float(hidden)),
            "low_rank": ("rank", hidden * inner / (hidden + inner)),  # at which the factors are as large as the weight
        }[family]
        around = (1.0 - sparsity) * whole
        low = max(ALIGN, round((around - REACH * int(whole)) / ALIGN) * ALIGN)
        high = min(int(whole) // ALIGN * ALIGN, round((around + REACH * int(whole)) / ALIGN) * ALIGN)
        widths = list(range(low, high + 1, ALIGN * (1 + max(0, high - low) // (ALIGN * MOST_WIDTHS))))
        fractions = [1.0 - width / whole for width in widths]
        asked = [{"attention": sparsity, "mlp": f} if family == "width" else f for f in fractions]
        rows = self.rows([(family, choice) for choice in asked], hw)
        at, time, speed = (rows[column].tolist() for column in ("choice", "pruned_s", "speedup"))
        if len(at) < 4:
            return ()
        # widths rise, and time with them: what the next wider one costs more
        fall = rows["pruned_s"][1:] / rows["pruned_s"][:-1] - 1.0
        steep = np.flatnonzero(fall > max(1e-4, STEEP * max(float(np.log(time[-1] / time[0])) / len(fall), 0.0)))
        steep = steep[np.argsort(-fall[steep], kind="stable")][:STEPS]
        out = []
        for i in sorted(steep.tolist(), reverse=True):
            saved, reached = 1.0 - time[i] / time[i + 1], speed[i] >= self.target
            out.append(WidthStep(name, widths[at[i]], fractions[at[i]], time[i], speed[i], saved, reached))
        return tuple(out)

    def pairs(self, hw: HardwareProfile, coarse: Columns, least: Mapping[str, float]) -> list[Alternative]:
        """Pairs of families at the least equal sparsity that reaches the target, if that is less than either alone."""
        family, out = plain(coarse["family"]), []
        for pair in PAIRS:
            if not set(pair) <= set(self.families):
                continue
            alone = min((least[name] for name in pair if name in least), default=1.0)
            both: list[tuple[str, Workload]] = []
            for s in coarse["sparsity"][family == pair[0]][1::2].tolist():
                other = 0.5 if pair[1] == "semi_structured" else s
                if s >= alone:
                    break
                with suppress(InputError):
                    once = prune(self.dense, pair[0], s, ideal=self.piece.ideal)
                    twice = prune(once, pair[1], other, ideal=self.piece.ideal)
                    both.append((f"{pair[0]} {s:g} and {pair[1]} {other:g}", twice))
            out += [o for o in self.alternatives(hw, both) if o.reached][:1]
        return out

    def formats(self, hw: HardwareProfile) -> list[Alternative]:
        """Narrower formats of weights and cache, without pruning."""
        setting, meta = self.piece.setting, self.dense.meta
        out: list[Alternative] = []
        for weight, cache in FORMATS:
            changed = replace(setting, weight_dtype=weight or setting.weight_dtype, kv_dtype=cache or setting.kv_dtype)
            if changed == setting:
                continue
            names = " and ".join(f"{what} in {n}" for what, n in (("weights", weight), ("cache", cache)) if n)
            try:
                lowered = changed.lower(load_model(self.piece.model), meta.phase, meta.batch, meta.seq)
                out += self.alternatives(hw, [(f"no pruning, {names}", lowered)])
            except InputError as error:
                self.notes[f"{hw.label}: {error}"] = None
        return out

    def alternatives(self, hw: HardwareProfile, named: Sequence[tuple[str, Workload]]) -> list[Alternative]:
        """Workloads in place of the dense one, timed."""
        meta, setting = self.dense.meta, self.piece.setting
        found = speedups(self.dense, [w for _, w in named], hw, setting.level, dense_s=setting.dense_s)
        where = (meta.model, hw.label, meta.phase, meta.batch, meta.seq, setting.engine_name)
        ends = [(s.speedup, s.lower, s.upper, s.speedup >= self.target) for s in found]
        return [Alternative(*where, what, *end) for (what, _), end in zip(named, ends)]


def _refuse(_choice: int | None, reason: str, device: str) -> None:
    """Pass over what a family does not support, but not what a device cannot run."""
    if device:
        raise InputError(reason)
