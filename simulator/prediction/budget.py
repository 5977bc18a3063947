"""Compute the kernel budget of a pruning with a dynamic step: the time that its added work may take
and the useful rate that its kernels need to reach a target (:func:`kernel_budget`), and the
batches, lengths and sparsities that reach it (:func:`reaching`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.arrays import BoolArray, FloatArray
from simulator.codes import COLLECTIVE, ELEMENTWISE, PHASES, Phase
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.compare import request_results
from simulator.prediction.notes import inferred_by
from simulator.prediction.prunings import Pruning
from simulator.prediction.wording import GAIN
from simulator.pruning.dynamic.rows import split_at
from simulator.request import Request
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import prediction_intervals
from simulator.workload import Workload, WorkloadBatch, sums

# halvings of the range in which a time is searched: to 1e-9 of the time of the dense pass
HALVINGS = 30
# longest time that is tried, over the time of the dense pass; the upper end of a ratio exceeds 1
LONGEST = 1.5
SHORTEST, MOST_SEQUENCES = 16, 512  # least length and largest batch that are tried
SPARSITIES = tuple(round(0.05 * i, 2) for i in range(1, 20))
# steps of the fine grid in one step of the coarse grid
STEPS = {"batch": 16, "seq": 16, "sparsity": 5}

Ranges = tuple[tuple[float, float], ...]  # first and last value of each range


@dataclass(frozen=True)
class Need:
    """The needs of a pruning to reach a target, with intervals. A time below its interval, or a
    rate above its interval, reaches the target for certain."""

    target: float  # speedup
    # time of the added work per layer and pass, s; 0: no added work is fast enough
    allowed_s: float
    allowed_lower: float
    allowed_upper: float
    # useful rate of the pruning's kernels over that of the dense kernels; infinite: none suffices
    efficiency: float
    efficiency_lower: float
    efficiency_upper: float


@dataclass(frozen=True)
class Reached:
    """Ranges of one setting in which a pruning reaches a target; the other settings are those of
    the request."""

    setting: str  # batch, seq or sparsity
    target: float
    first: float  # least and largest value that were tried
    last: float
    fits: bool  # whether larger values fit into the memory
    predicted: Ranges  # the predicted speedup reaches the target
    certain: Ranges  # the lower end of its interval does


@dataclass(frozen=True)
class KernelBudget:
    """Predictions and needs of the added work and of the pruning's kernels: GEMMs and attention of
    other shapes, kernels or numbers than in the dense model."""

    phase: str  # with most of the added work
    layers: int  # with added work in this phase; 0: outside the layers
    passes: float  # number of passes of this phase
    added_s: float  # time of the added kernels per layer and pass, s; NaN: none
    # time of the host to launch them, or of their gaps in a graph; faster ones keep it
    launch_s: float
    efficiency: float  # useful rate over that of the dense kernels; NaN: all kernels are equal
    needs: tuple[Need, ...]
    reached: tuple[Reached, ...] = ()


def kernel_budget(
    request: Request, pruning: Pruning, hw: HardwareProfile, targets: Sequence[float] = (1.0,)
) -> KernelBudget | None:
    """Return the budget of a pruning for some speedups; None if no dynamic step changes
    anything."""
    dense = lower(request)
    pruned = pruning.apply(dense, request)
    if not any(applied.step is not None for applied in pruned.meta.applied):
        return None
    dense, pruned = _equal_runs(dense, pruned)
    given = _Given.of(dense, pruned, hw, request)
    if not given.spent[1:].any():
        return None
    inferred = inferred_by(dense, hw, request)
    slower = inferred.device if inferred is not None and inferred.consistent else 1.0
    budget = _predicted(given, pruned, slower)
    return replace(budget, needs=tuple(_need(given, budget, target) for target in targets))


def _equal_runs(dense: Workload, pruned: Workload) -> tuple[Workload, Workload]:
    """Split the rows of both workloads at the layers at which rows of either begin or end."""
    ends = np.concatenate([w.layer + i * w.layers for w in (dense, pruned) for i in (0, 1)])
    for layer in np.unique(ends).tolist():
        dense, pruned = split_at(dense, layer), split_at(pruned, layer)
    return dense, pruned


def _predicted(given: _Given, pruned: Workload, slower: float) -> KernelBudget:
    """Return the predictions, with times on a device that is ``slower`` by a factor."""
    p, segment = given.p, given.p.workloads.groups.segment
    launch = (p.host.launch + p.group_gap_s)[1] * given.added_share
    spent, launched = (
        sums(segment // 3, column, (1, len(Phase)))[0] for column in (given.spent[1], launch)
    )
    phase = int(spent.argmax())
    of_phase = pruned.take(pruned.phase == phase)
    added = of_phase.take(of_phase.overhead)
    layers = sum(dict(zip(added.layer.tolist(), added.layers.tolist())).values())
    passes = float(of_phase.count[of_phase.is_role("embedding")].sum())
    each = slower / max(layers * passes, passes, 1.0)
    return KernelBudget(
        phase=PHASES[phase],
        layers=layers,
        passes=passes,
        added_s=float(spent[phase]) * each if spent.any() else math.nan,
        launch_s=float(launched[phase]) * each,
        efficiency=given.efficiency,
        needs=(),
    )


def _need(given: _Given, budget: KernelBudget, target: float) -> Need:
    added_s, own_s = np.maximum(given.spent[[1, -1]].sum(axis=1), 1e-300)
    times = given.times(target)
    allowed = times[:3] / added_s * budget.added_s
    faster = np.divide(own_s, times[3:], out=np.full(3, np.inf), where=times[3:] > 0.0)
    return Need(target, *allowed.tolist(), *(budget.efficiency * faster)[[0, 2, 1]].tolist())


def _different(w: Workload, other: Workload) -> BoolArray:
    """Return a mask of the GEMMs, attention and recurrences of a workload that the other lacks."""
    names = w.SCHEMA.keys() - {"params", "read_bytes", "write_bytes"}
    columns = [np.concatenate([getattr(w, name), getattr(other, name)]) for name in names]
    table = np.stack(columns, axis=1).astype(np.float64).round(9)
    which = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
    computes = ~np.isin(w.kind, (ELEMENTWISE, COLLECTIVE)) & ~w.overhead
    return np.asarray(computes & ~np.isin(which[: len(w)], which[len(w) :]))


def _copies(dense: Workload, pruned: Workload) -> tuple[WorkloadBatch, BoolArray, BoolArray]:
    """Return the workloads of :class:`_Given`, and masks of the rows with a given time, and of the
    pruning's kernels and the dense kernels that they replace."""
    own_dense, own = _different(dense, pruned), _different(pruned, dense)
    replaced = Workload.concat([pruned.take(~own), dense.take(own_dense)])
    from_dense = np.arange(len(replaced)) >= len(pruned) - own.sum()
    batch = WorkloadBatch.of(
        [dense, *[pruned] * 3, *[replaced] * 3], dense=np.zeros(7, dtype=np.intp)
    )
    given = np.r_[own_dense & False, np.tile(pruned.overhead, 3), np.tile(from_dense, 3)]
    return batch, given, np.r_[own_dense, np.tile(own, 3), np.tile(from_dense & False, 3)]


