"""Learned factors and addends of a sublayer's output and of the residual stream (ZAYA)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.codes import Part
from simulator.models.pass_rows import OperatorRows, PassRows
from simulator.models.sublayers.base import Sublayer


@dataclass(frozen=True, kw_only=True)
class ResidualScale(Sublayer):
    REDUCES = False

    of: Part  # ATTENTION or MLP
    norms: tuple[bool, bool] | None = (False, False)

    @property
    def part(self) -> Part:
        return self.of

    def parameters(self, hidden: int) -> int:
        return 4 * hidden

    def rows(self, p: PassRows) -> OperatorRows:
        features = p.hidden
        yield p.move("residual", self.part, features, 2 * features, features, 4 * features)
