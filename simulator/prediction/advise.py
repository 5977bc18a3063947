"""Find the prunings that reach a target.

Use :func:`advise`. Configurations (:mod:`simulator.prediction.configurations`) reach the target on all devices, engines
and requests at once. The minimum sparsity of each family is searched per device, first on a coarse grid of sparsities,
then on a fine grid between the last that misses the target and the first that reaches it. For families that change
widths, aligned widths near the result are timed too: time falls in steps, and a width just above a step wastes time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.display import Displayed, by_column, few, items_html, table_html
from simulator.errors import InputError
from simulator.models.changes import content_of
from simulator.models.library import load_model
from simulator.prediction.batch import batch_of
from simulator.prediction.compare import results_of
from simulator.prediction.configurations import FAMILIES, Configuration, RequiredSpeedups, Target, configurations_of
from simulator.prediction.configurations import LARGEST_SPARSITY as LARGEST_SPARSITY
from simulator.prediction.labels import plain
from simulator.prediction.operating import probability_of
from simulator.prediction.prunings import Pruning, families
from simulator.prediction.reach import Reach, reach
from simulator.prediction.result import HasResult, Result, Results
from simulator.prediction.scenario import Scenario, batch_name, by_budget, check_measured, profiles, scenarios
from simulator.prediction.speedup import speedups
from simulator.pruning import prune
from simulator.units import percent, ratio

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload

COARSE, FINE = 0.02, 0.001
"""Steps of the coarse and the fine grid of sparsities."""

PAIRS: tuple[tuple[str, str], ...] = (
    ("depth", "semi_structured"), ("width", "semi_structured"),
    ("depth", "kv_cache"), ("width", "kv_cache"), ("depth", "token"),
)  # fmt: skip
"""Families to combine: they remove different things, and no configuration covers the pair."""

FORMATS: tuple[tuple[str | None, str | None], ...] = (("int8", None), ("int4", None), (None, "fp8"))
"""Formats of weights and cache, as alternatives to pruning."""

ALIGN = 16  # widths are multiples of it, as families round to
NEIGHBOURHOOD = 0.06  # widths around the result, as a share of the dense width
MOST_WIDTHS = 1000  # most widths to time; larger ranges are thinned
STEPS = 3  # most steps to report
STEEP = 3.0  # factor over the average fall of the time around it from which a fall is a step


@dataclass(frozen=True, repr=False)
class WidthStep(HasResult):
    """A width just below a step of the time."""

    result: Result
    name: str  # dimension: inner (of the MLP), hidden, or rank (of the down projection)
    width: int
    fraction: float  # removed share of the dimension (family width: of the MLP only, attention as advised)
    saved: float  # share of the time of the next wider aligned width
    reached: bool  # whether the target is reached


@dataclass(frozen=True, repr=False)
class Advice(HasResult):
    """A family on one device and request, at the minimum sparsity that reaches the target, else at the fastest."""

    result: Result
    target: float
    probability: float  # of reaching the target, from the speedup's interval
    reached: bool  # by some sparsity up to LARGEST_SPARSITY
    sure_sparsity: float | None  # the minimum at which the whole interval reaches the target
    steps: tuple[WidthStep, ...]  # aligned widths nearby where time steps down; empty for families that keep widths

    def to_dict(self) -> dict[str, Any]:
        """Return the result's fields, then the others, with steps as dictionaries."""
        return super().to_dict() | {"steps": [step.to_dict() for step in self.steps]}

    def _title(self) -> str:
        r = self.result
        least = f"{r.family} reaches {ratio(self.target)}x from {percent(r.sparsity)}"
        most = f"{r.family} misses {ratio(self.target)}x, {ratio(r.speedup)}x at {percent(r.sparsity)}"
        return f"{r.model} on {r.request}: {least if self.reached else most}"


@dataclass(frozen=True, repr=False)
class Alternative(HasResult):
    """A pair of families, or a number format, that may reach the target."""

    result: Result
    what: str
    reached: bool


# fmt: off
_COLUMNS: Mapping[str, str] = {
    "configurations": "hardware engine configuration layers hidden kv_heads inner kept pruned_s speedup probability "
                      "bottleneck",
    "advice": "hardware engine family reached sparsity sure_sparsity pruned_s speedup speedup_lower speedup_upper",
    "alternatives": "hardware engine what reached speedup speedup_lower speedup_upper",
    "given": "hardware engine prune reached probability margin pruned_s speedup speedup_lower speedup_upper",
}
# fmt: on
"""Table of :class:`Advised` -> columns to display in a notebook."""


