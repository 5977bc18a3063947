"""Prune: pure functions from a workload to the workload of the pruned model.

Use :func:`prune`; :data:`FAMILIES` lists the families. A new family is one new module here with a constant ``FAMILY``.
Calls compose: ``prune(prune(w, "depth", 0.25), "semi_structured", 0.5)``. Numbers are rounded to the nearest whole
number, halves up, unless a family documents another rule.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from simulator.arguments import flag, instance, plain
from simulator.errors import InputError, unknown
from simulator.pruning._edits import merge_runs
from simulator.pruning._family import GROUPS, SUBLAYERS, WHOLE, Choice, Family, check_fraction
from simulator.pruning._rows import layer_count, projections, weights
from simulator.workload import ROLES, Applied, Part, Workload

__all__ = ["FAMILIES", "Family", "check_fraction", "general_families", "prune"]


class _Families(Mapping[str, Family]):
    """The modules of this package, each imported when its family is used."""

    _modules = frozenset(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

    def __getitem__(self, name: str) -> Family:
        if name not in self._modules:
            raise KeyError(name)
        family: Family = import_module(f"{__name__}.{name}").FAMILY
        return family

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._modules, key=lambda name: (self[name].order, name)))

    def __len__(self) -> int:
        return len(self._modules)


FAMILIES: Mapping[str, Family] = _Families()
"""Pruning families by name, in the order of tables."""


def general_families() -> tuple[str, ...]:
    """Return the names of the families that apply to every model."""
    return tuple(name for name, family in FAMILIES.items() if not family.needs)


def prune(
    workload: Workload,
    family: str,
    sparsity: float | Mapping[str, float] | Sequence[float],
    *,
    ideal: bool = False,
    **options: Any,
) -> Workload:
    """Return the workload of the pruned model; calls compose.

    Parameters
    ----------
    workload : Workload
        Dense or pruned workload, from :func:`simulator.lower` or :func:`simulator.prune`.
    family : str
        Pruning family, a key of :data:`simulator.FAMILIES`.
    sparsity : float, mapping of str to float, or sequence of float
        Fraction removed, in [0, 1); 0 changes no row. A number applies everywhere. A mapping applies to projections
        ("q", "down", ...) or to the groups "attention", "mlp" and "qkv": projections that are not named stay dense, and
        the entry of a projection overrides that of its group. A sequence has one fraction per layer, first to last.
    ideal : bool
        Exclude the work that the method adds (routers, gathers, selections), and use the efficiency of dense kernels:
        the bound of the family. The option ``kernel="ideal"`` of dynamic families has the same effect.
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
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="prefill", batch=1, seq=2048)
    >>> pruned = simulator.prune(dense, "depth", 0.26)
    >>> pruned.meta.applied[0].realised, round(float(dense.flops.sum() / pruned.flops.sum()), 3)
    (0.25, 1.333)
    """
    instance("workload", workload, Workload, "simulator.lower")
    flag("ideal", ideal)
    if not isinstance(family, str) or family not in FAMILIES:
        raise unknown("pruning family", family, FAMILIES)
    chosen = FAMILIES[family]
    if wrong := [name for name in options if name not in chosen.options]:
        if not chosen.options:
            raise InputError(f"family {family} has no option {wrong[0]!r}; it has none")
        raise unknown(f"option of family {family}", wrong[0], chosen.options)
    work, choice = _resolve(workload, chosen, sparsity)
    pruned, realised = workload, 0.0
    if choice.rows.any():
        if not chosen.whole and (choice.rows > 0)[work.is_role(*WHOLE)].any():
            reason = "routed experts, latent attention and delta nets have no such kernels"
            raise InputError(f"family {family}: {reason}; name the projections to prune, such as {{'o': 0.5}}")
        pruned, realised = chosen.function(work, choice, ideal=ideal, **options)
        if choice.form == "layer":
            pruned = merge_runs(pruned)
    applied = (*workload.meta.applied, Applied(family, choice.asked, realised))
    return pruned.replace(meta=replace(workload.meta, applied=applied))


def _resolve(w: Workload, family: Family, sparsity: Any) -> tuple[Workload, Choice]:
    """Return the workload, expanded to one row per layer for a sparsity per layer, and the sparsity of its rows."""
    if isinstance(sparsity, Mapping):
        return w, _by_projection(w, family, sparsity)
    if np.ndim(plain(sparsity)):
        return _by_layer(w, family, sparsity)
    fraction = check_fraction(sparsity)
    return w, Choice(np.where(w.layer >= 0, fraction, 0.0), fraction)


def _by_layer(w: Workload, family: Family, sparsity: Any) -> tuple[Workload, Choice]:
    layers = layer_count(w)
    if not family.per_layer:
        raise InputError(f"family {family.name}: expected one fraction, got a sparsity by layer")
    if np.shape(plain(sparsity)) != (layers,):
        expected = f"expected {layers} fractions, one per layer of this model"
        raise InputError(f"sparsity by layer: {expected}, got {len(sparsity)}")
    table = np.array([check_fraction(s, f"sparsity of layer {i}:") for i, s in enumerate(sparsity)])
    wide = w.expand()
    rows = np.where(wide.layer >= 0, table[np.maximum(wide.layer, 0)], 0.0)
    return wide, Choice(rows, float(table.mean()), "layer")


def _by_projection(w: Workload, family: Family, sparsity: Mapping[str, float]) -> Choice:
    if not family.targets:
        raise InputError(f"family {family.name}: expected one fraction, got a sparsity by projection")
    if not sparsity:
        raise InputError(f"sparsity by projection: expected some of {', '.join(family.targets)}, got none")
    rows, inside = np.zeros(len(w)), projections(w)
    wider_first = sorted(sparsity, key=lambda name: (name not in SUBLAYERS, name not in GROUPS))
    for name in wider_first:
        if name not in family.targets:
            raise unknown(f"projection (for family {family.name})", name, family.targets)
        fraction = check_fraction(sparsity[name], f"sparsity of {name}:")
        if name in SUBLAYERS:
            mask = (w.layer >= 0) & (w.part == Part[name.upper()])
        else:
            mask = projections(w, *GROUPS.get(name, (name,)))
            if not mask.any():
                has = dict.fromkeys(ROLES[code] for code in w.role[inside])
                raise InputError(f"sparsity of {name}: this workload has no such projection; it has {', '.join(has)}")
        rows[mask] = fraction
    weight = np.where(inside, weights(w), 0.0)
    asked = float(weight @ rows / weight.sum()) if weight.sum() > 0 else float(np.mean(list(sparsity.values())))
    return Choice(rows, asked, "projection")
