"""Depth pruning: remove whole layers, or attention or MLP sublayers (ShortGPT, LaCo, SLEB,
LayerSkip)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.arguments import flag
from simulator.errors import InputError
from simulator.models.model import Model
from simulator.pruning._family import SUBLAYERS, Choice, Family, one_of, removed, rounded


def depth(
    model: Model, choice: Choice, *, unit: str = "layer", early_exit: bool = False
) -> tuple[Model, float]:
    """Remove ``round(s L)`` layers, or sublayers of each kind, with norm, residual, cache and
    parameters.

    ``unit`` is "layer", "both" (equal numbers of both kinds), "attention" or "mlp". The deepest
    layers except the last are removed, from the listed layers if there is a list; with
    ``early_exit`` also the last."""
    one_of("unit", unit, ("layer", "both", "attention", "mlp"))
    flag("option early_exit", early_exit)
    if unit in SUBLAYERS and choice.form == "part":
        raise InputError(f"option unit: expected no unit with a sparsity by part, got {unit!r}")
    parts = [name for name in SUBLAYERS if unit in ("layer", "both", name)]
    together = [parts] if unit == "layer" and choice.form != "part" else [[part] for part in parts]
    gone = {
        (part, layer)
        for some in together
        for layer in _removed_layers(model, some, choice, early_exit)
        for part in some
    }
    layers, numbers = [], []
    for i, (layer, number) in enumerate(zip(model.layers, model.layer_numbers)):
        sublayers = layer.sublayers
        for part in parts:
            if (part, i) in gone:
                layer = layer.without(part)
        if layer.sublayers or not sublayers:
            layers.append(layer)
            numbers.append(number)
    renumbered = numbers != list(range(len(layers)))
    out = model.with_layers(layers, numbers if renumbered else ())
    before, after = (
        sum(float(count.sum()) for (part, _), count in one.weight_counts.items() if part in parts)
        for one in (model, out)
    )
    return out, removed(before, after)


def _removed_layers(
    model: Model, parts: Sequence[str], choice: Choice, early_exit: bool
) -> list[int]:
    """Return the layers that lose the sublayers of some parts together."""
    having = [i for i, layer in enumerate(model.layers) if any(map(layer.has, parts))]
    if not having:
        return []
    candidates = having
    if choice.layers is not None:
        candidates = np.intersect1d(having, choice.layers).tolist()
    share = max(float(choice.of(part).max(initial=0.0)) for part in parts)
    many = rounded(share, len(candidates))
    # published methods remove the deepest layers, except the last
    spared = not early_exit and 0 < many < len(candidates) and candidates[-1] == having[-1]
    end = len(candidates) - int(spared)
    return candidates[end - many : end]


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
