"""Modules whose kind is not known: their products, and what mixes positions."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.codes import Part
from simulator.errors import InputError
from simulator.models.pass_rows import OperatorRows, PassRows, Products, Shapes, elements
from simulator.models.sublayers.base import Cut, Sublayer

CHUNK = 256  # tokens of a chunk of a recurrence, as in Mamba-2 (arXiv 2405.21060; assumed)


@dataclass(frozen=True, kw_only=True)
class Modules(Sublayer):
    """Linear products in the order of their modules, with attention or a recurrence between them.

    Its operators are products, attention over all positions or the recurrence of a state; further
    kernels are not counted."""

    WHOLE = ("modules",)

    place: Part  # part of the layer
    matrices: tuple[tuple[int, int, int], ...]  # outputs, inputs, number of blocks or experts
    width: int  # hidden size, for which inputs and outputs of this size stand
    active: float = 0.0  # experts that a token uses; 0: a token uses all blocks
    heads: int = 0  # heads of attention or of a recurrence; 0: nothing mixes positions
    kv_heads: int = 0
    head_dim: int = 0  # features of a query or key head, or of a value head of a recurrence
    state: int = 0  # state features per feature of a head; 0: attention

    @property
    def part(self) -> Part:
        return self.place

    def weights(self, hidden: int) -> Shapes:
        return {"modules": (self.parameters(hidden), 1)}

    def products(self, hidden: int) -> Products:
        sizes = {self.width: hidden}
        return {
            str(i): (sizes.get(n, n), sizes.get(k, k), count)
            for i, (n, k, count) in enumerate(self.matrices)
        }

    def parameters(self, hidden: int) -> int:
        return elements(self.products(hidden))

    def narrower(self, cut: Cut) -> Modules:
        for name in ("mlp",) if self.place == Part.MLP else ("attention", "heads", "kv"):
            if cut.shares[name] > 0:
                kinds = "some modules are of no known kind, so their widths cannot be pruned"
                raise InputError(f"sparsity of {name}: {kinds}; expected depth")
        return self

    def rows(self, p: PassRows) -> OperatorRows:
        for n, k, count in self.products(p.hidden).values():
            writes = n == p.hidden
            row = p.wide_gemm("linear" if writes else "projection", self.part, n, k)
            if count > 1:  # blocks in use side by side, each for its share of the tokens
                pairs = p.tokens * min(self.active or count, count)
                tokens = max(round(pairs / count), 1)
                side = "k" if writes else "n"
                row |= {"m": tokens, side: round(row[side] * pairs / tokens)}
            yield row | {"params": n * k * count * p.owns}
        if self.state:
            sizes = self.heads, self.kv_heads, self.state, self.head_dim
            yield p.recurrence("mamba", *sizes, block=CHUNK)
        elif self.heads:
            yield p.cache_write(2 * self.kv_heads * self.head_dim, self.heads, self.kv_heads)
            yield p.attend(self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
