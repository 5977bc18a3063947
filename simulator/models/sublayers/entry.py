"""How a sublayer reads the residual stream and adds to it, where a norm and a sum are not all."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.codes import Part
from simulator.models.pass_rows import OperatorRows, PassRows, Products, elements


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Products around a sublayer that are not its own."""

    def products(self, hidden: int) -> Products:
        """Return outputs and inputs of all linear products, and how many there are, by role."""
        raise NotImplementedError

    def own(self, hidden: int) -> int:
        """Return the parameters that are no products."""
        return 0

    def parameters(self, hidden: int) -> int:
        return elements(self.products(hidden)) + self.own(hidden)

    def before(self, p: PassRows, part: Part) -> OperatorRows:
        """Yield the products, in 16 bits; the first row has the other parameters."""
        own = self.own(p.hidden) * p.owns
        for role, (n, k, _) in self.products(p.hidden).items():
            row = p.wide_gemm(role, part, n, k)
            yield row | {"params": row["params"] + own}
            own = 0.0

    def after(self, p: PassRows, part: Part) -> OperatorRows:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class GatedNorm(Entry):
    """Two small products gate the normed input (A.X-K2)."""

    rank: int

    def products(self, hidden: int) -> Products:
        return {"entry_in": (self.rank, hidden, 1), "entry_out": (hidden, self.rank, 1)}

    def before(self, p: PassRows, part: Part) -> OperatorRows:
        yield from super().before(p, part)
        yield p.move("entry", part, p.hidden, 2 * p.hidden)


@dataclass(frozen=True, kw_only=True)
class Streams(Entry):
    """Hyper-connections (arXiv 2409.19606): the residual is several streams, of which the input of
    a sublayer is a weighted sum; its output is added to each stream.

    A product of all streams makes the weights (DeepSeek-V4; Hy4 does not mix the streams). With a
    ``rank``, weights are per feature and come from two products of the normed streams (Qwen4)."""

    streams: int
    mixes: bool = False  # the streams that are kept are weighted sums of all
    rank: int = 0

    def products(self, hidden: int) -> Products:
        many = self.streams
        width = self.streams * hidden
        if self.rank:
            factors = {"entry_in": (self.rank, width, 1), "entry_out": (width, self.rank, 1)}
            return {**factors, "entry_weights": (many, width, 1)}
        return {"entry_weights": ((2 + self.mixes * many) * many, width, 1)}

    def own(self, hidden: int) -> int:
        """Return the parameters of the norm of the streams, or biases and scales of the weights."""
        if self.rank:
            return self.streams * hidden
        return (2 + self.mixes * self.streams) * self.streams + 2 + self.mixes

    def last(self, hidden: int) -> int:
        """Return the parameters of the sum of the streams after the last layer."""
        if self.rank:
            return (2 * self.rank + 1) * self.streams * hidden
        return self.streams * (self.streams * hidden + 1) + 1

    def before(self, p: PassRows, part: Part) -> OperatorRows:
        yield from super().before(p, part)
        yield p.move("entry", part, p.hidden, self.streams * p.hidden)

    def after(self, p: PassRows, part: Part) -> OperatorRows:
        width = self.streams * p.hidden
        yield p.move("streams", part, width, width + p.hidden)
