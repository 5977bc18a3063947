"""Compressed convolutional attention (ZAYA, arXiv 2510.04476)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.models.pass_rows import OperatorRows, PassRows, Products
from simulator.models.sublayers.attention import Attention
from simulator.models.sublayers.short_conv import convolution


@dataclass(frozen=True, kw_only=True)
class ConvolvedAttention(Attention):
    """Attention whose queries and keys pass two causal convolutions: one of each channel, one of
    the channels of each head. Half of the values are those of the token before."""

    channel_kernel: int  # positions of the convolution of each channel
    head_kernel: int  # positions of the convolution of each head

    @property
    def channels(self) -> int:
        return (self.heads + self.kv_heads) * self.head_dim

    def products(self, hidden: int) -> Products:
        n, k, _ = super().products(hidden)["v"]
        heads = {"grouped_conv": (self.channels, self.head_kernel * self.head_dim, 1)}
        return {**super().products(hidden), "v": (n // 2, k, 2), **heads}

    def other_parameters(self, hidden: int) -> int:
        return super().other_parameters(hidden) + self.convolutions + self.kv_heads

    @property
    def convolutions(self) -> int:
        """Parameters of both convolutions, which have biases."""
        weights = self.channel_kernel + self.head_kernel * self.head_dim
        return self.channels * (weights + 2)

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        channels = self.channels
        inputs = self.head_kernel * self.head_dim
        kept = self.channel_kernel + self.head_kernel - 2  # positions before both convolutions
        yield convolution(p, channels, self.channel_kernel, bias=True) | {"kv_len": kept}
        heads = p.wide_gemm("grouped_conv", part, channels, inputs)
        yield heads | {"params": heads["params"] + (channels + self.kv_heads) * p.owns}
        # mean of queries and keys, which is added to the convolved
        yield p.move("residual", part, channels, 2 * channels)
        # values of the token before; another stage, as a layer has one state per role and stage
        values = convolution(p, self.kv_heads * self.head_dim // 2, 0)
        yield values | {"window": 1, "kv_len": 1, "stage": 1}
        yield from super().rows(p)
