"""Gated short convolution (LFM2, arXiv 2511.23404), and the convolution that other kinds share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from simulator.codes import Kind, Part
from simulator.models.pass_rows import OperatorRow, OperatorRows, PassRows, Shapes
from simulator.models.sublayers.base import Sublayer


def convolution(
    p: PassRows,
    channels: Any,
    positions: int,
    bias: bool = False,
    part: Part = Part.ATTENTION,
    role: str = "short_conv",
) -> OperatorRow:
    """Return the causal convolution of each channel over ``positions``."""
    return p.kernel(
        Kind.SHORT_CONV,
        role,
        part,
        params=channels * (positions + bias) * p.owns,
        m=p.tokens,
        n=channels,
        batch=p.batch,
        window=positions,
        kv_len=p.kept(positions),
    )


@dataclass(frozen=True, kw_only=True)
class ShortConv(Sublayer):
    """One projection makes two gates and the input of a convolution."""

    LABEL = "short convolution"
    KIND = "conv"
    SHAPE = "{0.conv} positions"
    WHOLE = ("conv_in",)

    conv: int  # positions of the convolution
    bias: bool = False  # bias of the convolution and of both projections
    parts: int = 1  # devices that divide the channels, which are as many as the hidden size

    def weights(self, hidden: int) -> Shapes:
        channels = hidden // self.parts
        return {"conv_in": (3 * channels, hidden), "o": (hidden, channels)}

    def other_parameters(self, hidden: int) -> int:
        channels = hidden // self.parts
        return channels * self.conv + self.bias * (4 * channels + hidden)

    def share(self, devices: int, parallel: str) -> ShortConv:
        return replace(self, parts=devices)

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        channels = p.hidden // self.parts
        gate = p.move("conv_gate", part, channels, 2 * channels)
        yield from p.quantized("qkv", part, p.hidden)
        yield from p.weight(self, "conv_in", self.bias)
        yield gate
        yield convolution(p, channels, self.conv, self.bias)
        yield gate
        yield from p.output(self, self.bias)
