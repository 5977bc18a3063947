"""Depth pruning: remove whole layers, or attention or MLP sublayers (ShortGPT, LaCo, SLEB, LayerSkip)."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.errors import InputError
from simulator.pruning._edits import changed, merge_runs, whole_share
from simulator.pruning._family import SUBLAYERS, Choice, Family, Pruned, one_of
from simulator.pruning._rows import removed, weighted, weights
from simulator.workload import Part, Workload


def depth(w: Workload, choice: Choice, *, ideal: bool, unit: str = "layer", drop: Any = None) -> Pruned:
    """Remove ``round(s L)`` layers, or sublayers of each kind, with norm, residual, cache and parameters.

    ``unit`` is "layer", "both" (equal numbers of both kinds, the same as "layer" unless some layers lack one),
    "attention" or "mlp". ``drop`` lists the layers to remove, or is "last": an exit of all tokens after the layers that
    stay. By default the deepest layers go, except the last. The choice matters only if layers differ (alternating
    windows, widths per layer).
    """
    one_of("unit", unit, ("layer", "both", "attention", "mlp"))
    if unit in SUBLAYERS and choice.form == "projection":
        raise InputError(f"option unit: expected no unit with a sparsity by projection, got {unit!r}")
    if isinstance(drop, str) and drop != "last":
        raise InputError(f"option drop: expected layer numbers or last, got {drop!r}")
    out, parts = w, [Part[name.upper()] for name in SUBLAYERS if unit in ("layer", "both", name)]
    for together in [parts] if unit == "layer" and choice.form != "projection" else [[part] for part in parts]:
        rows = _rows(w, together)
        if rows.any():
            out = _without(out, together, float(choice.rows[rows].max()), drop)
    before, after = (float(weights(x)[weighted(x) & np.isin(x.part, parts)].sum()) for x in (w, out))
    return out, removed(before, after)


def _rows(w: Workload, parts: list[Part]) -> Array:
    mask: Array = np.isin(w.part, parts) & (w.layer >= 0)
    return mask


def _without(w: Workload, parts: list[Part], sparsity: float, drop: Any) -> Workload:
    rows = _rows(w, parts)
    layers = int((w.layer + w.layers)[rows].max())
    present = np.zeros(layers + 1, dtype=np.int64)  # layers can lack a sublayer
    np.add.at(present, w.layer[rows], 1)
    np.add.at(present, (w.layer + w.layers)[rows], -1)
    there = np.flatnonzero(np.cumsum(present)[:-1] > 0)
    many = int(whole_share(sparsity, len(there)))
    if drop is None and ((w.layer == 0) & (w.layers == layers))[rows].all():  # all layers are equal
        left = layers - many
        kept = changed(w, rows, count=w.count * (left / layers), layers=left)
        return kept if left else kept.take(~rows)
    keep = np.ones(layers, dtype=bool)
    # published methods find the deepest layers, except the last, redundant
    end = len(there) - 1 if many < len(there) and drop is None else len(there)
    deepest = there[end - many : end]
    keep[deepest if drop is None or isinstance(drop, str) else _named(drop, layers, many)] = False
    number = np.cumsum(keep) - 1  # new number of each remaining layer
    wide = w.expand()
    rows = _rows(wide, parts)
    layer = np.where(rows, wide.layer, 0)
    return merge_runs(changed(wide, rows, layer=number[layer]).take(~rows | keep[layer]))


def _named(drop: Any, layers: int, many: int) -> Array:
    try:
        gone = np.unique(np.asarray(list(drop), dtype=np.int64))
    except (TypeError, ValueError):
        raise InputError(f"option drop: expected layer numbers, got {drop!r}") from None
    if len(gone) != many or (many and not 0 <= gone[0] <= gone[-1] < layers):
        expected = f"expected {many} different layers from 0 to {layers - 1} (round(sparsity x {layers}))"
        raise InputError(f"option drop: {expected}, got {drop!r}")
    return gone


FAMILY = Family(
    function=depth,
    axis="static M",
    order=1,
    summary="removes layers, or attention or MLP sublayers, with norm, residual and cache",
    cost="nothing",
    realised="layers (sublayers) removed / layers (sublayers addressed), weighted by their projection parameters",
    targets=SUBLAYERS,
    per_layer=False,
)
