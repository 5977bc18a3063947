"""Width pruning across layers: reduce the hidden size everywhere (SliceGPT, embedding axis of
Minitron)."""

from __future__ import annotations

from dataclasses import replace

from simulator.arguments import flag
from simulator.errors import InputError
from simulator.models.model import Model
from simulator.models.sublayers.base import aligned
from simulator.pruning._family import Choice, Family, weights_removed, whole


def width_cross(
    model: Model, choice: Choice, *, align: int = 16, residual_projections: bool = False
) -> tuple[Model, float]:
    """Reduce the hidden size H to H' = ``(1-s) H``, rounded up to ``align``, in embedding, norms,
    projections and head.

    ``residual_projections`` adds the two H'xH' GEMMs per layer with which SliceGPT changes the
    basis of the residual stream."""
    rotates = flag("option residual_projections", residual_projections)
    out = narrowed(model, choice.asked, whole("align", align))
    realised = weights_removed(model, out)
    if rotates:
        out = out.each_layer(
            lambda layer: layer.each(lambda sublayer: replace(sublayer, rotates=True))
        )
    return out, realised


def narrowed(model: Model, share: float, align: int) -> Model:
    """Return the model without a share of its hidden size."""
    hidden = model.hidden
    widths = {s.outputs(hidden) for layer in model.layers for s in layer.sublayers}
    if len(widths) > 1:
        raise InputError(
            f"width_cross: expected one hidden size in all layers, got {sorted(widths)}"
        )
    return replace(model, hidden=aligned(hidden, share, align))


FAMILY = Family(
    function=width_cross,
    axis="static N, K across layers",
    loading="config",
    parts={"": ("hidden size",)},
    narrows=True,
    order=3,
    summary=(
        "reduces the hidden size everywhere: embedding, norms, projections, residual stream, head"
    ),
    layers="all",
)
