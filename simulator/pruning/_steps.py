"""Define steps of a pruning, and apply several to a workload: :func:`prune_steps`.

In every step, layers have their numbers in the dense model: steps that remove layers are applied last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.models.difference import consecutive
from simulator.pruning import FAMILIES, Family, listed_layers, prune
from simulator.pruning._family import SUBLAYERS, one_of
from simulator.pruning._methods import METHODS
from simulator.pruning._rows import layer_count
from simulator.workload import Workload

# a fraction, one fraction per layer, or one of these per part
Sparsity = float | tuple[float, ...] | tuple[tuple[str, float | tuple[float, ...]], ...] | None


@dataclass(frozen=True)
class PruningStep:
    """One step of a pruning: a family or a published method, how much it removes, and where."""

    name: str
    sparsity: Sparsity = None  # None: the default of the family, or whole listed layers
    layers: tuple[int, ...] | None = None  # None: all
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts, sparsity = [self.name], _argument(self.sparsity)
        if isinstance(sparsity, dict):
            parts += [f"{part}={fraction:.9g}" for part, fraction in sparsity.items()]
        elif sparsity is not None:
            parts.append(f"{sparsity:.9g}")
        if self.layers is not None:
            parts.append(f"layers={','.join(consecutive(self.layers))}")
        parts += [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in self.options]
        return " ".join(parts)

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Families of the step: one, those of a method, or none if the name is unknown."""
        names = METHODS[self.name].family.split("+") if self.name in METHODS else [self.name]
        return tuple(FAMILIES[name] for name in names if name in FAMILIES)

    @property
    def budgeted(self) -> bool:
        """Whether the step keeps a number of tokens, so that its sparsity follows from the length of a request."""
        options = METHODS[self.name].options if self.name in METHODS else dict(self.options)
        return options.get("budget") is not None

    @property
    def removes_layers(self) -> bool:
        return any(family.layers == "some" for family in self.families)

    @property
    def argument(self) -> Any:
        sparsity = _argument(self.sparsity)
        if sparsity is None and self.layers is None and not self.budgeted:
            sparsity = self.families[0].default
            if sparsity is None:
                raise InputError(f"{self.name}: expected a fraction such as {self.name} 0.25")
        return sparsity

    def by_family(self, workload: Workload) -> tuple[PruningStep, ...]:
        """Return the step of each family that a method applies to a workload; a step of a family is returned."""
        if self.name not in METHODS:
            return (self,)
        found = METHODS[self.name].families_of(workload, _argument(self.sparsity))
        return tuple(PruningStep(name, _hashable(part), None, tuple(sorted(own.items()))) for name, part, own in found)

    def apply(self, workload: Workload, *, ideal: bool = False) -> Workload:
        for step in self.by_family(workload):
            workload = prune(workload, step.name, step.argument, layers=step.layers, ideal=ideal, **dict(step.options))
        return workload


def _hashable(sparsity: Any) -> Any:
    """Return an argument of :func:`simulator.prune` as the sparsity of a step."""
    if isinstance(sparsity, Mapping):
        return tuple((part, _hashable(fraction)) for part, fraction in sparsity.items())
    return tuple(np.asarray(sparsity).tolist()) if np.ndim(sparsity) else sparsity


def _argument(sparsity: Sparsity) -> Any:
    found: Any = sparsity
    return dict(found) if isinstance(found, tuple) and isinstance(found[0], tuple) else found


def prune_steps(workload: Workload, steps: Sequence[PruningStep], *, ideal: bool = False, plan: str = "") -> Workload:
    """Return the workload pruned by steps. Errors name the step, and the plan that contains the steps."""
    step: PruningStep | None = None
    try:
        for step in in_order(steps, workload):
            workload = step.apply(workload, ideal=ideal)
    except InputError as error:
        raise InputError(": ".join(str(part) for part in (plan, step, error) if part)) from None
    return workload


def in_order(steps: Sequence[PruningStep], workload: Workload) -> Iterator[PruningStep]:
    """Yield the steps in the order in which they prune a workload: those that remove layers are last."""
    keeping = [step for step in steps if not step.removes_layers]
    listed = [step for step in steps if step.removes_layers and step.layers is not None]
    rest = [step for step in steps if step.removes_layers and step.layers is None]
    yield from (*_joined(keeping, layer_count(workload)), *_renumbered(listed), *rest)


def _joined(steps: Sequence[PruningStep], layers: int) -> Iterator[PruningStep]:
    """Yield steps; steps of one family at different layers become one step with a sparsity per layer."""
    groups: list[list[PruningStep]] = []
    for step in steps:
        for group in groups:
            first, taken = group[0], {layer for s in group for layer in s.layers or ()}
            equal = (step.name, step.options) == (first.name, first.options)
            if equal and step.layers and first.layers and taken.isdisjoint(step.layers):
                group.append(step)
                break
        else:
            groups.append([step])
    for group in groups:
        yield group[0] if len(group) == 1 else _by_layer(group, layers)


def _by_layer(steps: Sequence[PruningStep], layers: int) -> PruningStep:
    first, family = steps[0], steps[0].families[0]
    tables: dict[str, FloatArray] = {}
    for step in steps:
        found = _argument(family.default if step.sparsity is None else step.sparsity)
        if found is None:
            raise InputError(f"{step}: expected a fraction")
        parts = found if isinstance(found, dict) else dict.fromkeys(SUBLAYERS if family.targets else ("",), found)
        for part, fraction in parts.items():
            table = tables.setdefault(part, np.zeros(layers))
            table[listed_layers(step.layers, layers)] = fraction
    each = tuple((part, tuple(table.tolist())) for part, table in tables.items())
    return PruningStep(first.name, each if family.targets else each[0][1], options=first.options)


def _renumbered(steps: Sequence[PruningStep]) -> Iterator[PruningStep]:
    """Yield steps that remove listed layers; after a step, layers have new numbers."""
    if len(steps) < 2:
        yield from steps
        return
    gone: dict[str, set[int]] = {part: set() for part in SUBLAYERS}
    for step in steps:
        unit = dict(step.options).get("unit", "layer")
        one_of("unit", unit, ("layer", "both", *SUBLAYERS))
        if step.sparsity is not None:
            raise InputError(f"{step}: expected no fraction, as several steps remove listed layers")
        for part in SUBLAYERS if unit in ("layer", "both") else (unit,):
            gone[part] |= set(step.layers or ())
    whole = sorted(set.intersection(*gone.values()))
    if whole:
        yield PruningStep("depth", layers=tuple(whole))
    for part, layers in gone.items():
        if left := sorted(layers.difference(whole)):
            now = tuple(layer - int(np.searchsorted(whole, layer)) for layer in left)
            yield PruningStep("depth", layers=now, options=(("unit", part),))
