"""Learned augmented residual layer: a low-rank product beside attention (LAuReL, arXiv
2411.07501)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from simulator.codes import Part
from simulator.models.pass_rows import OperatorRow, PassRows
from simulator.models.sublayers.base import Sublayer


@dataclass(frozen=True, kw_only=True)
class Laurel(Sublayer):
    SIZES: ClassVar[tuple[str, ...]] = ("rank",)
    REDUCES: ClassVar[bool] = False

    rank: int
    joins: bool = True
    norms: tuple[bool, bool] | None = (False, True)

    @property
    def part(self) -> Part:
        return Part.ATTENTION

    def weights(self, hidden: int) -> Mapping[str, tuple[int, int]]:
        return {"laurel_in": (self.rank, hidden), "laurel_out": (hidden, self.rank)}

    def parameters(self, hidden: int) -> int:
        return 2 * self.rank * hidden

    def rows(self, p: PassRows) -> Iterator[OperatorRow]:
        for role, shape in self.weights(p.hidden).items():
            yield p.gemm(role, self.part, *shape)
