"""Width pruning: remove KV groups with their query heads, and MLP channels (LLM-Pruner, FLAP,
Sheared LLaMA).

In a gated delta net, a group is a key head with its value heads: projections, convolution and state
shrink. It has no query heads or KV heads alone. Mamba-2 loses heads (equally many of each group of
B and C), channels of a head, or features of its state, as in Nemotron-H's pruning (arXiv
2504.11409); a head of Mamba is one channel.
"""

from __future__ import annotations

from typing import Any

from simulator.errors import InputError
from simulator.models.model import Layer, Model
from simulator.models.sublayers.base import Cut
from simulator.pruning._family import (
    MAMBA,
    NESTED,
    SUBLAYERS,
    Choice,
    Family,
    changed,
    weights_removed,
    whole,
)
from simulator.pruning.static.width_cross import narrowed

PARTS = ("attention", "heads", "kv", "mlp", *MAMBA)


def width(
    model: Model, choice: Choice, *, align: int = 16, inner: Any = None
) -> tuple[Model, float]:
    """Keep ``round((1-s) G)`` KV groups, at least one, and ``1-s`` of the inner width, rounded up
    to ``align``.

    Parts are ``attention`` (KV groups with their query heads), ``mlp``, ``heads`` (query heads
    alone; the cache stays), ``kv`` (KV heads alone), ``hidden`` (hidden size of all layers),
    ``mamba_heads``, ``mamba_channels`` (of a head) and ``mamba_state``.
    ``inner`` sets the inner width, for an existing pruned checkpoint."""
    align = whole("align", align)
    wanted = None if inner is None else _inner(model, whole("inner", inner))

    def narrower(layer: Layer, *shares: float) -> Layer:
        cut = Cut(dict(zip(PARTS, shares)), align, wanted)
        return layer.each(lambda sublayer: sublayer.narrower(cut))

    out = changed(model, narrower, *(choice.of(part) for part in PARTS))
    if (hidden := float(choice.of("hidden").max(initial=0.0))) > 0:
        out = narrowed(out, hidden, align)
    return out, weights_removed(model, out)


def _inner(model: Model, inner: int) -> int:
    widths = model.sizes("inner width")
    if widths and min(widths) < inner:
        expected = f"expected a width up to the inner width {int(max(widths))}"
        raise InputError(f"option inner: {expected}, got {inner}")
    return inner


FAMILY = Family(
    function=width,
    axis="static N -> K",
    loading="config",
    parts={
        "": ("KV heads", "inner width", "expert width", "Mamba heads"),
        "attention": ("KV heads",),
        "heads": ("heads",),
        "kv": ("KV heads",),
        "mlp": ("inner width", "expert width"),
        "hidden": ("hidden size",),
        "mamba_heads": ("Mamba heads",),
        "mamba_channels": ("Mamba channels",),
        "mamba_state": ("Mamba state",),
    },
    narrows=True,
    order=2,
    summary="removes KV groups with their query heads, MLP channels, and heads of Mamba; the cache"
    " shrinks too",
    targets=(*SUBLAYERS, *NESTED),
)
