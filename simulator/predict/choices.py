"""What a dense model is compared with: a family at a sparsity, a published method, or a pruned model that exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError, unknown
from simulator.models.difference import difference
from simulator.models.library import load_model
from simulator.predict.applied import as_pruned, told_apart
from simulator.predict.settings import check_fraction, once
from simulator.pruning import FAMILIES, prune
from simulator.pruning._methods import load_method

if TYPE_CHECKING:
    from simulator.models.config import ModelConfig
    from simulator.predict.settings import Setting
    from simulator.workload import Workload

SPARSITIES: tuple[float, ...] = (0.1, 0.25, 0.5)
"""Fractions removed where none is asked for."""


@dataclass(frozen=True)
class FamilyChoice:
    """A family and the options it is run with; of a published method, those that it stands for."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()  # sorted
    method: str = ""

    @classmethod
    def of_method(cls, name: str) -> FamilyChoice:
        """The choice that a published method is."""
        method = load_method(name)
        return cls(method.family, tuple(sorted(method.options.items())), name)

    @property
    def title(self) -> str:
        """What a person calls it."""
        return self.method or self.name

    @property
    def label(self) -> str:
        """The options as text: ``align=64``."""
        return ",".join(f"{name}={value}" for name, value in self.options)

    def pruned(self, dense: Workload, sparsity: Any, setting: Setting, ideal: bool = False) -> Workload:
        """A dense workload by this choice."""
        if self.method:
            return load_method(self.method).prune(dense, sparsity, ideal=ideal)
        return prune(dense, self.name, sparsity, ideal=ideal, **dict(self.options))


@dataclass(frozen=True)
class Existing:
    """A pruned model that exists, in place of a family; its sparsity is the share of parameters removed."""

    model: ModelConfig
    name: str  # the families that it shows
    method: str = ""
    label: str = ""

    @property
    def title(self) -> str:
        """What a person calls it."""
        return self.model.name

    def pruned(self, dense: Workload, sparsity: Any, setting: Setting, ideal: bool = False) -> Workload:
        """The model's own workload beside a dense one."""
        meta = dense.meta
        return as_pruned(dense, setting.lower(self.model, meta.phase, meta.batch, meta.seq))


Choice = tuple[FamilyChoice | Existing, Any]
"""A family and its sparsity, of any form that :func:`simulator.prune` takes; or a model that was pruned."""


def families(names: Sequence[str], models: Sequence[ModelConfig] = ()) -> tuple[str, ...]:
    """Names of families, ``all`` standing for every one that makes sense for some of the models, in the order asked for
    and once each.

    >>> families(["width", "depth", "width"])
    ('width', 'depth')
    """
    for name in names:
        if not isinstance(name, str) or name not in ("all", *FAMILIES):
            raise unknown("family", name, [*FAMILIES, "all"])
    every = [name for name, f in FAMILIES.items() if not f.needs or any(getattr(m, f.needs) for m in models)]
    return once(family for name in names for family in (every if name == "all" else [name]))


def choices_of(
    models: Sequence[ModelConfig],
    family: Sequence[str] | None = None,
    method: Sequence[str] = (),
    pruned: Sequence[str | ModelConfig] = (),
    sparsity: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Choice, ...]:
    """Families (None: all), or published methods in their place, each at every sparsity (None: :data:`SPARSITIES`, and
    for a method those of its paper); or pruned models that exist."""
    if pruned:
        if method or family is not None or options or sparsity is not None:
            raise InputError("pruned: say themselves what was pruned; expected no family, method, sparsity or option")
        if len(models) != 1:
            raise InputError(f"pruned: expected one dense model beside them, got {len(models)}")
        return tuple(_existing(models[0], load_model(source)) for source in pruned)
    if method and (family is not None or options):
        raise InputError("method: says its family and options itself; expected no family and no option beside it")
    fractions = None if sparsity is None else once(check_fraction(s) for s in sparsity)
    if method:
        found = [(FamilyChoice.of_method(m), load_method(m).sparsities) for m in once(method)]
    else:
        extra, names = tuple((options or {}).items()), families(("all",) if family is None else family, models)
        found = [(FamilyChoice(name, extra), SPARSITIES) for name in names]
    for name, values in (("family", found), ("sparsity", (0,) if fractions is None else fractions)):
        if not values:
            raise InputError(f"{name}: expected at least one")
    return tuple((choice, s) for choice, usual in found for s in (usual if fractions is None else fractions))


def _existing(dense: ModelConfig, pruned: ModelConfig) -> Choice:
    families, share = told_apart(dense, pruned)
    return Existing(pruned, "+".join(families) or "none"), share


def found_in(dense: ModelConfig, pruned: ModelConfig) -> tuple[str, ...]:
    """A line on a checkpoint whose tensors are not what its configuration says, and on a pruned model of its own what
    was pruned."""
    own = (dense.found,) if dense.found else ()
    if pruned == dense:
        return own
    lines, share = difference(dense, pruned) or ("has the shapes of the dense model",), told_apart(dense, pruned)[1]
    whole = (f"in all {100.0 * share:.1f} % of the parameters gone",) if len(lines) > 1 else ()
    return (*own, f"{pruned.name}: {'; '.join((*lines, *whole))}")
