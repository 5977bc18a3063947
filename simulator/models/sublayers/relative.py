"""Attention with learned relative positions and short convolutions (Inkling; Transformers 5.24,
models/inkling and inkling2)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.codes import Part
from simulator.models.pass_rows import OperatorRows, PassRows, Products, elements
from simulator.models.sublayers.attention import Attention
from simulator.models.sublayers.entry import Entry
from simulator.models.sublayers.short_conv import convolution


@dataclass(frozen=True, kw_only=True)
class RelativeAttention(Attention):
    """Convolutions follow keys and values. Features of each head mix profiles of biases by
    distance."""

    relative: int  # features of a head
    extent: int  # positions of a profile
    conv: int  # positions of the convolutions
    dynamic: bool = False  # a projection per head adds to the weights of the convolutions
    clips: bool = False  # queries and relative features have learned scales
    projects_sinks: bool = False  # a projection makes a logit of each head

    def _projections(self, hidden: int) -> Products:
        """Return the products that read the residual stream, besides those of all attention."""
        out = {"relative": (self.heads * self.relative, hidden, 1)}
        if self.dynamic:
            out["conv_weights"] = (self.kv_heads * self.conv, hidden, 2)
        if self.projects_sinks:
            out["sinks"] = (self.heads, hidden, 1)
        return out

    def products(self, hidden: int) -> Products:
        profiles = {"profiles": (self.extent, self.relative, 1)}
        return {**super().products(hidden), **self._projections(hidden), **profiles}

    @property
    def convolved(self) -> int:
        """Channels of keys and values."""
        return self.kv_heads * (self.head_dim + self.value_features)

    def other_parameters(self, hidden: int) -> int:
        products = elements(self._projections(hidden))
        scales = self.clips * self.heads * (self.head_dim + self.relative)
        own = self.extent * self.relative + self.convolved * self.conv + scales
        return super().other_parameters(hidden) + products + own

    def rows(self, p: PassRows) -> OperatorRows:
        for n, k, many in self._projections(p.hidden).values():
            for _ in range(many):
                yield p.wide_gemm("relative", self.part, n, k)
        profiles = p.wide_gemm("relative", self.part, self.extent, self.relative)
        scales = self.clips * self.heads * (self.head_dim + self.relative)
        yield profiles | {
            "m": p.tokens * self.heads,
            "params": profiles["params"] + scales * p.owns,
        }
        yield convolution(p, self.convolved, self.conv)
        yield from super().rows(p)


@dataclass(frozen=True, kw_only=True)
class Blocks(Entry):
    """A convolution follows the sublayer. In Inkling 2 its input is a weighted sum of earlier
    blocks of layers; gates mix it with that of the pass before, if layers run in several passes."""

    conv: int  # positions of the convolution
    sources: int = 0  # blocks that are summed
    vectors: int = 0  # weights of the sums, and further norms, over the hidden size
    scalars: int = 0  # factors, and biases of a router
    gates: int = 0
    rank: int = 0  # rank of the gates

    def products(self, hidden: int) -> Products:
        if not self.gates:
            return {}
        factors = {"entry_in": (self.rank, 2 * hidden, self.gates)}
        return {**factors, "entry_out": (hidden, self.rank, 2 * self.gates)}

    def own(self, hidden: int) -> int:
        return (self.conv + self.vectors) * hidden + self.scalars

    def before(self, p: PassRows, part: Part) -> OperatorRows:
        for role, (n, k, many) in self.products(p.hidden).items():
            for _ in range(many):
                yield p.wide_gemm(role, part, n, k)
        if self.sources:
            yield p.move("entry", part, p.hidden, self.sources * p.hidden)

    def after(self, p: PassRows, part: Part) -> OperatorRows:
        row = convolution(p, p.hidden, self.conv, part=part, role="output_conv")
        yield row | {"params": self.own(p.hidden) * p.owns}