@dataclass(frozen=True)
class _Given:
    """The dense pass, and six pruned passes in which one time is given. In the first three, the
    added work takes this time, which has no error. In the others, the pruning's kernels take it.
    Their rate is relative to the dense kernels, so they have the errors of dense rows, which
    cancel."""

    p: PredictedPass
    rows: BoolArray  # with a given time
    spent: FloatArray  # (7, G) predicted time of these rows
    rest: FloatArray  # (7, G) time of the others
    relative: BoolArray  # (7, G) whether dense rows replace those of the pruning
    added_share: FloatArray  # (G,) share of the added kernels in their number
    efficiency: float  # useful rate of the pruning's kernels over that of the dense kernels
    dense_s: float | None  # measured

    @classmethod
    def of(cls, dense: Workload, pruned: Workload, hw: HardwareProfile, request: Request) -> _Given:
        batch, rows, own = _copies(dense, pruned)
        p, groups = forward_passes(batch, hw, request.level), batch.groups
        spent, own_s = groups.sums(p.row_s * rows), groups.sums(p.row_s * own)
        relative = (np.arange(7)[:, None] > 3) & (spent > 0.0)
        spent[4:], like = own_s[1], [0, *[1] * 6]
        useful, (dense_s, pruned_s) = batch.total(p.ideal_s * own), own_s[:2].sum(axis=1)
        slower = pruned_s / dense_s if dense_s else math.nan
        factor = np.where(rows & (batch.owner > 3), slower, 1.0)
        return cls(
            p=replace(
                p,
                row_s=p.row_s * factor,
                group_gap_s=p.group_gap_s[like],
                host=p.host.take(like),
            ),
            rows=rows,
            spent=spent,
            rest=p.group_s[like] - spent,
            relative=relative,
            added_share=groups.sums(batch.rows.count * rows)[1] / np.maximum(groups.count[1], 1e-9),
            efficiency=float(useful[1] / useful[0] / slower) if dense_s else math.nan,
            dense_s=request.dense_s,
        )

    def times(self, target: float) -> FloatArray:
        """Return the longest times with which the speedup, its lower and its upper end reach a
        target, s: three for the added work, three for the pruning's kernels."""
        low, high = np.zeros(6), np.full(6, LONGEST * self.p.total_s[0])
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            # a host that hides the time keeps the speedup equal, except for rounding
            reached = self.speedups(middle) >= target * (1.0 - 1e-9)
            low, high = np.where(reached, middle, low), np.where(reached, high, middle)
        return low

    def speedups(self, given: FloatArray) -> FloatArray:
        """Return the speedup, its lower and its upper end with three given times, twice."""
        p, owner = self.p, self.p.workloads.owner
        factor = np.r_[1.0, given / np.maximum(self.spent[1:].sum(axis=1), 1e-300)]
        of_rows = np.where(owner > 3, factor[owner], 0.0)
        passes = replace(
            p,
            row_s=np.where(self.rows, of_rows, 1.0) * p.row_s,
            group_s=self.rest + factor[:, None] * self.spent,
        )
        times = prediction_intervals(
            passes, p.level, p.workloads.dense, self.dense_s, self.relative
        )
        ends = np.stack([times.ratio, times.ratio_lower, times.ratio_upper])
        return np.asarray(ends[[0, 1, 2] * 2, np.arange(1, 7)])


