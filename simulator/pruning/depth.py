"""Depth pruning: remove whole layers, or attention or MLP sublayers (ShortGPT, LaCo, SLEB,
LayerSkip)."""

from __future__ import annotations

import numpy as np

from simulator.arguments import flag
from simulator.arrays import Array
from simulator.codes import Part
from simulator.errors import InputError
from simulator.pruning._family import SUBLAYERS, Choice, Family, Pruned, one_of
from simulator.pruning._rows import changed, merge_runs, removed, weighted, weights, whole_share
from simulator.workload import Workload


def depth(
    w: Workload, choice: Choice, *, ideal: bool, unit: str = "layer", early_exit: bool = False
) -> Pruned:
    """Remove ``round(s L)`` layers, or sublayers of each kind, with norm, residual, cache and
    parameters.

    ``unit`` is "layer", "both" (equal numbers of both kinds), "attention" or "mlp". The deepest
    layers except the last are removed, from the listed layers if there is a list; with
    ``early_exit`` also the last."""
    one_of("unit", unit, ("layer", "both", "attention", "mlp"))
    flag("option early_exit", early_exit)
    if unit in SUBLAYERS and choice.form == "part":
        raise InputError(f"option unit: expected no unit with a sparsity by part, got {unit!r}")
    out, parts = w, [Part[name.upper()] for name in SUBLAYERS if unit in ("layer", "both", name)]
    for together in (
        [parts] if unit == "layer" and choice.form != "part" else [[part] for part in parts]
    ):
        rows = _in_layers(w, together)
        if rows.any():
            out = _without(out, together, float(choice.rows[rows].max()), choice.layers, early_exit)
    before, after = (
        float(weights(x)[weighted(x) & np.isin(x.part, parts)].sum()) for x in (w, out)
    )
    return out, removed(before, after)


def _in_layers(w: Workload, parts: list[Part]) -> Array:
    return np.isin(w.part, parts) & (w.layer >= 0)


def _without(
    w: Workload, parts: list[Part], sparsity: float, listed: Array | None, exits: bool
) -> Workload:
    rows = _in_layers(w, parts)
    layers = int((w.layer + w.layers)[rows].max())
    # all layers are equal
    if listed is None and ((w.layer == 0) & (w.layers == layers))[rows].all():
        left = layers - int(whole_share(sparsity, layers))
        kept = changed(w, rows, count=w.count * (left / layers), layers=left)
        return kept if left else kept.take(~rows)
    w = w.expand()
    rows = _in_layers(w, parts)
    there = np.unique(w.layer[rows])  # layers can lack a sublayer
    candidates = there if listed is None else np.intersect1d(there, listed)
    many = int(whole_share(sparsity, len(candidates)))
    # published methods remove the deepest layers, except the last
    spared = int(not exits and 0 < many < len(candidates) and candidates[-1] == there[-1])
    end = len(candidates) - spared
    keep = np.ones(layers, dtype=bool)
    keep[candidates[end - many : end]] = False
    number = np.cumsum(keep) - 1  # new number of each remaining layer
    layer = np.where(rows, w.layer, 0)
    return merge_runs(changed(w, rows, layer=number[layer]).take(~rows | keep[layer]))


FAMILY = Family(
    function=depth,
    axis="static M",
    loading="config",
    parts={"": ("layers",), "attention": ("attention layers",), "mlp": ("MLP layers",)},
    order=1,
    summary="removes layers, or attention or MLP sublayers, with norm, residual and cache",
    targets=SUBLAYERS,
    layers="some",
)
