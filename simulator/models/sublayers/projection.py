"""Products without a nonlinearity that add to other sublayers (Zamba, arXiv 2405.16712, and Zamba2,
arXiv 2411.15242)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.codes import Part
from simulator.models.pass_rows import OperatorRows, PassRows, Shapes
from simulator.models.sublayers.base import Sublayer


@dataclass(frozen=True, kw_only=True)
class Projection(Sublayer):
    """One product, or two factors that adapt a product of the sublayer before it."""

    adapts: Part
    reads: int = 1  # hidden sizes that it reads
    features: int = 0  # outputs; 0: the hidden size
    rank: int = 0  # rank of the factors; 0: one product

    @property
    def part(self) -> Part:
        return self.adapts

    def weights(self, hidden: int) -> Shapes:
        inputs = self.reads * hidden
        outputs = self.features or hidden
        if not self.rank:
            return {"projection": (outputs, inputs)}
        return {"adapter_in": (self.rank, inputs), "adapter_out": (outputs, self.rank)}

    def rows(self, p: PassRows) -> OperatorRows:
        for role, (n, k) in self.weights(p.hidden).items():
            yield p.wide_gemm(role, self.part, n, k)
        if self.rank:
            features = self.features or p.hidden
            yield p.move("residual", self.part, features, 2 * features)
