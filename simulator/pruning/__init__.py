"""Prune: pure functions from a workload to the workload of the pruned model.

A family is one module of this package with a constant ``FAMILY``; no list names it. Numbers are
rounded to the nearest whole number, halves up, unless a family documents another rule.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

import numpy as np

from simulator.arguments import flag, instance, is_size, shown
from simulator.arrays import Array, FloatArray, plain
from simulator.codes import ROLES, Part
from simulator.display import few
from simulator.errors import InputError, unknown
from simulator.pruning._family import (
    GROUPS,
    NESTED,
    ONE_SIZE,
    SUBLAYERS,
    WHOLE,
    Choice,
    Family,
    check_fraction,
)
from simulator.pruning._rows import (
    covering,
    layer_count,
    merge_runs,
    projections,
    sizes_of,
    weighted,
    weights,
)
from simulator.request import Applied
from simulator.workload import Workload

__all__ = ["FAMILIES", "Family", "check_fraction", "general_families", "prune"]


class _Families(Mapping[str, Family]):
    """The modules of this package, each imported when its family is used: most commands use one."""

    _modules = frozenset(
        module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")
    )
    _others = MappingProxyType({"2:4": "semi_structured"})  # other names of families

    def __getitem__(self, name: str) -> Family:
        if name not in self:
            raise KeyError(name)
        family: Family = import_module(f"{__name__}.{self._others.get(name, name)}").FAMILY
        return family

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._modules, key=lambda name: (self[name].order, name)))

    def __len__(self) -> int:
        return len(self._modules)


FAMILIES: Mapping[str, Family] = _Families()  # pruning families by name, in the order of tables


def general_families() -> tuple[str, ...]:
    """Return the names of the families that apply to every model."""
    return tuple(name for name, family in FAMILIES.items() if not family.needs)


def prune(
    workload: Workload,
    pruning: str,
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
    pruning : str
        Pruning family, a key of :data:`simulator.FAMILIES`; or, without ``sparsity``, a text of
        ``--prune`` (:mod:`simulator.pruning._steps`), or the path of a plan.
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
        return prune_steps(workload, steps, ideal=ideal, plan=pruning if is_plan(pruning) else "")
    if is_size(sparsity) and options.get("fewer", "experts") != "experts":
        raise InputError(f"option fewer: expected a fraction with it, got {sparsity:g}")
    if not isinstance(pruning, str) or pruning not in FAMILIES:
        raise unknown("pruning family", pruning, FAMILIES)
    chosen = FAMILIES[pruning]
    pruning = chosen.name
    for name in options:
        if name not in chosen.options:
            raise unknown(
                f"option of family {pruning}", name, chosen.options, chosen.options or ["none"]
            )
    given = sparsity if isinstance(sparsity, Mapping) else {"": sparsity}
    aligned = [s for part in ("", "mlp", "hidden") for s in plain(given.get(part)).ravel() if s]
    if aligned and all(map(is_size, aligned)) and "align" in chosen.options:
        options.setdefault("align", 1)  # sizes are not rounded
    work, choice = _resolve(workload, chosen, sparsity, layers, options.get("budget"))
    pruned, realised = workload, 0.0
    if choice.form == "budget" or choice.rows.any():
        if not chosen.whole and (choice.rows > 0)[work.is_role(*WHOLE)].any():
            reason = "routed experts, latent attention and delta nets have no such kernels"
            raise InputError(
                f"family {pruning}: {reason}; name the projections to prune, such as {{'o': 0.5}}"
            )
        pruned, realised = chosen.function(work, choice, ideal=ideal, **options)
        if work is not workload:
            pruned = merge_runs(pruned)
    # a budget and listed layers are removed exactly
    asked = realised if sparsity is None else choice.asked
    applied = (*workload.meta.applied, Applied(pruning, asked, realised))
    return pruned.replace(meta=replace(workload.meta, applied=applied))


def _resolve(
    w: Workload, family: Family, sparsity: Any, layers: Any, budget: Any
) -> tuple[Workload, Choice]:
    """Return the workload, expanded to one row per layer if layers differ, and the sparsity of its
    rows."""
    if budget is not None:
        for name, given in (("sparsity", sparsity), ("layers", layers)):
            if given is not None:
                raise InputError(
                    f"option budget: the sparsity follows from it; expected no {name}, got"
                    f" {given!r}"
                )
        return w, Choice(np.zeros(len(w)), 0.0, "budget")
    some = None if layers is None else listed_layers(layers, layer_count(w))
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
        return _by_part(w, family, sparsity, some)
    if np.ndim(plain(sparsity)):
        if some is not None:
            raise InputError("layers: expected no layers with a sparsity by layer")
        return _by_layer(w, family, sparsity)
    whole = sparsity is None and family.layers == "some"
    fraction = (
        1.0
        if whole
        else _removed(w, family, "", family.default if sparsity is None else sparsity, "sparsity")
    )
    rows = np.where(w.layer >= 0, fraction, 0.0)
    if some is None:
        return w, Choice(rows, fraction)
    if family.layers == "some":
        asked = fraction * len(some) / layer_count(w)
        if asked >= 1.0:
            raise InputError(f"layers: expected fewer than all {layer_count(w)} layers")
        return w, Choice(rows, asked, layers=some)
    return _by_layer(w, family, np.where(np.isin(np.arange(layer_count(w)), some), fraction, 0.0))


def listed_layers(layers: Any, many: int) -> Array:
    """Return layer numbers without repeats, which must be from 0 to ``many`` - 1."""
    found = plain(list(layers) if isinstance(layers, Iterable) else layers)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise InputError(f"layers: expected layer numbers, got {shown(layers)}")
    if wrong := [int(i) for i in found if not 0 <= i < many]:
        raise InputError(f"layers: expected numbers from 0 to {many - 1}, got {wrong[0]}")
    return np.unique(found)


def _by_layer(w: Workload, family: Family, sparsity: Any) -> tuple[Workload, Choice]:
    if family.layers != "each":
        raise InputError(f"family {family.name}: expected one fraction, got a sparsity by layer")
    table = _fractions(w, family, "", sparsity)
    wide = w.expand()
    rows = np.where(wide.layer >= 0, table[np.maximum(wide.layer, 0)], 0.0)
    return wide, Choice(rows, float(table.mean()), "layer")


def _removed(w: Workload, family: Family, part: str, value: Any, where: str) -> float:
    """Return a removed fraction; a whole number above 1 is the size of the part that remains."""
    if not is_size(value) or not family.sizes(part):
        return check_fraction(value, where)
    found = [(name, size) for name in family.sizes(part) for size in sizes_of(w, name)]
    name, size = found[0] if found else ("", 0)
    if len(found) != 1:
        several = (
            few(f"{name} {size:,}" for name, size in found)
            or f"no {' or '.join(family.sizes(part))}"
        )
        return check_fraction(value, where, f", as {w.meta.model} has {several}")
    if value > size:
        return check_fraction(value, where, f", or the remaining {name}, at most {size:,}")
    return 1.0 - float(value) / size


def _fractions(w: Workload, family: Family, part: str, sparsity: Any) -> FloatArray:
    layers, of = layer_count(w), part and f" of {part}"
    if np.shape(plain(sparsity)) != (layers,):
        expected = f"expected {layers} fractions, one per layer of this model"
        raise InputError(f"sparsity{of} by layer: {expected}, got {len(sparsity)}")
    return np.array(
        [
            _removed(w, family, part, s, f"sparsity{of} of layer {i}:")
            for i, s in enumerate(sparsity)
        ]
    )


def _by_part(
    w: Workload, family: Family, sparsity: Mapping[str, Any], some: Array | None
) -> tuple[Workload, Choice]:
    if not family.targets:
        raise InputError(f"family {family.name}: expected one fraction, got a sparsity by part")
    if not sparsity:
        raise InputError(
            f"sparsity by part: expected some of {', '.join(family.targets)}, got none"
        )
    if any(np.ndim(plain(s)) for s in sparsity.values()) or (
        some is not None and family.layers == "each"
    ):
        w = w.expand()
    parts, count = {}, layer_count(w)
    keep, removed = np.ones(len(w)), np.zeros(len(w))
    # the widest first
    for name in sorted(sparsity, key=lambda name: (name not in SUBLAYERS, name not in GROUPS)):
        if name not in family.targets:
            raise unknown(f"part (for family {family.name})", name, family.targets)
        if np.ndim(plain(sparsity[name])):
            if family.layers != "each" or name in ONE_SIZE:
                raise InputError(
                    f"sparsity of {name}: expected one fraction, got a sparsity by layer"
                )
            table = _fractions(w, family, name, sparsity[name])
        else:
            table = np.full(
                count, _removed(w, family, name, sparsity[name], f"sparsity of {name}:")
            )
        if some is not None and family.layers == "each":
            if name in ONE_SIZE:
                raise InputError(
                    f"sparsity of {name}: expected no layers, as all layers have one size"
                )
            table[~np.isin(np.arange(count), some)] = 0.0
        rows = np.where(w.layer >= 0, table[np.maximum(w.layer, 0)], 0.0)
        share = _share(w, name)
        if not share.any():
            has = dict.fromkeys(ROLES[code] for code in w.role[projections(w)])
            raise InputError(
                f"sparsity of {name}: this workload has no such projection; it has {', '.join(has)}"
            )
        parts[name] = np.where(share > 0, rows, 0.0)
        if name in NESTED:
            keep *= 1.0 - rows * share
        else:
            removed = np.where(share > 0, rows, removed)
    rows = 1.0 - (1.0 - removed) * keep if keep.min(initial=1.0) < 1.0 else removed
    weight = np.where(weighted(w), weights(w), 0.0)
    asked = float(weight @ rows / weight.sum()) if weight.sum() > 0 else float(np.mean(rows))
    if some is not None and family.layers == "some":
        asked *= len(some) / count
    return w, Choice(rows, asked, "part", parts, some if family.layers == "some" else None)


def _share(w: Workload, part: str) -> FloatArray:
    if part in SUBLAYERS:
        return np.where((w.layer >= 0) & (w.part == Part[part.upper()]), 1.0, 0.0)
    if part in ONE_SIZE:
        return np.where(w.layer >= 0, 1.0, 0.0)
    if part not in NESTED:
        return np.where(projections(w, *GROUPS.get(part, (part,))), 1.0, 0.0)
    attention = w.is_attention
    heads, groups = (covering(w, attention, x.astype(np.float64)) for x in (w.heads, w.kv_heads))
    fused = np.maximum(heads + 2.0 * groups, 1.0)
    queries = ("q", "o", "q_b", "kv_b", "absorb_k", "absorb_v", "quantize_heads")
    alone = queries if part == "heads" else ("k", "v")
    whole = (attention | w.is_role(*alone, "rotary", "qk_norm", "cache_write")) & (w.layer >= 0)
    return np.where(
        w.is_role("qkv"),
        (heads if part == "heads" else 2.0 * groups) / fused,
        np.where(whole, 1.0, 0.0),
    )
