"""A linear product in place of a sublayer (Puzzle, arXiv 2411.19146)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.codes import Part
from simulator.models.pass_rows import OperatorRows, PassRows, Shapes
from simulator.models.sublayers.base import Sublayer


@dataclass(frozen=True, kw_only=True)
class Linear(Sublayer):
    """One hidden x hidden product instead of attention or an MLP."""

    LABEL = "linear product"

    replaces: Part  # ATTENTION or MLP

    @property
    def part(self) -> Part:
        return self.replaces

    def weights(self, hidden: int) -> Shapes:
        return {"linear": (hidden, hidden)}

    def rows(self, p: PassRows) -> OperatorRows:
        # devices that share layers split its inputs
        devices = p.request.devices if p.lowering.split else 1
        product = "qkv" if self.part == Part.ATTENTION else "gate_up"
        yield from p.quantized(product, self.part, p.hidden)
        yield p.gemm("linear", self.part, p.hidden, -(-p.hidden // devices))
