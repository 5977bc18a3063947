"""Define how a dense model is pruned: by a family at a sparsity, by a published method, or as an existing pruned model.

Use :func:`prunings_of` for the prunings that a user requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError, unknown
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.predict.scenario import Scenario, check_fraction, once
from simulator.pruning import FAMILIES, prune
from simulator.workload import Applied, Workload

if TYPE_CHECKING:
    from simulator.models.config import ModelConfig

SPARSITIES: tuple[float, ...] = (0.1, 0.25, 0.5)
"""Default sparsities."""

ALIKE: tuple[str, ...] = ("engine", "phase", "batch", "seq", "new_tokens", "dtype", "devices", "parallel")
"""Fields of ``Meta`` that a pruned and a dense workload must share."""

Excluded = dict[str, list[float]]
"""Reason -> excluded sparsities."""


@dataclass(frozen=True)
class Pruning:
    """One way to prune a model. The families of a method or of an existing model are joined by "+"."""

    family: str
    sparsity: float | Mapping[str, float] = 0.0  # as in :func:`simulator.prune`
    options: tuple[tuple[str, Any], ...] = ()  # of the family or method, sorted
    method: str = ""  # name of a published method
    model: ModelConfig | None = None  # the existing pruned model; its sparsity is the share of parameters removed

    @classmethod
    def of_method(cls, name: str, sparsity: float = 0.0) -> Pruning:
        """Return the pruning of a published method."""
        from simulator.pruning._methods import load_method

        method = load_method(name)
        return cls(method.family, sparsity, tuple(sorted(method.options.items())), name)

    @classmethod
    def of_model(cls, dense: ModelConfig, pruned: ModelConfig) -> Pruning:
        """Return the pruning that leads to an existing pruned model."""
        families, share = difference_of(dense, pruned)
        return cls("+".join(families) or "none", share, model=pruned)

    def at(self, sparsity: float | Mapping[str, float]) -> Pruning:
        """Return the same pruning at another sparsity."""
        return replace(self, sparsity=sparsity)

    @property
    def title(self) -> str:
        """Name of the existing model, method or family."""
        return self.model.name if self.model is not None else self.method or self.family

    @property
    def label(self) -> str:
        """Options as text: ``align=64``."""
        return ",".join(f"{name}={value}" for name, value in self.options)

    @property
    def budgeted(self) -> bool:
        """Whether its sparsity follows from the length of a request: it keeps a number of tokens."""
        return dict(self.options).get("budget") is not None

    @property
    def needs(self) -> str:
        """Field of the configuration that a model must have, "" for none."""
        return next(filter(None, (FAMILIES[name].needs for name in self.family.split("+"))), "")

    @property
    def together(self) -> str:
        """Requests that one call may prune together: see :class:`simulator.pruning.Family`."""
        kinds = {"equal length"} if self.budgeted else {FAMILIES[name].together for name in self.family.split("+")}
        return "equal length" if "equal length" in kinds else "any"

    def apply(self, dense: Workload, scenario: Scenario) -> Workload:
        """Return the pruned workload of a dense workload of a scenario."""
        if self.model is not None:
            meta = dense.meta
            alone = replace(scenario, model=self.model, phase=meta.phase, shapes=((meta.batch, meta.seq),))
            return as_pruned(dense, alone.workloads[0])
        sparsity = None if self.budgeted else self.sparsity
        if self.method:
            from simulator.pruning._methods import load_method

            assert sparsity is None or isinstance(sparsity, float | int)
            return load_method(self.method).prune(dense, sparsity, ideal=scenario.ideal)
        return prune(dense, self.family, sparsity, ideal=scenario.ideal, **dict(self.options))


def families(names: Sequence[str], models: Sequence[ModelConfig] = ()) -> tuple[str, ...]:
    """Return names of families, each once; ``all`` selects every family that applies to at least one of the models.

    >>> families(["width", "depth", "width"])
    ('width', 'depth')
    """
    for name in names:
        if not isinstance(name, str) or (name != "all" and name not in FAMILIES):
            raise unknown("family", name, [*FAMILIES, "all"])
    if "all" not in names:
        return once(names)
    every = [name for name, f in FAMILIES.items() if not f.needs or any(getattr(m, f.needs) for m in models)]
    return once(family for name in names for family in (every if name == "all" else [name]))


def prunings_of(
    models: Sequence[ModelConfig],
    family: Sequence[str] | None = None,
    method: Sequence[str] = (),
    pruned: Sequence[str | ModelConfig] = (),
    sparsity: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Pruning, ...]:
    """Return the prunings of families (None: all) or published methods, each at every sparsity (None:
    :data:`SPARSITIES`, or those of a method's paper); or of existing pruned models."""
    if pruned:
        if method or family is not None or options or sparsity is not None:
            raise InputError("pruned: a model sets its own pruning; give no family, method, sparsity or option with it")
        if len(models) != 1:
            raise InputError(f"pruned: expected one dense model, got {len(models)}")
        return tuple(Pruning.of_model(models[0], load_model(source)) for source in pruned)
    if method and (family is not None or options):
        raise InputError("method: sets its own family and options; give no family or option with it")
    fractions = None if sparsity is None else once(check_fraction(s) for s in sparsity)
    defaults: list[tuple[float, ...]]
    if method:
        from simulator.pruning._methods import load_method

        found = [Pruning.of_method(name) for name in once(method)]
        defaults = [load_method(p.method).sparsities for p in found]
    else:
        extra, names = tuple((options or {}).items()), families(("all",) if family is None else family, models)
        found = [Pruning(name, options=extra) for name in names]
        defaults = [SPARSITIES] * len(found)
    if fractions is not None and (budgeted := next((p for p in found if p.budgeted), None)):
        raise InputError(f"sparsity: expected none for {budgeted.title}: it follows from the length and the budget")
    defaults = [(0.0,) if p.budgeted else default for p, default in zip(found, defaults)]
    for name, values in (("family", found), ("sparsity", (0,) if fractions is None else fractions)):
        if not values:
            raise InputError(f"{name}: expected at least one")
    return tuple(p.at(s) for p, default in zip(found, defaults) for s in (default if fractions is None else fractions))


def exclude(excluded: Excluded, pruning: Pruning, reason: str, device: str = "") -> None:
    """Record why a pruning is excluded."""
    title, sparsity = pruning.title, pruning.sparsity
    if device:
        reason = f"{title} on {device}: {reason}"
    else:
        reason = reason.replace(f" at sparsity {sparsity:g}", "")
        reason = reason if title in reason else f"{title}: {reason}"
    at = excluded.setdefault(reason, [])
    if not pruning.budgeted:
        at.append(float(sparsity) if isinstance(sparsity, float | int) else 0.0)


def excluded_lines(excluded: Excluded, most: int | None = None) -> tuple[str, ...]:
    """Return one line per reason, with its sparsities; of more than ``most`` only the ends."""
    out = []
    for reason, at in excluded.items():
        values = [f"{s:g}" for s in sorted(set(at))]
        if most is not None and len(values) > most:
            values = [*values[: most // 2], "...", values[-1]]
        out.append(f"{reason}: excluded" + (f" at sparsity {', '.join(values)}" if values else ""))
    return tuple(out)


# -- existing pruned models --------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def difference_of(dense: ModelConfig, pruned: ModelConfig) -> tuple[tuple[str, ...], float]:
    """Return the families in which a pruned model differs from its dense model, and the removed share of parameters."""
    from simulator.models.difference import difference

    words = (re.match("[a-z_]+", line) for line in difference(dense, pruned))
    names = dict.fromkeys(word[0] for word in words if word and word[0] in FAMILIES)
    left = (lower(model, phase="decode", seq=1, engine="").parameters for model in (pruned, dense))
    return tuple(names), 1.0 - next(left) / next(left)


def difference_lines(dense: ModelConfig, pruned: ModelConfig) -> tuple[str, ...]:
    """Return a line on a checkpoint whose tensors differ from its configuration, and one on how an existing model
    differs from the dense model."""
    own = (dense.found,) if dense.found else ()
    if pruned == dense:
        return own
    from simulator.models.difference import difference

    lines, share = difference(dense, pruned) or ("has the shapes of the dense model",), difference_of(dense, pruned)[1]
    whole = (f"{100.0 * share:.1f} % of all parameters removed",) if len(lines) > 1 else ()
    return (*own, f"{pruned.name}: {'; '.join((*lines, *whole))}")


def check_alike(dense: Workload, pruned: Workload) -> None:
    """Raise InputError if two workloads have different requests.

    >>> import simulator
    >>> model = simulator.load_model("llama-3.2-1b")
    >>> check_alike(*(simulator.lower(model, phase=phase) for phase in ("prefill", "decode")))
    Traceback (most recent call last):
    simulator.errors.InputError: phase: the pruned model has 'decode', the dense 'prefill'; expected the same
    """
    for name in ALIKE:
        theirs, ours = getattr(pruned.meta, name), getattr(dense.meta, name)
        if theirs != ours:
            raise InputError(f"{name}: the pruned model has {theirs!r}, the dense {ours!r}; expected the same")


def as_pruned(dense: Workload, pruned: Workload) -> Workload:
    """Return the workload of a pruned model with its difference from the dense model as a pruning step."""
    check_alike(dense, pruned)
    own, ours, theirs = pruned.meta.applied[len(dense.meta.applied) :], dense.meta.config, pruned.meta.config
    other = ours is not None and theirs is not None and ours is not theirs and ours != theirs
    if own and not other:
        return pruned
    names, share = difference_of(ours, theirs) if other else ((), 0.0)
    step = Applied("+".join(names) or "none", share, share)
    if own[:1] == (step,):  # already recorded
        return pruned
    return pruned.replace(meta=replace(pruned.meta, applied=(*dense.meta.applied, step, *own)))


def applied(dense: Workload, pruned: Workload) -> tuple[str, float, float]:
    """Return the families that pruned a workload, joined by "+", and their total sparsity, requested and realised."""
    steps = as_pruned(dense, pruned).meta.applied[len(dense.meta.applied) :]
    requested = float(1.0 - math.prod(1.0 - step.sparsity for step in steps))
    realised = float(1.0 - math.prod(1.0 - step.realised for step in steps))
    return "+".join(step.family for step in steps) or "none", requested, realised
