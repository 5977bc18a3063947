"""Find the plan of least score that meets all targets, as the model is predicted, not as its costs are added.

Costs of variants are exact next to one plan only: where the host or a shared limit hides time, they change with the
rest of the model. So the program (:mod:`simulator.plans.program`) is solved with costs next to the dense model, its
plan is predicted whole, and costs and limits are set again next to that plan, until the plan stays and meets the
targets. :class:`Solver` has the steps; :meth:`Solver.solve` the loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from simulator.arrays import FloatArray, IndexArray
from simulator.errors import InputError
from simulator.models.block import Block
from simulator.models.config import ModelConfig
from simulator.plans.library import Library
from simulator.plans.prices import PricedRequest, Probes, planned, quantities
from simulator.plans.program import Program
from simulator.plans.targets import NAMES, Limit, Targets

COARSE = 3e-3
"""Relative gap of the programs that only lead to the plan next to which costs are set."""

MOST_STEPS = 16
"""Most plans that are predicted before the best one that meets the targets is returned."""

_TIGHTER = 0.999
"""Factor on a limit that a plan misses again, beyond what it misses."""


@dataclass(frozen=True)
class Variants:
    """Variants of groups of layers, as arrays of a :class:`~simulator.plans.program.Program`."""

    library: Library
    groups: tuple[tuple[int, ...], ...]
    place: tuple[tuple[int, ...], ...]  # of each variant: its index in the library's layers, one per layer of its group
    group: IndexArray  # (V,)

    @classmethod
    def of(cls, library: Library, groups: Sequence[tuple[int, ...]]) -> Variants:
        """Return the variants that all layers of each group have; the first of each group is the dense one."""
        place, owner = [], []
        for g, layers in enumerate(groups):
            texts = [{text: i for i, text in enumerate(library.texts(layer))} for layer in layers]
            shared = [text for text in texts[0] if all(text in own for own in texts[1:])]
            place += [tuple(own[text] for own in texts) for text in shared]
            owner += [g] * len(shared)
        return cls(library, tuple(groups), tuple(place), np.array(owner, dtype=np.intp))

    @property
    def dense(self) -> IndexArray:
        """The dense variant (G,) of each group."""
        return np.asarray(np.unique(self.group, return_index=True)[1])

    def sums(self, column: Sequence[FloatArray]) -> FloatArray:
        """Return the sums (V,) of values by layer and variant over the layers of each group."""
        pairs = zip(self.place, self.group.tolist())
        return np.array([sum(float(column[i][j]) for i, j in zip(self.groups[g], own)) for own, g in pairs])

    def blocks(self, choice: IndexArray) -> tuple[Block, ...]:
        """Return the layers of a choice (G,)."""
        found: dict[int, Block] = {}
        for layers, v in zip(self.groups, choice.tolist()):
            found |= {i: self.library.layers[i][j] for i, j in zip(layers, self.place[v])}
        return tuple(found[i] for i in range(len(found)))

    def uniform(self) -> list[IndexArray]:
        """Return the variants (indices into V) of each plan family in which all remaining layers have one shape; whole
        layers may be removed."""
        library, texts = self.library, list[tuple[str, str]]()
        for layers, own in ((self.groups[g], own) for own, g in zip(self.place, self.group.tolist())):
            texts.append(library.texts(layers[0])[own[0]])
        gone = np.array([text == ("none", "none") for text in texts])
        shapes = dict.fromkeys(text for text in texts if text != ("none", "none"))
        found = []
        for shape in shapes:
            some = np.flatnonzero(gone | np.array([text == shape for text in texts]))
            if len(np.unique(self.group[some])) == len(self.groups):
                found.append(some)
        return found


@dataclass(frozen=True)
class LimitCosts:
    """Costs of the variants next to a plan: one row per limit, and how the limits follow."""

    cost: FloatArray  # (R, V)
    offset: FloatArray  # (R,) what is outside the variants
    factor: FloatArray  # (R,) from the quantity to the end of its interval that counts
    dense: tuple[Mapping[str, FloatArray], ...]  # quantities by setting; the dense model first


@dataclass(frozen=True)
class Found:
    """A plan, predicted whole."""

    choice: IndexArray
    blocks: tuple[Block, ...]
    score: float
    predicted: tuple[Mapping[str, FloatArray], ...]  # quantities by setting: the dense model, the plan
    reached: FloatArray  # (R,) the limited quantities, at the end of their intervals that counts
    meets: bool


@dataclass
class Solver:
    """Steps of a search; plans are predicted once."""

    variants: Variants
    score: FloatArray  # (V,)
    settings: tuple[PricedRequest, ...]
    targets: Targets
    families: list[IndexArray] = field(default_factory=list)  # sets of variants that a plan is chosen from; none: all
    steps: int = 0
    gap: float = 0.0  # share of the score that a better plan could save at most, by added costs
    sum_error: float = 0.0  # of the first plan: predicted over added cost of the first limit, less 1
    _known: dict[tuple[int, ...], Found] = field(default_factory=dict)

    @property
    def model(self) -> ModelConfig:
        """The dense model."""
        return self.variants.library.model

    @cached_property
    def limits(self) -> list[Limit]:
        """Limits of all settings."""
        dense = [quantities([self.model], at) for at in self.settings]
        return [limit for at, own in zip(self.settings, dense) for limit in self.targets.limits(at, own)]

    def costs(self, choice: IndexArray) -> LimitCosts:
        """Return the costs next to a plan."""
        base = self.variants.blocks(choice)
        probes = Probes.of(self.variants.library, base)
        found = {id(at): quantities(probes.models, at) for at in self.settings}
        library, rows, offset, factor = self.variants.library, [], [], []
        place = [own.index(block) for own, block in zip(library.layers, base)]
        for limit in self.limits:
            values = found[id(limit.at)]
            prices = probes.prices(values[limit.quantity])
            rows.append(self.variants.sums(prices))
            value = float(values[limit.quantity][1])
            offset.append(value - sum(float(own[i]) for own, i in zip(prices, place)))
            factor.append(float(limit.reached(values, self.targets.confidence)[1]) / value)
        return LimitCosts(
            np.array(rows), np.array(offset), np.array(factor), tuple(found[id(at)] for at in self.settings)
        )

    def predict(self, choice: IndexArray) -> Found:
        """Return a plan, predicted whole."""
        key = tuple(choice.tolist())
        if key not in self._known:
            blocks = self.variants.blocks(choice)
            model = planned(self.model, blocks)
            predicted = {id(at): quantities([self.model, model], at) for at in self.settings}
            reached = np.array(
                [limit.reached(predicted[id(limit.at)], self.targets.confidence)[1] for limit in self.limits]
            )
            meets = bool((reached <= self.most * (1.0 + 1e-9)).all())
            own = tuple(predicted[id(at)] for at in self.settings)
            self._known[key] = Found(choice, blocks, float(self.score[choice].sum()), own, reached, meets)
        return self._known[key]

    @property
    def most(self) -> FloatArray:
        """(R,) largest value of each limited quantity."""
        return np.array([limit.most for limit in self.limits])

    def choose(self, cost: FloatArray, limit: FloatArray, gap: float = 0.0) -> tuple[IndexArray, float, float]:
        """Return the choice of least score within limits of added costs, by what share it exceeds them, and the share
        of its score that better ones could save at most."""
        best: tuple[float, float, IndexArray, float] | None = None
        for some in self.families or [np.arange(len(self.score))]:
            own = Program(self.variants.group[some], self.score[some], cost[:, some]).solve(limit, gap)
            if best is None or (own.excess, own.score) < best[:2]:
                best = own.excess, own.score, some[own.choice], own.gap
        assert best is not None
        return best[2], best[0], best[3]

    def solve(self) -> Found:
        """Return the plan of least score that meets the targets; InputError with the nearest plan if none does.

        A coarse program finds the plan next to which costs are set; the last ones are exact.
        """
        base = self.predict(self.variants.dense)
        if base.meets:
            return base
        best: Found | None = None
        nearest, gap, margin, seen = base, COARSE, np.ones(len(self.limits)), set[tuple[int, ...]]()
        for self.steps in range(1, MOST_STEPS + 1):
            costs = self.costs(base.choice)
            choice, excess, left = self.choose(costs.cost, margin * self.most / costs.factor - costs.offset, gap)
            found = self.predict(choice)
            if self.steps == 1:
                added = costs.cost[:, choice].sum(axis=1) + costs.offset
                self.sum_error = float(found.predicted[0][self.limits[0].quantity][1] / added[0]) - 1.0
            if self._excess(found) < self._excess(nearest):
                nearest = found
            if found.meets and (best is None or found.score <= best.score):
                best, self.gap = found, left
            again = tuple(choice.tolist()) in seen or tuple(choice.tolist()) == tuple(base.choice.tolist())
            if (again or found.meets) and gap > 0.0:
                gap = 0.0
            elif again and (best is not None or excess > 0.0):
                break
            elif again:
                margin = margin * np.minimum(self.most / found.reached, 1.0) * _TIGHTER
            elif gap == 0.0 and found is best:
                break
            seen.add(tuple(choice.tolist()))
            base = found
        if best is None:
            raise InputError(self._unreachable(nearest))
        return best

    def _excess(self, found: Found) -> float:
        return float((found.reached / self.most).max())

    def _unreachable(self, nearest: Found) -> str:
        """Return the message for targets that no plan meets, with what the nearest plan reaches."""
        missed = []
        for limit, value in zip(self.limits, nearest.reached.tolist()):
            if value > limit.most * (1.0 + 1e-9):
                texts = limit.text(limit.as_target(value)), limit.text(limit.value)
                missed.append(f"{NAMES[limit.target]} {' of '.join(texts)} on {limit.at}")
        kept = [limit for limit, value in zip(self.limits, nearest.reached.tolist()) if value <= limit.most]
        also = f", keeping {' and '.join(dict.fromkeys(NAMES[limit.target] for limit in kept))}" if kept else ""
        return f"target: no plan of these variants meets it; the nearest reaches {'; '.join(missed)}{also}"
