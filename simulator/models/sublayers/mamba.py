"""Mamba: a selective state space per channel (arXiv 2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.errors import InputError
from simulator.models.pass_rows import OperatorRows, PassRows, Products, Shapes
from simulator.models.sublayers.base import Cut, Sublayer, aligned
from simulator.models.sublayers.short_conv import convolution


@dataclass(frozen=True, kw_only=True)
class Mamba(Sublayer):
    """Every channel is a head with a state, which has a decay per element; step sizes, B and C
    depend on the input."""

    SIZES = ("channels", "state")
    DIVIDED = (("channels", "{} Mamba channels", "width mamba_heads={}"),)
    NAMED = (("Mamba heads", "channels"), ("Mamba state", "state"))
    LABEL = "Mamba"
    KIND = "mamba"
    SHAPE = "{0.channels:,} channels, state {0.state}"
    WHOLE = ("mamba_in", "mamba_x", "mamba_dt")

    channels: int
    state: int  # state features of a channel
    rank: int  # rank of the step sizes
    conv: int  # positions of the causal convolution of the channels
    conv_bias: bool = True
    bias: bool = False  # bias of the input and output projections
    # norms of step sizes, B and C: with weights ("rms"), without ("unit"), or none
    norm: str = ""
    heads: int = 1  # groups of channels with their own step sizes, B and C (Zamba)

    @property
    def selected(self) -> int:
        """Features of the step sizes, B and C."""
        return self.rank + 2 * self.state

    def weights(self, hidden: int) -> Shapes:
        return {
            "mamba_in": (2 * self.channels, hidden),
            "mamba_x": (self.selected, self.channels),
            "mamba_dt": (self.channels, self.rank),
            "o": (hidden, self.channels),
        }

    def products(self, hidden: int) -> Products:
        each = self.channels // self.heads
        several = {
            "mamba_x": (self.selected, each, self.heads),
            "mamba_dt": (each, self.rank, self.heads),
        }
        return {**super().products(hidden), **several}

    @property
    def state_parameters(self) -> int:
        """Parameters of decays, of the direct path of a channel, and biases of step sizes."""
        return self.channels * (self.state + 2)

    @property
    def norm_weights(self) -> int:
        return self.selected * (self.norm == "rms")

    def other_parameters(self, hidden: int) -> int:
        conv = self.channels * (self.conv + self.conv_bias)
        biases = self.bias * (2 * self.channels + hidden)
        return conv + self.state_parameters + self.norm_weights + biases

    def narrower(self, cut: Cut) -> Mamba:
        if cut.shares["mamba_channels"] > 0:
            raise InputError(
                "sparsity of mamba_channels: each head of Mamba has one channel; expected"
                " mamba_heads or mamba_state"
            )
        each = aligned(self.channels // self.heads, cut.shares["mamba_heads"], cut.align)
        state = cut.kept("mamba_state", self.state)
        return replace(self, channels=each * self.heads, state=state)

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        channels = self.channels
        each = self.channels // self.heads
        yield from p.quantized("qkv", part, p.hidden)
        yield from p.weight(self, "mamba_in", self.bias)
        yield convolution(p, channels, self.conv, self.conv_bias)
        for _ in range(self.heads):
            yield from p.product(self, "mamba_x", self.selected, each)
            # devices have sums over their channels
            yield from p.collective("all_reduce", part, p.tokens, self.selected)
        if self.norm:
            yield p.move("mamba_norm", part, self.selected, params=self.norm_weights)
        for _ in range(self.heads):
            yield from p.product(self, "mamba_dt", each, self.rank)
        owned = self.state_parameters * p.owns
        yield p.recurrence("mamba", channels, self.heads, self.state, 1, params=owned)
        yield from p.output(self, self.bias)
