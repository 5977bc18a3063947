"""Learned augmented residual layer: a low-rank product beside attention (LAuReL, arXiv
2411.07501)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.models.pass_rows import Shapes
from simulator.models.sublayers.base import Sublayer


@dataclass(frozen=True, kw_only=True)
class Laurel(Sublayer):
    SIZES = ("rank",)
    REDUCES = False

    rank: int
    joins: bool = True
    norms: tuple[bool, bool] | None = (False, True)

    def weights(self, hidden: int) -> Shapes:
        return {"laurel_in": (self.rank, hidden), "laurel_out": (hidden, self.rank)}