@dataclass(frozen=True, repr=False)
class Advised(Displayed):
    """Advice by family, best first for each device and request; alternatives; notes; configurations, by falling number
    of parameters; the settings where the dense model reaches the target; and what given prunings reach."""

    advice: tuple[Advice, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]
    configurations: tuple[Configuration, ...] = ()
    dense: tuple[str, ...] = ()
    given: tuple[Reach, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """Return advice, then configurations, or what given prunings reach, as dictionaries."""
        return [held.to_dict() for held in (*self.advice, *self.configurations, *self.given)]

    def _title(self) -> str:
        if self.given:
            return f"{sum(one.reached for one in self.given)} of {len(self.given)} predictions reach the target"
        reached = few((a.result.family for a in self.advice if a.reached), 8) or "no family"
        families, shapes = {a.result.family for a in self.advice}, {c.configuration for c in self.configurations}
        return f"reached by {reached} of {len(families)} families, and by {len(shapes)} configurations"

    def _columns(self) -> Mapping[str, Any]:
        """Return the columns of :meth:`rows`."""
        return by_column(self.rows())

    def _html(self) -> str:
        parts = []
        tables: dict[str, Sequence[HasResult]] = {name: getattr(self, name) for name in _COLUMNS}
        for name, held in tables.items():
            if rows := [one.to_dict() for one in held]:
                parts += [f"<p>{name}", table_html({c: [row[c] for row in rows] for c in _COLUMNS[name].split()})]
        return "".join((*parts, items_html(self.notes)))


def advise(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    target: float | Target,
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    family: Sequence[str] | None = None,
    *,
    prune: Sequence[str] = (),
    engine: Sequence[str] = (),
    scenario: Scenario | None = None,
    probability: float = 0.5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Advised:
    """Find what reaches a target: a :class:`Target`, or a speedup above 1. Requests, engines and scenario are those of
    :func:`simulator.table`.

    ``family`` are the families to search (None: all); with texts of ``--prune`` nothing is searched, and the result is
    what they reach. ``probability`` is the minimum probability with which a configuration or a text must reach the
    target, from the speedup's interval; ``progress`` is called with steps done and their number.

    >>> found = advise("llama-3.1-8b", ["h100"], 1.3, ["decode"], family=["depth", "unstructured"])
    >>> [(a.result.family, a.reached) for a in found.advice]
    [('depth', True), ('unstructured', False)]
    >>> 1.3 <= found.advice[0].result.speedup < 1.4
    True
    """
    target, config = target if isinstance(target, Target) else Target(target), load_model(model)
    if prune:
        if family is not None:
            raise InputError("prune: a text states the whole pruning; give no family with it")
        given, lines = reach(
            config,
            hardware,
            target,
            prune,
            phase,
            batch,
            seq,
            engine=engine,
            scenario=scenario,
            probability=probability,
            progress=progress,
        )
        return Advised((), (), lines, given=given)
    chosen, devices = families(("all",) if family is None else family, [config]), profiles(hardware)
    if not chosen:
        raise InputError("family: expected at least one")
    requested = scenarios(scenario, [config], engine, phase, batch, seq)
    check_measured(requested, devices)
    targets = [RequiredSpeedups.of(some, same, target) for one in requested for some, same in by_budget(one, devices)]
    kinds, rest = 0, len(requested) * len(devices)

    def of_kinds(done: int, total: int) -> None:
        nonlocal kinds
        kinds = total
        progress(done, total + rest)

    advice: list[Advice] = []
    others: list[Alternative] = []
    configurations: list[Configuration] = []
    notes: dict[str, None] = {}
    enough: list[str] = []
    if set(chosen) & set(FAMILIES.values()) and max(s for one in targets for s in one.speedups) > 1.0:
        content = content_of(model, config)
        configurations, missed = configurations_of(config, targets, chosen, probability, content, of_kinds)
        notes |= dict.fromkeys(missed)
    done = itertools.count(kinds + 1)
    for one in targets:
        search = _Search(one.scenario, chosen, notes)
        for hw, needed in zip(one.hardware, one.speedups):
            if needed > 1.0:
                found, more = search.on(hw, needed)
                advice, others = [*advice, *found], [*others, *more]
            else:
                meta = one.dense.meta
                request = f"{meta.phase}, {batch_name(meta.phase)} {meta.batch}, seq {meta.seq}"
                enough.append(f"{hw.label} in {one.scenario.engine_name} ({request})")
            progress(next(done), kinds + rest)
    if not (advice or configurations) and min(s for one in targets for s in one.speedups) > 1.0:
        raise InputError("; ".join(notes) or "nothing to advise")
    return Advised(tuple(advice), tuple(others), tuple(notes), tuple(configurations), tuple(enough))


class _Search:
    """Search for one scenario: all families on the coarse grid, pruned once for all devices, then on finer grids."""

    target: float

    def __init__(self, scenario: Scenario, chosen: Sequence[str], notes: dict[str, None]) -> None:
        self.scenario, self.notes = scenario, notes
        (self.dense,) = scenario.workloads
        grid = [round(COARSE * i, 6) for i in range(1, round(LARGEST_SPARSITY / COARSE) + 1)]
        self.prunings = [Pruning.of(name, s) for name, s in itertools.product(chosen, grid)]
        reasons: dict[str, list[str]] = {}

        def reject(pruning: int | None, reason: str, _device: str) -> None:
            if pruning is not None:
                reasons.setdefault(self.prunings[pruning].family, []).append(reason)

        self.coarse = batch_of(scenario, self.prunings, reject)
        supported = {self.prunings[i].family for i in self.coarse.pruning if i >= 0}
        self.families = [name for name in chosen if name in supported]
        for name, found in reasons.items():
            if name not in supported:  # report a sparsity without pattern only if the engine lacks no kernels
                error = min(found, key=lambda text: "at sparsity" in text)
                notes[error if name in error else f"{name}: {error}"] = None

    def on(self, hw: HardwareProfile, target: float) -> tuple[list[Advice], list[Alternative]]:
        """Return the advice for every family on a device, best first, and the alternatives."""
        self.target = target
        coarse = results_of(self.coarse, self.prunings, [hw], self.scenario, _reject)
        least, sure = (self.least(coarse, hw, name) for name in ("speedup", "speedup_lower"))
        family, advice = plain(coarse.columns["family"]), []
        for name in self.families:
            sparsity = least.get(name)
            if sparsity is None:  # no sparsity reaches the target: take the fastest
                fastest = np.where(family == name, coarse.columns["speedup"], 0.0).argmax()
                sparsity = float(coarse.columns["sparsity"][fastest])
            r = self.results([Pruning.of(name, sparsity)], hw)[0]
            advice.append(
                Advice(
                    result=r,
                    target=target,
                    probability=probability_of(target, r.speedup, r.speedup_lower, r.speedup_upper, r.level),
                    reached=name in least,
                    sure_sparsity=sure.get(name),
                    steps=self.steps(name, sparsity, hw) if name in least else (),
                )
            )
        # families that reach the target by sparsity, then the others by speedup
        advice.sort(key=lambda a: (not a.reached, a.result.sparsity if a.reached else -a.result.speedup))
        others = [*self.pairs(hw, coarse, least), *self.formats(hw)]
        return advice, sorted(others, key=lambda o: (not o.reached, -o.result.speedup))

    def results(self, prunings: Sequence[Pruning], hw: HardwareProfile) -> Results:
        """Return the results of the supported ones of some prunings."""
        return results_of(batch_of(self.scenario, prunings, _reject), prunings, [hw], self.scenario, _reject)

    def least(self, coarse: Results, hw: HardwareProfile, name: str) -> dict[str, float]:
        """Return the minimum sparsity of each family whose speedup (or its lower end) reaches the target."""
        first = self.first(coarse, name)
        fine = []
        for family, (row, sparsity) in first.items():
            same = row > 0 and plain(coarse.columns["family"])[row - 1] == family
            before = float(coarse.columns["sparsity"][row - 1]) if same else 0.0
            many = round((sparsity - before) / FINE)
            fine += [Pruning.of(family, round(before + FINE * i, 6)) for i in range(1, many)]
        finer = self.first(self.results(fine, hw), name)
        return {family: sparsity for family, (_, sparsity) in {**first, **finer}.items()}

    def first(self, results: Results, name: str) -> dict[str, tuple[int, float]]:
        """Return the first row of each family that reaches the target, and its sparsity."""
        family, sparsity = plain(results.columns["family"]), results.columns["sparsity"].tolist()
        reaches = np.flatnonzero(results.columns[name] >= self.target).tolist()
        return {family[row]: (row, sparsity[row]) for row in reversed(reaches)}

    def steps(self, family: str, sparsity: float, hw: HardwareProfile) -> tuple[WidthStep, ...]:
        """Find steps of the time around a sparsity, wider first; "width" keeps KV groups and varies the inner width."""
        down = np.flatnonzero(self.dense.is_role("down") & (self.dense.stage == 0))
        if not len(down) or family not in ("width", "width_cross", "low_rank"):
            return ()
        hidden, inner = int(self.dense.n[down].max()), int(self.dense.k[down].max())
        name, whole = {
            "width": ("inner", float(inner)),
            "width_cross": ("hidden", float(hidden)),
            "low_rank": ("rank", hidden * inner / (hidden + inner)),  # the factors are as large as the weight
        }[family]
        around = (1.0 - sparsity) * whole
        distance = NEIGHBOURHOOD * int(whole)
        low = max(ALIGN, round((around - distance) / ALIGN) * ALIGN)
        high = min(int(whole) // ALIGN * ALIGN, round((around + distance) / ALIGN) * ALIGN)
        widths = list(range(low, high + 1, ALIGN * (1 + max(0, high - low) // (ALIGN * MOST_WIDTHS))))
        fractions = [1.0 - width / whole for width in widths]
        sparsities = [{"attention": sparsity, "mlp": f} if family == "width" else f for f in fractions]
        results = self.results([Pruning.of(family, one) for one in sparsities], hw)
        if len(results) < 4:
            return ()
        at, time = results.pruning.tolist(), results.columns["pruned_s"]
        # widths and times rise: the relative extra time of the next wider width
        fall = time[1:] / time[:-1] - 1.0
        steep = np.flatnonzero(fall > max(1e-4, STEEP * max(float(np.log(time[-1] / time[0])) / len(fall), 0.0)))
        steep = steep[np.argsort(-fall[steep], kind="stable")][:STEPS]
        return tuple(
            WidthStep(
                result=results[i],
                name=name,
                width=widths[at[i]],
                fraction=fractions[at[i]],
                saved=float(1.0 - time[i] / time[i + 1]),
                reached=results[i].speedup >= self.target,
            )
            for i in sorted(steep.tolist(), reverse=True)
        )

    def pairs(self, hw: HardwareProfile, coarse: Results, least: Mapping[str, float]) -> list[Alternative]:
        """Return pairs of families at the minimum equal sparsity that reaches the target, if below that of either."""
        family, ideal, out = plain(coarse.columns["family"]), self.scenario.ideal, []
        for pair in PAIRS:
            if not set(pair) <= set(self.families):
                continue
            alone = min((least[name] for name in pair if name in least), default=1.0)
            both: list[tuple[str, Workload]] = []
            for s in coarse.columns["sparsity"][family == pair[0]][1::2].tolist():
                other = 0.5 if pair[1] == "semi_structured" else s
                if s >= alone:
                    break
                with suppress(InputError):
                    twice = prune(prune(self.dense, pair[0], s, ideal=ideal), pair[1], other, ideal=ideal)
                    both.append((f"{pair[0]} {s:g} and {pair[1]} {other:g}", twice))
            out += [o for o in self.alternatives(hw, both) if o.reached][:1]
        return out

    def formats(self, hw: HardwareProfile) -> list[Alternative]:
        """Return narrower formats of weights and cache, without pruning."""
        one, out = self.scenario, list[Alternative]()
        for weight, cache in FORMATS:
            changed = replace(one, weight_dtype=weight or one.weight_dtype, kv_dtype=cache or one.kv_dtype)
            if changed == one:
                continue
            names = " and ".join(f"{what} in {n}" for what, n in (("weights", weight), ("cache", cache)) if n)
            try:
                out += self.alternatives(hw, [(f"no pruning, {names}", changed.workloads[0])])
            except InputError as error:
                self.notes[f"{hw.label}: {error}"] = None
        return out

    def alternatives(self, hw: HardwareProfile, named: Sequence[tuple[str, Workload]]) -> list[Alternative]:
        """Compare named workloads with the dense workload."""
        one = self.scenario
        results = speedups(self.dense, [w for _, w in named], hw, one.level, dense_s=one.dense_s)
        return [Alternative(r, what, r.speedup >= self.target) for (what, _), r in zip(named, results)]


def _reject(_pruning: int | None, reason: str, device: str) -> None:
    """Ignore prunings that a family does not support; raise InputError if a device cannot run one."""
    if device:
        raise InputError(reason)
