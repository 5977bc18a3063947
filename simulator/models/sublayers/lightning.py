"""Lightning attention: linear attention with a fixed decay per head (arXiv 2401.04658, MiniMax-01,
arXiv 2501.08313)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.models.pass_rows import OperatorRows, PassRows, Shapes
from simulator.models.sublayers.base import Cut, Sublayer


@dataclass(frozen=True, kw_only=True)
class LightningAttention(Sublayer):
    """Each head has a state of key x value features; a norm and a gate follow."""

    LABEL = "lightning attention"
    SHAPE = "{0.heads} heads of {0.head_dim}"
    SIZES = ("heads",)
    DIVIDED = (("heads", "{} attention heads", "width attention={}"),)
    NAMED = (("heads", "heads"),)

    heads: int
    head_dim: int
    chunk: int  # tokens of a chunk

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    def weights(self, hidden: int) -> Shapes:
        return {
            "qkv": (3 * self.inner, hidden),
            "head_gate": (self.inner, hidden),
            "o": (hidden, self.inner),
        }

    def other_parameters(self, hidden: int) -> int:
        return self.inner

    def narrower(self, cut: Cut) -> LightningAttention:
        return replace(self, heads=cut.kept("attention", self.heads))

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        inner = self.inner
        yield from p.quantized("qkv", part, p.hidden)
        yield from p.weight(self, "qkv")
        yield p.move("activation", part, 3 * inner)
        sizes = self.heads, self.heads, self.head_dim, self.head_dim
        yield p.recurrence("lightning", *sizes, block=self.chunk) | p.wide
        yield p.move("inner_norm", part, inner, params=inner)
        yield from p.weight(self, "head_gate")
        yield p.move("output_gate", part, inner, 2 * inner)
        yield from p.output(self)
