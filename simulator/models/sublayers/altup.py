"""Alternating updates: a layer computes one of several residual streams and predicts the others
(AltUp, arXiv 2301.13310)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.codes import Part
from simulator.models.pass_rows import OperatorRows, PassRows, Products, elements
from simulator.models.sublayers.base import Sublayer


@dataclass(frozen=True, kw_only=True)
class AltUp(Sublayer):
    """Prediction of the streams before a layer, and their correction after it (Gemma 3n)."""

    PART = Part.MLP
    REDUCES = False

    streams: int
    norms: tuple[bool, bool] | None = (False, False)

    def products(self, hidden: int) -> Products:
        streams = self.streams
        return {
            "router": (streams, hidden, 1),
            "prediction": (streams**2, streams, 1),
            "correction": (streams, streams, 1),
        }

    def parameters(self, hidden: int) -> int:
        # a norm, and factors of the computed stream
        return elements(self.products(hidden)) + 2 * hidden

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        hidden = p.hidden
        every = self.streams * hidden
        products = self.products(hidden)
        for name, first in (("prediction", 1), ("correction", 0)):
            yield p.move("altup", part, hidden, params=2 * hidden * first)
            router = p.wide_gemm("altup", part, *products["router"][:2])
            yield router | {"params": first * router["params"]}
            yield p.wide_gemm("altup", part, *products[name][:2])
        # predictions: sums of streams; corrections: a multiple of the computed change
        yield p.move("altup", part, every, 2 * every)
        yield p.move("altup", part, every, every + hidden)
        # the layer's input is added to all streams except the computed one
        yield p.move("altup", part, every - hidden, every)
