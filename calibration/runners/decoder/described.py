"""Execute a pruning method of a file: tokens that skip the MLP, or MLP channels that all tokens of
a pass share.

The choices are planted by routers with random weights. Products, selections and copies run as the
file states them, with exact numbers of tokens and channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from calibration.runners.decoder.families import best, scattered
from calibration.runners.decoder.model import Decoder, Mlp, PassState, Projection, Rule
from simulator.errors import InputError
from simulator.pruning.described.description import Addition, Change, Description
from simulator.pruning.described.expressions import Expression

Tensor = Any


@dataclass(frozen=True)
class SkippedTokens(Rule):
    """Gather the tokens with the largest scores, compute their MLP and add the results."""

    keep: float

    def mlp(self, s: PassState, m: Mlp, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = F.linear(tokens, m.router)[:, 0]
        rows = best(scores, whole_share(self.keep, len(tokens)))
        h = s.norm(tokens.index_select(0, rows), m.norm)
        return scattered(x, rows, m.down(s.gated(m.gate(h), m.up(h))))


@dataclass(frozen=True)
class SharedChannels(Rule):
    """Copy the weights of the channel groups that the mean token scores best, and multiply all
    tokens by the copies. ``down`` is transposed: the weights of a group are neighbours."""

    keep: float

    def mlp(self, s: PassState, m: Mlp, x: Tensor) -> Tensor:
        h = s.norm(x, m.norm)
        scores = F.linear(h.flatten(0, 1).mean(0, keepdim=True), m.router)[0]
        groups = best(scores, whole_share(self.keep, len(scores)))
        gate, up, down = (
            getattr(m, role)
            .weight.unflatten(0, (len(scores), -1))
            .index_select(0, groups)
            .flatten(0, 1)
            for role in m.roles
        )
        return x + s.gated(F.linear(h, gate), F.linear(h, up)) @ down


def whole_share(share: float, of: int) -> int:
    """Return a share of ``of``, rounded up as all sizes of a method file."""
    return max(math.ceil(share * of - 1e-9), 1)


_ANY = Expression.parse("s")
# change that this decoder executes, of any share -> rule, and roles of the work that it adds
_RULES = {
    Change("mlp", "m", _ANY, "gather", tokens="exact"): (SkippedTokens, ("router", "select")),
    Change("mlp", "n", _ANY, "dense", shared=True): (
        SharedChannels,
        ("norm", "router", "select", "gather"),
    ),
}
_NAMES = ("hidden", "inner", "s")  # sizes that a share and the outputs of a router may name


def check_method(about: Description) -> None:
    """Raise InputError for a method that this decoder does not execute."""
    forms = [_form(change) for change in about.dynamic]
    if about.layers or about.per_layer or len(forms) != 1 or forms[0] not in _RULES:
        raise InputError(
            f"{about.name}: dynamic: this decoder executes mlp: {{m: ..., tokens: exact, kernel:"
            " gather}} or mlp: {{n: ..., shared: true}} in all layers; got"
            f" {', '.join(change.operator for change in about.dynamic) or 'no change'}"
        )
    roles = _RULES[forms[0]][1]
    kinds = ("gemm" if role == "router" else "elementwise" for role in roles)
    expected = [Addition(kind, role, {}, "before mlp") for kind, role in zip(kinds, roles)]
    if [replace(one, sizes={}, kernels=1) for one in about.adds] != expected:
        raise InputError(
            f"{about.name}: adds: this decoder executes {', '.join(roles)} before mlp, in this"
            f" order; got {', '.join(one.role for one in about.adds) or 'nothing'}"
        )
    if unknown := sorted((about.dynamic[0].stays.names | _outputs(about).names).difference(_NAMES)):
        known = ", ".join(_NAMES)
        raise InputError(
            f"{about.name}: this decoder computes shares and routers from {known}; got {unknown[0]}"
        )


def with_method(decoder: Decoder, about: Description, s: float) -> Decoder:
    """Return a decoder that executes a method at a sparsity, with random routers."""
    change = about.dynamic[0]
    rule, _ = _RULES[_form(change)]
    generator = torch.Generator().manual_seed(0)

    def routed(number: int, part: Any) -> Any:
        if not isinstance(part, Mlp):
            return part
        inner, hidden = part.gate.weight.shape
        sizes = {"s": s, "hidden": hidden, "inner": inner}
        outputs = math.ceil(_outputs(about).value(sizes))
        router = torch.randn(outputs, hidden, generator=generator) / math.sqrt(hidden)
        part = replace(part, router=router.to(part.norm))
        if rule is SkippedTokens:
            return part
        if outputs * change.align != inner:
            raise InputError(
                f"{about.name}: router n: expected {inner / change.align:g}, one per"
                f" {change.align} channels (align), got {outputs}"
            )
        return replace(part, down=Projection((part.down.weight.t().contiguous(),)))

    keep = float(change.stays.value({"s": s}))
    return replace(decoder.changed(routed), rule=rule(keep))


def _form(change: Change) -> Change:
    return replace(change, stays=_ANY, align=Change.align)


def _outputs(about: Description) -> Expression:
    return next(one.sizes["n"] for one in about.adds if one.role == "router")
