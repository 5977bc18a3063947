"""Expert pruning: remove or merge routed experts (REAP, NAEE, HC-SMoE), or use fewer per token."""

from __future__ import annotations

import math
from dataclasses import replace

from simulator.arguments import flag
from simulator.errors import InputError
from simulator.models.model import Layer, Model
from simulator.models.sublayers import Experts
from simulator.pruning._family import Choice, Family, changed, one_of, removed, rounded


def experts(
    model: Model, choice: Choice, *, fewer: str = "experts", merged: bool = False
) -> tuple[Model, float]:
    """Keep ``round((1-s) E)`` routed experts per layer, at least as many as a token uses.

    The router shrinks. With ``merged``, each group of experts becomes one; the router keeps its E
    outputs, and a table maps the choices of a token to groups (``select``). With ``fewer`` "active"
    all experts stay, and a token uses ``round((1-s) A)`` of them, at least one; with "average" that
    number is a mean over tokens. The skew falls with the square root of the share of experts that
    stay."""
    one_of("fewer", fewer, ("experts", "active", "average"))
    if flag("option merged", merged) and fewer != "experts":
        raise InputError(f"option merged: expected fewer=experts with it, got {fewer}")
    share = choice.of("mlp")
    routed = [layer.of("mlp") for layer in model.layers]
    if not any(isinstance(mlp, Experts) and s > 0 for mlp, s in zip(routed, share.tolist())):
        some = any(isinstance(mlp, Experts) for mlp in routed)
        expected, of = ("layers", "layers of ") if some else ("a model", "")
        raise InputError(
            f"family experts: expected {expected} with routed experts, got {of}{model.name}"
            " without them"
        )

    def pruned(layer: Layer, share: float) -> Layer:
        mlp = layer.of("mlp")
        if not isinstance(mlp, Experts) or not share:
            return layer
        return layer.with_part("mlp", _pruned(mlp, share, fewer, merged))

    out = changed(model, pruned, share)
    name = "experts" if fewer == "experts" else "active"
    before, after = (
        sum(
            float(getattr(mlp, name))
            for layer in one.layers
            if isinstance(mlp := layer.of("mlp"), Experts)
        )
        for one in (model, out)
    )
    return out, removed(before, after)


def _pruned(experts: Experts, share: float, fewer: str, merged: bool) -> Experts:
    if fewer == "experts":
        kept = max(rounded(1.0 - share, experts.experts), math.ceil(experts.active))
        if merged:
            return experts.fewer(kept, outputs_of_router=experts.routes, choices=experts.active)
        return experts.fewer(kept)
    exact = (1.0 - share) * experts.active
    if fewer == "average":
        return replace(experts, active=max(exact, 1.0), choices=experts.active)
    return replace(experts, active=max(float(rounded(1.0 - share, experts.active)), 1.0))


FAMILY = Family(
    function=experts,
    axis="static or dynamic N of experts",
    loading="checkpoint",
    parts={"": ("experts",)},
    order=12,
    needs="experts",
    summary=(
        "removes or merges (merged=True) routed experts, or activates fewer per token (fewer=active"
        " or average)"
    ),
)
