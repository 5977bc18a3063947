"""Depth pruning: whole layers, or attention or MLP sublayers, vanish (ShortGPT, LaCo, SLEB, FinerCut)."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.columns import Array
from simulator.errors import InputError
from simulator.pruning._common import (
    SUBLAYERS,
    Choice,
    Family,
    merge_runs,
    one_of,
    parameters_of,
    part_rows,
    removed,
    whole_share,
)
from simulator.workload import Part, Workload

UNITS = ("layer", "both", "attention", "mlp")


def depth(w: Workload, choice: Choice, *, ideal: bool, unit: str, drop: Any) -> tuple[Workload, float]:
    """``round(s L)`` sublayers of each kind vanish with norm, residual, cache and parameters.

    ``unit``: "layer" (the same as "both", as equally many of both kinds go), "attention" or "mlp". ``drop`` names the layers instead of
    taking the last ones but one, which matters only where layers differ (alternating windows, per-layer widths).
    Realised: parameters removed of the projections addressed, that is sublayers removed / sublayers where layers are equal.
    """
    one_of("unit", unit, UNITS)
    parts = {name: part_rows(w, Part[name.upper()]) for name in SUBLAYERS}
    if unit in SUBLAYERS:
        if choice.form == "projection":
            raise InputError(f"option unit: {unit!r} and a sparsity by projection exclude each other")
        parts = {unit: parts[unit]}
    addressed = np.logical_or.reduce(list(parts.values()))
    before, out = parameters_of(w, addressed), w
    for name, rows in parts.items():
        if rows.any():
            out = _without(out, Part[name.upper()], float(choice.rows[rows].max()), drop)
    after = parameters_of(out, np.isin(out.part, [Part[name.upper()] for name in parts]))
    return out, removed(before, after)


def _without(w: Workload, part: Part, sparsity: float, drop: Any) -> Workload:
    rows = part_rows(w, part)
    layers = int((w.layer + w.layers)[rows].max())
    many = int(whole_share(sparsity, layers))
    if drop is None and ((w.layer == 0) & (w.layers == layers))[rows].all():  # all layers alike
        left = layers - many
        kept = w.replace(
            count=np.where(rows, w.count * (left / layers), w.count), layers=np.where(rows, left, w.layers)
        )
        return kept if left else kept.take(~rows)
    gone = _last_but_one(layers, many) if drop is None else _named(drop, layers, many)
    keep = np.ones(layers, dtype=bool)
    keep[gone] = False
    number = np.cumsum(keep) - 1  # new number of each layer that stays
    wide = w.expand()
    of_part = part_rows(wide, part)
    layer = np.where(of_part, wide.layer, 0)
    wide = wide.replace(layer=np.where(of_part, number[np.minimum(layer, layers - 1)], wide.layer))
    return merge_runs(wide.take(~of_part | keep[np.minimum(layer, layers - 1)]))


def _last_but_one(layers: int, many: int) -> Array:
    """The deepest layers but the last: those that published methods find redundant."""
    end = layers - 1 if many < layers else layers
    return np.arange(end - many, end)


def _named(drop: Any, layers: int, many: int) -> Array:
    try:
        gone = np.unique(np.asarray(list(drop), dtype=np.int64))
    except (TypeError, ValueError):
        raise InputError(f"option drop: expected layer numbers, got {drop!r}") from None
    if len(gone) != many or (many and not 0 <= gone[0] <= gone[-1] < layers):
        raise InputError(
            f"option drop: expected {many} different layers from 0 to {layers - 1} (round(sparsity x {layers})), got {drop!r}"
        )
    return gone


FAMILY = Family(
    name="depth",
    axis="static M",
    dynamic=False,
    order=1,
    function=depth,
    summary="layers, or attention or MLP sublayers, vanish with norm, residual and cache",
    cost="nothing",
    realised="layers (sublayers) removed / layers (sublayers addressed), weighted by their projection parameters",
    options={"unit": "layer", "drop": None},
    targets=SUBLAYERS,
    per_layer=False,
)
