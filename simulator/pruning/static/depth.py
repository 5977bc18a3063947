"""Depth pruning: remove whole layers, or sublayers of one kind (ShortGPT, LaCo, SLEB, LayerSkip).
Mamba and short convolutions are kinds of their own; linear attention is attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from simulator.arguments import flag
from simulator.errors import InputError
from simulator.models.model import Model
from simulator.pruning._family import KINDS, SUBLAYERS, Choice, Family, one_of, removed, rounded


def depth(
    model: Model, choice: Choice, *, unit: str = "layer", early_exit: bool = False
) -> tuple[Model, float]:
    """Remove ``round(s L)`` layers, or sublayers of each kind, with norm, residual, cache and
    parameters. Parts are kinds of sublayers: ``attention``, ``mlp``, ``mamba`` and ``conv``.

    ``unit`` is "layer", "both" (equal numbers of both kinds), "attention" or "mlp". The deepest
    layers except the last are removed, from the listed layers if there is a list; with
    ``early_exit`` also the last."""
    one_of("unit", unit, ("layer", "both", "attention", "mlp"))
    flag("option early_exit", early_exit)
    if unit in SUBLAYERS and choice.form == "part":
        raise InputError(f"option unit: expected no unit with a sparsity by part, got {unit!r}")
    kinds = KINDS if unit == "layer" else SUBLAYERS if unit == "both" else (unit,)
    together = [kinds] if unit == "layer" and choice.form != "part" else [(k,) for k in kinds]
    gone = {
        (kind, layer)
        for some in together
        for layer in _removed_layers(model, some, choice, early_exit)
        for kind in some
    }
    layers, numbers = [], []
    for i, (layer, number) in enumerate(zip(model.layers, model.layer_numbers)):
        left = replace(
            layer, sublayers=tuple(s for s in layer.sublayers if (s.kind, i) not in gone)
        )
        if left.sublayers or not layer.sublayers:
            layers.append(left)
            numbers.append(number)
    renumbered = numbers != list(range(len(layers)))
    out = model.with_layers(layers, numbers if renumbered else ())
    return out, removed(_weights(model, kinds), _weights(out, kinds))


def _weights(model: Model, kinds: Sequence[str]) -> float:
    """Return the weights of the sublayers of some kinds."""
    return sum(
        float(count)
        for run in model.runs
        for s in run.layer.sublayers
        if s.kind in kinds
        for count in (run.length * np.array([*s.weight_counts(model.hidden).values()])).tolist()
    )


def _removed_layers(
    model: Model, kinds: Sequence[str], choice: Choice, early_exit: bool
) -> list[int]:
    """Return the layers that lose the sublayers of some kinds together."""
    having = [
        i for i, layer in enumerate(model.layers) if any(s.kind in kinds for s in layer.sublayers)
    ]
    if not having:
        return []
    candidates = having
    if choice.layers is not None:
        candidates = np.intersect1d(having, choice.layers).tolist()
    share = max(float(choice.of(kind).max(initial=0.0)) for kind in kinds)
    many = rounded(share, len(candidates))
    # published methods remove the deepest layers, except the last
    spared = not early_exit and 0 < many < len(candidates) and candidates[-1] == having[-1]
    end = len(candidates) - int(spared)
    return candidates[end - many : end]


FAMILY = Family(
    function=depth,
    axis="static M",
    loading="config",
    parts={
        "": ("layers",),
        "attention": ("attention layers",),
        "mlp": ("MLP layers",),
        "mamba": ("Mamba layers",),
        "conv": ("conv layers",),
    },
    order=1,
    summary="removes layers, or sublayers of one kind, with norm, residual and cache",
    targets=KINDS,
    layers="some",
)