def reaching(
    request: Request, pruning: Pruning, hw: HardwareProfile, target: float = 1.0
) -> tuple[Reached, ...]:
    """Return the batches, lengths and, for a pruning at one fraction, sparsities that reach a
    target. A target of 1 is reached by a gain of :data:`simulator.prediction.wording.GAIN`."""

    def reached(setting: str, values: Sequence[float]) -> dict[float, tuple[bool, bool]]:
        """Return whether prediction and lower end reach the target at values that can run."""
        requests, prunings = [request], [pruning]  # a measured time belongs to the first request
        if setting == "sparsity":
            prunings = [pruning.at(value) for value in values]
        for value in values if setting != "sparsity" else ():
            changed: dict[str, Any] = {setting: value}
            with contextlib.suppress(InputError):  # such as a prompt shorter than its prefix
                requests.append(replace(request, **changed))
        # what cannot run is excluded
        columns = request_results(requests, prunings, [hw], lambda *_: None).columns
        fits = columns["pruned_fits"] | ~columns["pruned_fits"].any()
        pays = (columns[end][fits] >= max(target, GAIN) for end in ("speedup", "speedup_lower"))
        return dict(zip(columns[setting][fits].tolist(), zip(*(one.tolist() for one in pays))))

    new = request.new_tokens if request.phase in ("generate", "serve") else 0
    longest = load_model(request.model).max_positions - new
    grids: dict[str, Sequence[float]] = {
        name: [*(first << i for i in range(32) if first << i < last), last]
        for name, first, last in (("batch", 1, MOST_SEQUENCES), ("seq", SHORTEST, longest))
    }
    if pruning.sparsity is not None:
        grids["sparsity"] = SPARSITIES
    out = []
    for setting, grid in grids.items():
        found = reached(setting, grid)
        fine = {
            round(value, 2 if setting == "sparsity" else None)
            for a, b in itertools.pairwise(sorted(found))
            if found[a] != found[b]
            for value in np.linspace(a, b, STEPS[setting] + 1).tolist()
        }
        found |= reached(setting, sorted(fine)) if fine else {}
        if values := sorted(found):
            ranges = (_ranges(values, [found[v][i] for v in values]) for i in (0, 1))
            first, last = values[0], values[-1]
            out.append(Reached(setting, target, first, last, last >= grid[-1], *ranges))
    return tuple(out)


def _ranges(values: Sequence[float], holds: Sequence[bool]) -> Ranges:
    change = np.flatnonzero(np.diff([False, *holds, False]))
    return tuple((values[a], values[b - 1]) for a, b in change.reshape(-1, 2).tolist())
