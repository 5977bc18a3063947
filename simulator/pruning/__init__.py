"""Prune: pure functions from a model to the pruned model, or from a workload to the workload with
fewer tokens.

A family is one module of the packages ``static`` and ``dynamic`` with a constant ``FAMILY``; no
list names it. Static families change the model, which is then lowered again; dynamic families
change the rows of a workload, because they depend on the tokens of a request. Numbers are rounded
to the nearest whole number, halves up, unless a family documents another rule.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.arguments import flag, instance, is_size, shown
from simulator.arrays import Array, FloatArray, plain
from simulator.display import few
from simulator.errors import InputError, one_line, unknown
from simulator.models.lower import lower_again
from simulator.models.model import Model, undivided
from simulator.pruning._family import (
    GROUPS,
    KINDS,
    MAMBA,
    NESTED,
    ONE_SIZE,
    SUBLAYERS,
    WHOLE,
    Choice,
    Family,
    check_fraction,
)
from simulator.pruning.dynamic.rows import layer_count, merge_runs
from simulator.request import Applied
from simulator.workload import Workload

if TYPE_CHECKING:
    from simulator.pruning._methods import Method

__all__ = [
    "FAMILIES",
    "Family",
    "check_fraction",
    "general_families",
    "prune",
    "prune_model",
    "with_model",
]

_HERE = Path(__file__).parent


class _Families(Mapping[str, Family]):
    """The modules of the packages ``static`` and ``dynamic``.

    Each is imported when its family is used: most commands use one."""

    _modules = MappingProxyType(
        {
            module.name: f"{kind}.{module.name}"
            for kind in ("static", "dynamic")
            for module in pkgutil.iter_modules([str(_HERE / kind)])
            if module.name != "rows"
        }
    )
    _others = MappingProxyType({"2:4": "semi_structured"})  # other names of families

    def __getitem__(self, name: str) -> Family:
        name = self._others.get(name, name)
        if name in self._modules:
            family: Family = import_module(f"{__name__}.{self._modules[name]}").FAMILY
            return family
        return _loaded(self._installed[name])

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._others or name in self._installed

    def __iter__(self) -> Iterator[str]:
        names = (*self._modules, *self._installed)
        return iter(sorted(names, key=lambda name: (self[name].order, name)))

    def __len__(self) -> int:
        return len(self._modules) + len(self._installed)

    @cached_property
    def _installed(self) -> Mapping[str, EntryPoint]:
        """Families of other packages, by the names of their entry points. A package that cannot be
        loaded stops only who asks for its family."""
        return {point.name: point for point in entry_points(group="prunesim.families")}


@cache
def _loaded(point: EntryPoint) -> Family:
    try:
        family = point.load()
    except Exception as error:  # the code of another package may raise anything
        raise InputError(f"entry point {point.value}: {one_line(repr(error))}") from None
    if not isinstance(family, Family) or family.name != point.name:
        raise InputError(
            f"entry point {point.value}: expected a simulator.Family named {point.name}, got"
            f" {shown(family)}"
        )
    return family


FAMILIES: Mapping[str, Family] = _Families()  # pruning families by name, in the order of tables


def general_families() -> tuple[str, ...]:
    """Return the names of the families that apply to every model."""
    return tuple(name for name, family in FAMILIES.items() if not family.needs)


def prune(
    workload: Workload,
    pruning: str | Method,
    sparsity: float | Mapping[str, float | Sequence[float]] | Sequence[float] | None = None,
    *,
    layers: Sequence[int] | None = None,
    ideal: bool = False,
    **options: Any,
) -> Workload:
    """Return the workload of the pruned model; calls compose.

    Parameters
    ----------
    workload : Workload
        Dense or pruned workload, from :func:`simulator.lower` or :func:`simulator.prune`.
    pruning : str or Method
        Pruning family, a key of :data:`simulator.FAMILIES`; or, without ``sparsity``, a text of
        ``--prune`` (:mod:`simulator.pruning._steps`), the path of a plan, or a method.
    sparsity : float, mapping of str to float, or sequence of float
        Fraction removed, in [0, 1); 0 changes no row. A whole number above 1 is the size that
        remains, such as layers of ``depth`` or ``{"mlp": 9216}``, if all layers have one size. A
        number applies everywhere. A sequence has one fraction per layer, first to last. A mapping
        applies to parts, with a number or a sequence for each: the parts of the family ``width``,
        or projections ("q", "down", ...) and groups of them ("attention", "mlp", "qkv"). Parts that
        are not named stay dense; the entry of a projection overrides that of its group. None with
        the option ``budget`` (tokens kept): the sparsity follows from the length of each request,
        and the requested sparsity is the realised one.
    layers : sequence of int, optional
        Layers that are pruned, by their numbers from 0. The family ``depth`` removes the fraction
        of these layers, all of them without a ``sparsity``.
    ideal : bool
        Exclude the work that the method adds (routers, gathers, selections), and use the efficiency
        of dense kernels: the bound of the family. The option ``kernel="ideal"`` of dynamic families
        has the same effect.
    **options : object
        Options of the family, see ``FAMILIES[family].options``.

    Returns
    -------
    Workload
        Pruned workload; ``meta.applied`` has the requested and the realised sparsity.

    Raises
    ------
    InputError
        If an argument is unknown, out of range, or does not apply to this workload.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower("llama-3.1-8b", phase="prefill", batch=1, seq=2048)
    >>> pruned = simulator.prune(dense, "depth", 0.26)
    >>> pruned.meta.applied[0].realised, round(float(dense.flops.sum() / pruned.flops.sum()), 3)
    (0.25, 1.333)
    >>> pruned = simulator.prune(dense, "width mlp=0.3 attention=0.25 + depth 0.25")
    >>> [(step.family, round(step.realised, 3)) for step in pruned.meta.applied]
    [('width', 0.29), ('depth', 0.25)]
    """
    instance("workload", workload, Workload, "simulator.lower")
    flag("ideal", ideal)
    if sparsity is None and layers is None and options.get("budget") is None:
        if options:
            raise InputError(
                f"option {next(iter(options))}: expected a sparsity too, or the option in the text"
            )
        from simulator.pruning._steps import is_plan, prune_steps, read_steps

        steps = read_steps(pruning)
        return prune_steps(
            workload, steps, ideal=ideal, plan=str(pruning) if is_plan(pruning) else ""
        )
    pruner = Pruner(workload, ideal)
    pruner.add(FamilyStep.of(pruning, sparsity, layers, options))
    return pruner.workload()


def prune_model(model: Model, pruning: str) -> Model:
    """Return the pruned model, given a text of ``--prune`` or the path of a plan with static
    families only."""
    from simulator.pruning._steps import in_order, read_steps

    for step in in_order(read_steps(pruning), len(model.layers)):
        for one in step.by_family(Target.of_model(model)):
            if one.family.dynamic:
                reason = "changes no model, as it depends on the tokens"
                raise InputError(f"{one.family.name}: {reason}")
            model, _ = _pruned_model(model, one)
    return model


@dataclass(frozen=True)
class FamilyStep:
    """One family with its arguments."""

    family: Family
    sparsity: Any
    layers: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    # numbers in the dense model of the layers that the step sees; layers that static pruning
    # removes later keep the numbers of the others
    numbers: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: Any, sparsity: Any, layers: Any, options: Mapping[str, Any]) -> FamilyStep:
        """Return a step after a check of names and options; InputError otherwise."""
        if is_size(sparsity) and options.get("fewer", "experts") != "experts":
            raise InputError(f"option fewer: expected a fraction with it, got {sparsity:g}")
        if not isinstance(name, str) or name not in FAMILIES:
            raise unknown("pruning family", name, FAMILIES)
        family, options = FAMILIES[name], dict(options)
        for option in options:
            if option not in family.options:
                raise unknown(
                    f"option of family {family.name}",
                    option,
                    family.options,
                    family.options or ["none"],
                )
        by_part = sparsity if isinstance(sparsity, Mapping) else {"": sparsity}
        aligned = [
            s for part in ("", "mlp", "hidden") for s in plain(by_part.get(part)).ravel() if s
        ]
        if aligned and all(map(is_size, aligned)) and "align" in family.options:
            options.setdefault("align", 1)  # sizes are not rounded
        return cls(family, sparsity, layers, options)

    @property
    def budget(self) -> Any:
        return self.options.get("budget")

    def renumbered(self, numbers: Sequence[int]) -> FamilyStep | None:
        """Return the step for the layers that remain, by their numbers in the dense model; None if
        no listed layer remains."""
        if tuple(numbers) == self.numbers:
            return self
        places = [self.numbers.index(number) for number in numbers]
        sparsity = self.sparsity
        if isinstance(sparsity, Mapping):
            sparsity = {part: _taken(value, places) for part, value in sparsity.items()}
        layers = self.layers
        if layers is not None:
            layers = [i for i, place in enumerate(places) if place in set(layers)]
            if not layers:
                return None
        return replace(
            self, sparsity=_taken(sparsity, places), layers=layers, numbers=tuple(numbers)
        )


def _taken(value: Any, places: Sequence[int]) -> Any:
    """Return the entries of a sparsity per layer; another sparsity is returned unchanged."""
    return [value[i] for i in places] if np.ndim(plain(value)) else value


class Pruner:
    """A workload that is being pruned. Static steps change its model at once; dynamic steps wait
    until the model is lowered."""

    def __init__(
        self, workload: Workload, ideal: bool, lowered: Callable[[Model], Workload] | None = None
    ) -> None:
        """Start from a workload; ``lowered`` makes the workload of another model (default: that of
        the request of the workload)."""
        self.start, self.ideal = workload, ideal
        self.lower_model = lowered or self._lower_request
        self.model: Model | None = workload.meta.config
        self.applied = list(workload.meta.applied)
        self.waiting: list[tuple[int, str]] = []  # place in applied, and name in errors

    @property
    def target(self) -> Target:
        """What a sparsity of the next step refers to."""
        if self.model is None:
            return Target.of_rows(self.start)
        return Target.of_model(self.model)

    @property
    def numbers(self) -> tuple[int, ...]:
        if self.model is None:
            return tuple(range(layer_count(self.start)))
        return self.model.layer_numbers

    def add(self, step: FamilyStep, label: str = "") -> None:
        name = step.family.name
        if step.family.dynamic:
            self.waiting.append((len(self.applied), label))
            step = replace(step, numbers=self.numbers)
            self.applied.append(Applied(name, 0.0, 0.0, (step, self.ideal)))
            return
        if self.model is None:
            raise InputError(
                f"family {name}: expected a workload of simulator.lower, as it changes the model;"
                " got rows"
            )
        self.model, step_applied = _pruned_model(self.model, step)
        self.applied.append(step_applied)

    def workload(self) -> Workload:
        """Return the pruned workload."""
        if self.model == self.start.meta.config:
            w, first = self.start, len(self.start.meta.applied)
        else:
            self._check_rows()
            w, first = self._lowered(), 0
        labels = dict(self.waiting)
        for i, entry in enumerate(self.applied):
            if entry.step is None or i < first:
                continue
            step, ideal = entry.step
            step = step.renumbered(self.numbers)
            if step is None:
                continue
            w = w.replace(meta=replace(w.meta, applied=tuple(self.applied[:i])))
            try:
                w, asked, realised = _pruned_rows(w, step, ideal)
            except InputError as error:
                raise InputError(": ".join(filter(None, (labels.get(i), str(error))))) from None
            if i in labels:
                self.applied[i] = replace(entry, sparsity=asked, realised=realised)
        return w.replace(meta=replace(w.meta, applied=tuple(self.applied)))

    def _check_rows(self) -> None:
        """Raise InputError if the rows of the start were changed: lowering again would lose the
        changes."""
        start, request = self.start, self.start.meta.request
        if self.lower_model != self._lower_request or any(one.step for one in start.meta.applied):
            return
        again = lower_again(request, start.meta.config, request.ideal)
        columns = ((getattr(start, name), getattr(again, name)) for name in start.SCHEMA)
        if len(start) != len(again) or any(
            one is not other and (one != other).any() for one, other in columns
        ):
            raise InputError(
                "workload: its rows were changed, and static pruning makes the rows of the pruned"
                " model anew; prune before you change rows"
            )

    def _lower_request(self, model: Model) -> Workload:
        request = self.start.meta.request
        return lower_again(request, model, self.ideal or request.ideal)

    def _lowered(self) -> Workload:
        request, model = self.start.meta.request, self.model
        assert model is not None
        try:
            w = self.lower_model(model)
            # the request keeps the dense model
            return w.replace(meta=replace(w.meta, request=request))
        except InputError as error:
            size = undivided(model.layers, request.devices, request.parallel)
            if size is None or request.parallel == "pipeline":
                raise
            raise InputError(f"{error}; {size.nearest(request.devices)}") from None


def with_model(workload: Workload, model: Model) -> Workload:
    """Return the workload of another model, pruned by the same dynamic steps."""
    pruner = Pruner(workload, False)
    pruner.model = model
    return pruner.workload()


def _pruned_model(model: Model, step: FamilyStep) -> tuple[Model, Applied]:
    family = step.family
    choice = _resolve(Target.of_model(model), step)
    pruned, realised = model, 0.0
    if choice.prunes:
        _check_whole(family, choice)
        pruned, realised = family.function(model, choice, **step.options)
    # listed layers are removed exactly
    asked = realised if step.sparsity is None else choice.asked
    return pruned, Applied(family.name, asked, realised)


def _pruned_rows(w: Workload, step: FamilyStep, ideal: bool) -> tuple[Workload, float, float]:
    """Return a workload pruned by a dynamic family, and the requested and realised sparsity."""
    model = w.meta.config
    target = Target.of_rows(w) if model is None else Target.of_model(model)
    choice = _resolve(target, step)
    pruned, realised = w, 0.0
    if choice.prunes:
        _check_whole(step.family, choice)
        work = w.expand() if choice.by_layer else w
        pruned, realised = step.family.function(work, choice, ideal=ideal, **step.options)
        if choice.by_layer:
            pruned = merge_runs(pruned)
    # a budget removes what follows from it
    return pruned, realised if step.sparsity is None else choice.asked, realised


def _check_whole(family: Family, choice: Choice) -> None:
    if family.whole:
        return
    if any(table.any() for (_, role), table in choice.weights.items() if role in WHOLE):
        reason = "routed experts, latent attention and recurrent layers have no such kernels"
        raise InputError(
            f"family {family.name}: {reason}; name the projections to prune, such as {{'o': 0.5}}"
        )


@dataclass(frozen=True)
class Target:
    """What a sparsity refers to: layers, and weights by kind of sublayer and role, (L,) each."""

    name: str
    layers: int
    weights: Mapping[tuple[str, str], FloatArray]
    model: Model | None = None

    @classmethod
    def of_model(cls, model: Model) -> Target:
        return cls(model.name, len(model.layers), model.weight_counts, model)

    @classmethod
    def of_rows(cls, w: Workload) -> Target:
        return cls(w.meta.model, layer_count(w), {})

    def sizes(self, name: str) -> list[float]:
        return self.model.sizes(name) if self.model is not None else []

    def share(self, part: str, key: tuple[str, str]) -> bool:
        """Return whether a part of a request includes a weight."""
        inside, role = key
        if part in ONE_SIZE:
            return True
        if part in KINDS:
            return inside == part
        if part in NESTED:
            return role in NESTED[part] and inside == ("mamba" if part in MAMBA else "attention")
        return role in GROUPS.get(part, (part,))

    def has(self, part: str) -> bool:
        if part in NESTED and part not in MAMBA:
            return any(inside == "attention" for inside, _ in self.weights) or part in ONE_SIZE
        return any(self.share(part, key) for key in self.weights)


def _resolve(target: Target, step: FamilyStep) -> Choice:
    """Return the sparsity of every layer."""
    family, sparsity, count = step.family, step.sparsity, target.layers
    if step.budget is not None or family.sets_sparsity:
        what = f"family {family.name}" if step.budget is None else "option budget"
        for name, given in (("sparsity", sparsity), ("layers", step.layers)):
            if given is not None:
                raise InputError(
                    f"{what}: the sparsity follows from it; expected no {name}, got {given!r}"
                )
        return Choice(np.zeros(count), 0.0, "budget")
    some = None if step.layers is None else listed_layers(step.layers, count)
    if family.layers == "all" and some is not None:
        raise InputError(
            f"family {family.name}: expected no layers, as it prunes all layers equally"
        )
    if some is not None and family.layers == "some":
        for value in filter(
            is_size, sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
        ):
            raise InputError(f"layers: expected a fraction of them, got {value:g}")
    if isinstance(sparsity, Mapping):
        return _by_part(target, family, sparsity, some)
    table = np.ones(count)  # listed layers are removed whole
    if sparsity is not None or family.layers != "some":
        table = _table(target, family, "", family.default if sparsity is None else sparsity, some)
    weights = dict.fromkeys(target.weights, table)
    if family.layers == "each" and (some is not None or np.ndim(plain(sparsity))):
        return Choice(table, float(table.mean()), "layer", weights=weights, by_layer=True)
    asked = float(table.max(initial=0.0)) * _share_of_layers(target, family, some)
    if asked >= 1.0:
        raise InputError(f"layers: expected fewer than all {count} layers")
    return Choice(table, asked, weights=weights, layers=some)


def _share_of_layers(target: Target, family: Family, some: Array | None) -> float:
    """Return the share of the layers from which a family removes whole layers."""
    return 1.0 if some is None or family.layers != "some" else len(some) / target.layers


def listed_layers(layers: Any, many: int) -> Array:
    """Return layer numbers without repeats, which must be from 0 to ``many`` - 1."""
    numbers = plain(list(layers) if isinstance(layers, Iterable) else layers)
    if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu":
        raise InputError(f"layers: expected layer numbers, got {shown(layers)}")
    if wrong := [int(i) for i in numbers if not 0 <= i < many]:
        raise InputError(f"layers: expected numbers from 0 to {many - 1}, got {wrong[0]}")
    return np.unique(numbers)


def _removed(target: Target, family: Family, part: str, value: Any, where: str) -> float:
    """Return a removed fraction; a whole number above 1 is the size of the part that remains."""
    if not is_size(value) or not family.sizes(part):
        return check_fraction(value, where)
    known = [(name, size) for name in family.sizes(part) for size in target.sizes(name)]
    name, size = known[0] if known else ("", 0)
    if len(known) != 1:
        several = (
            few(f"{name} {size:,}" for name, size in known)
            or f"no {' or '.join(family.sizes(part))}"
        )
        return check_fraction(value, where, f", as {target.name} has {several}")
    if value > size:
        return check_fraction(value, where, f", or the remaining {name}, at most {size:,}")
    return 1.0 - float(value) / size


def _by_part(
    target: Target, family: Family, sparsity: Mapping[str, Any], some: Array | None
) -> Choice:
    if not family.targets:
        raise InputError(f"family {family.name}: expected one fraction, got a sparsity by part")
    if target.model is None:
        raise InputError("sparsity by part: expected a workload of simulator.lower; got rows")
    if not sparsity:
        raise InputError(
            f"sparsity by part: expected some of {', '.join(family.targets)}, got none"
        )
    # the widest first, as the entry of a projection overrides that of its group
    names = sorted(sparsity, key=lambda name: (name not in SUBLAYERS, name not in GROUPS))
    parts = {name: _part_table(target, family, name, sparsity[name], some) for name in names}
    weights: dict[tuple[str, str], FloatArray] = {}
    for key in target.weights:
        table, keep = np.zeros(target.layers), np.ones(target.layers)
        for name, fractions in parts.items():
            if not target.share(name, key):
                continue
            if name in NESTED:  # removes a share of the rest
                keep = keep * (1.0 - fractions)
            else:
                table = fractions
        weights[key] = 1.0 - (1.0 - table) * keep
    total = sum(float(counts.sum()) for counts in target.weights.values())
    asked = sum(float(target.weights[key] @ table) for key, table in weights.items())
    asked = asked / total if total > 0 else float(np.mean(list(parts.values())))
    asked *= _share_of_layers(target, family, some)
    each = family.layers == "each"
    by_layer = each and some is not None
    by_layer |= any(np.ndim(plain(fraction)) for fraction in sparsity.values())
    listed = None if each else some
    return Choice(np.zeros(target.layers), asked, "part", parts, weights, listed, by_layer)


def _part_table(
    target: Target, family: Family, name: str, sparsity: Any, some: Array | None
) -> FloatArray:
    if name not in family.targets:
        raise unknown(f"part (for family {family.name})", name, family.targets)
    if not target.has(name):
        roles = dict.fromkeys(role for _, role in target.weights)
        raise InputError(
            f"sparsity of {name}: this model has no such projection; it has {', '.join(roles)}"
        )
    if some is not None and name in ONE_SIZE:
        raise InputError(f"sparsity of {name}: expected no layers, as all layers have one size")
    return _table(target, family, name, sparsity, some)


def _table(
    target: Target, family: Family, part: str, sparsity: Any, some: Array | None
) -> FloatArray:
    """Return the sparsity of a part ("": all parts) in every layer."""
    of = part and f" of {part}"
    if not np.ndim(plain(sparsity)):
        where = f"sparsity{of}:" if part else "sparsity"
        table = np.full(target.layers, _removed(target, family, part, sparsity, where))
        if some is not None and family.layers == "each":
            table[~np.isin(np.arange(target.layers), some)] = 0.0
        return table
    if some is not None:
        raise InputError("layers: expected no layers with a sparsity by layer")
    if family.layers != "each" or part in ONE_SIZE:
        where = f"sparsity{of}" if part in ONE_SIZE else f"family {family.name}"
        raise InputError(f"{where}: expected one fraction, got a sparsity by layer")
    if np.shape(plain(sparsity)) != (target.layers,):
        expected = f"expected {target.layers} fractions, one per layer of this model"
        raise InputError(f"sparsity{of} by layer: {expected}, got {len(sparsity)}")
    return np.array(
        [
            _removed(target, family, part, s, f"sparsity{of} of layer {i}:")
            for i, s in enumerate(sparsity)
        ]
    )
