"""The inverse question: which pruning reaches a target speedup, and at which widths does it step?

Use :func:`advise`. Each family's least sparsity is searched on a grid of sparsities, all of them timed in one pass a device, and then
between the last that misses the target and the first that reaches it. Around it, for families that change widths, the aligned widths are
timed one by one: time falls in steps, and a width just above a step wastes what the next one grants.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.kernels.intervals import BOUNDS
from simulator.kernels.stack import Stack
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.predict.advise_widths import WidthStep, width_steps
from simulator.predict.compare import Comparison, Pairs, compare
from simulator.predict.settings import Setting, once, one_of, whole_number
from simulator.pruning import prune
from simulator.workload import PHASES

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.workload import Workload

LARGEST_SPARSITY = 0.9
"""Where the search ends: beyond it no published method keeps a model useful."""

COARSE, FINE = 0.02, 0.001
"""Steps of the search, first and then between the two neighbours it found."""

Quality = Mapping[str, Sequence[tuple[float, float, str]]]
"""Family -> (sparsity, quality lost, where it was measured)."""


@dataclass(frozen=True)
class Advice:
    """One family on one device for one request.

    Attributes
    ----------
    reached : bool
        Whether some sparsity up to :data:`LARGEST_SPARSITY` has the target speedup.
    sparsity, realised_sparsity : float
        The least that has it; where none has, the one with the largest speedup.
    sure_sparsity : float or None
        The least whose whole interval reaches the target; None where none does.
    dense_s, pruned_s, speedup, speedup_lower, speedup_upper, limit
        There.
    quality_loss, quality_at, quality_source : float, float, str
        Quality lost at the nearest sparsity measured at or above, where given to :func:`advise`; else None, None, "".
    steps : tuple of WidthStep
        Aligned widths around it where time steps down; empty for families that change none.
    """

    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    dtype: str
    runtime: str
    family: str
    target: float
    reached: bool
    sparsity: float
    realised_sparsity: float
    sure_sparsity: float | None
    dense_s: float
    pruned_s: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    limit: str
    calibrated: bool
    quality_loss: float | None
    quality_at: float | None
    quality_source: str
    steps: tuple[WidthStep, ...]


@dataclass(frozen=True)
class Alternative:
    """Something other than one family that may reach the target: what, and how fast it is."""

    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    what: str
    speedup: float
    speedup_lower: float
    speedup_upper: float
    reached: bool


@dataclass(frozen=True)
class Advised:
    """Advice by family, best first for each device and request; what else there is; what was left out."""

    advice: tuple[Advice, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]


def advise(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    target: float,
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    family: Sequence[str] = ("all",),
    *,
    setting: Setting | None = None,
    ideal: bool = False,
    quality: Quality | None = None,
) -> Advised:
    """What reaches a target speedup.

    Parameters
    ----------
    model : str or ModelConfig
    hardware : sequence of str or HardwareProfile
    target : float, above 1
        Speedup wanted.
    phase, batch, seq : sequences
        Requests, as in :func:`simulator.predict.table.table`.
    family : sequence of str
        Families to consider, or ``all``.
    setting : Setting, optional
        Number formats, runtime, devices.
    ideal : bool
        Leave out the work that pruning adds.
    quality : mapping, optional
        Quality lost by family: (sparsity, loss, source) each.

    Returns
    -------
    Advised

    Raises
    ------
    InputError
        For bad values.

    Examples
    --------
    >>> found = advise("llama-3.1-8b", ["h100"], 1.3, ["decode"], family=["depth", "unstructured"])
    >>> [(a.family, a.reached) for a in found.advice]
    [('depth', True), ('unstructured', False)]
    >>> 1.3 <= found.advice[0].speedup < 1.4
    True
    """
    from simulator.predict.table import families

    if not (np.isfinite(target) and 1.0 < target <= 1000.0):
        raise InputError(f"target {target:g}: expected a speedup above 1, such as 1.5")
    setting, chosen = setting or Setting(), families(family)
    config = load_model(model) if isinstance(model, str) else model
    devices = list({hw.name: hw for hw in (load_hardware(h) if isinstance(h, str) else h for h in hardware)}.values())
    requests = [
        (one_of("phase", p, PHASES), whole_number("batch", b), whole_number("seq", s))
        for p, b, s in itertools.product(once(phase), once(batch), once(seq))
    ]
    for name, values in (("hardware", devices), ("family", chosen), ("request", requests)):
        if not values:
            raise InputError(f"{name}: expected at least one")
    advice: list[Advice] = []
    others: list[Alternative] = []
    notes: dict[str, None] = {}
    for p, b, s in requests:
        search = _Search(setting.lower(config, p, b, s), chosen, setting, ideal, target, notes)
        for hw in devices:
            advice.extend(sorted((search.advice(name, hw, quality or {}) for name in search.families), key=_rank))
            others.extend(search.alternatives(hw, config))
    if not advice:
        raise InputError("; ".join(notes) or "nothing to advise")
    return Advised(tuple(advice), tuple(others), tuple(notes))


def _rank(a: Advice) -> tuple[Any, ...]:
    """Those that reach the target first, by sparsity; then the others by how close they come."""
    return (not a.reached, a.sparsity if a.reached else -a.speedup)


class _Search:
    """Pruned versions of one dense workload, made once and shared by all devices."""

    def __init__(
        self,
        dense: Workload,
        chosen: Sequence[str],
        setting: Setting,
        ideal: bool,
        target: float,
        notes: dict[str, None],
    ) -> None:
        self.dense, self.setting, self.ideal, self.target, self.notes = dense, setting, ideal, target, notes
        self.made: dict[tuple[str, float], Workload] = {}
        coarse = [round(COARSE * i, 6) for i in range(1, round(LARGEST_SPARSITY / COARSE) + 1)]
        self.grid: dict[str, list[float]] = {}
        for name in chosen:
            error = ""
            for sparsity in coarse:
                try:
                    self.pruned(name, sparsity)
                except InputError as refused:
                    error = str(refused)
                else:
                    self.grid.setdefault(name, []).append(sparsity)
            if name not in self.grid:
                notes[error if name in error else f"{name}: {error}"] = None
        self.timed: dict[str, dict[str, Comparison]] = {}

    @property
    def families(self) -> list[str]:
        return list(self.grid)

    def pruned(self, family: str, sparsity: float) -> Workload:
        key = family, sparsity
        if key not in self.made:
            self.made[key] = prune(self.dense, family, sparsity, ideal=self.ideal)
        return self.made[key]

    def compare(self, pruned: Sequence[Workload], hw: HardwareProfile, dense: Workload | None = None) -> Comparison:
        """Workloads against the dense one (at index 0 of the result)."""
        pairs = Pairs(Stack.of([dense or self.dense, *pruned]), np.zeros(1 + len(pruned), dtype=np.intp))
        return compare(pairs, hw, (self.setting.runtime,), self.setting.level)[0]

    def coarse(self, hw: HardwareProfile) -> dict[str, tuple[Any, Any]]:
        """Speedups and their lower ends of every family on the coarse grid, in one pass a device."""
        if hw.name not in self.timed:
            every = [(name, s) for name, grid in self.grid.items() for s in grid]
            c = self.compare([self.pruned(name, s) for name, s in every], hw)
            owner = np.array([name for name, _ in every])
            self.timed[hw.name] = {name: _chosen(c, 1 + np.flatnonzero(owner == name)) for name in self.grid}
        return {name: (c.speedup, c.lower) for name, c in self.timed[hw.name].items()}

    def least(self, family: str, hw: HardwareProfile, lower: bool) -> float | None:
        """The least sparsity whose speedup (or its lower end) reaches the target; None where none does."""
        grid = self.grid[family]
        reaches = np.flatnonzero(self.coarse(hw)[family][lower] >= self.target)
        if not len(reaches):
            return None
        first = int(reaches[0])
        before = grid[first - 1] if first else 0.0
        between = [round(before + FINE * i, 6) for i in range(1, round((grid[first] - before) / FINE))]
        fine = []
        for sparsity in between:
            try:
                fine.append((sparsity, self.pruned(family, sparsity)))
            except InputError:
                continue  # a family of few sparsities
        if not fine:
            return grid[first]
        c = self.compare([w for _, w in fine], hw)
        values = (c.lower if lower else c.speedup)[1:]
        found = np.flatnonzero(values >= self.target)
        return fine[int(found[0])][0] if len(found) else grid[first]

    def advice(self, family: str, hw: HardwareProfile, quality: Quality) -> Advice:
        sparsity = self.least(family, hw, lower=False)
        reached = sparsity is not None
        if sparsity is None:
            sparsity = self.grid[family][int(np.argmax(self.coarse(hw)[family][0]))]
        sure = self.least(family, hw, lower=True)
        workload, meta = self.pruned(family, sparsity), self.dense.meta
        c = _chosen(self.compare([workload], hw), np.array([1]))
        measured = sorted(q for q in quality.get(family, ()) if q[0] >= sparsity - 1e-9)
        loss = measured[0] if measured and reached else (None, None, "")
        steps = (
            width_steps(self.dense, family, sparsity, lambda ws: self.compare(ws, hw), self.target, self.ideal)
            if reached
            else ()
        )
        return Advice(
            model=meta.model,
            hardware=hw.name,
            phase=meta.phase,
            batch=meta.batch,
            seq=meta.seq,
            dtype=self.setting.dtype,
            runtime=self.setting.runtime,
            family=family,
            target=self.target,
            reached=reached,
            sparsity=sparsity,
            realised_sparsity=workload.meta.applied[-1].realised,
            sure_sparsity=sure,
            dense_s=float(c.dense_s[0]),
            pruned_s=float(c.pruned_s[0]),
            speedup=float(c.speedup[0]),
            speedup_lower=float(c.lower[0]),
            speedup_upper=float(c.upper[0]),
            limit=BOUNDS[int(c.limit[0])],
            calibrated=bool(c.calibrated[0]),
            quality_loss=loss[1],
            quality_at=loss[0],
            quality_source=loss[2],
            steps=steps,
        )

    def alternatives(self, hw: HardwareProfile, config: ModelConfig) -> list[Alternative]:
        """Pairs of families at the least equal sparsity that reaches the target, and narrower formats of weights and cache."""
        meta = self.dense.meta
        out = []

        def add(what: str, c: Comparison, i: int) -> None:
            values = (float(c.speedup[i]), float(c.lower[i]), float(c.upper[i]))
            reached = values[0] >= self.target
            out.append(Alternative(meta.model, hw.name, meta.phase, meta.batch, meta.seq, what, *values, reached))

        for first, second in PAIRS:
            if first not in self.grid or second not in self.grid:
                continue
            both: list[tuple[float, Workload]] = []
            # a pair is worth its trouble where it prunes less of both than either alone
            alone = [s for s in (self.least(first, hw, False), self.least(second, hw, False)) if s is not None]
            for s in (s for s in self.grid[first][1::2] if s < min(alone, default=1.0)):
                try:
                    other = 0.5 if second == "semi_structured" else s
                    both.append((s, prune(self.pruned(first, s), second, other, ideal=self.ideal)))
                except InputError:
                    continue
            if both:
                c = self.compare([w for _, w in both], hw)
                reaches = np.flatnonzero(c.speedup[1:] >= self.target)
                if len(reaches):
                    s = both[int(reaches[0])][0]
                    add(
                        f"{first} {s:g} and {second} {0.5 if second == 'semi_structured' else s:g}",
                        c,
                        1 + int(reaches[0]),
                    )
        for weight, cache in FORMATS:
            changed = replace(
                self.setting, weight_dtype=weight or self.setting.weight_dtype, kv_dtype=cache or self.setting.kv_dtype
            )
            if changed == self.setting:
                continue
            try:
                c = self.compare([changed.lower(config, meta.phase, meta.batch, meta.seq)], hw)
            except InputError as error:
                self.notes[f"{hw.name}: {error}"] = None
                continue
            add(
                "no pruning, "
                + " and ".join(f"{what} in {name}" for what, name in (("weights", weight), ("cache", cache)) if name),
                c,
                1,
            )
        return sorted(out, key=lambda a: (not a.reached, -a.speedup))


PAIRS: tuple[tuple[str, str], ...] = (
    ("depth", "width"),
    ("depth", "semi_structured"),
    ("width", "semi_structured"),
    ("depth", "kv_cache"),
    ("width", "kv_cache"),
    ("depth", "token"),
)
"""Families that go together and are not the same lever twice."""

FORMATS: tuple[tuple[str | None, str | None], ...] = (("int8", None), ("int4", None), (None, "fp8"))
"""Formats of weights and cache to set beside pruning."""


def _chosen(c: Comparison, at: Any) -> Comparison:
    return Comparison(**{name: values[at] for name, values in vars(c).items()})
