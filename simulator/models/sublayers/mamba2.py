"""Mamba-2: a state space with a decay per head (arXiv 2405.21060)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.models.pass_rows import OperatorRows, PassRows, Shapes
from simulator.models.sublayers.base import Cut, Sublayer
from simulator.models.sublayers.short_conv import convolution


@dataclass(frozen=True, kw_only=True)
class Mamba2(Sublayer):
    """One projection makes gate, x, B, C and step sizes; heads share B and C in groups."""

    SIZES = ("heads", "channels", "state", "groups")
    DIVIDED = (
        ("heads", "{} Mamba heads", "width mamba_heads={}"),
        ("groups", "{} Mamba groups", "width mamba_heads={}"),
    )
    COPIED = ("groups",)
    NAMED = (("Mamba heads", "heads"), ("Mamba channels", "channels"), ("Mamba state", "state"))
    LABEL = "Mamba-2"
    KIND = "mamba"
    SHAPE = "{0.heads} heads of {0.channels}, state {0.state}"
    WHOLE = ("mamba_in",)

    heads: int
    channels: int  # channels of a head
    state: int  # state features of a channel
    groups: int
    conv: int  # positions of the causal convolution of x, B and C
    chunk: int  # tokens of a chunk of the kernels
    conv_bias: bool = True
    bias: bool = False  # bias of the input and output projections
    norm: bool = True  # a gated norm precedes the output projection; else only the gate

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.channels

    @property
    def convolved(self) -> int:
        """Channels of x, B and C."""
        return self.inner + 2 * self.groups * self.state

    def weights(self, hidden: int) -> Shapes:
        inputs = self.inner + self.convolved + self.heads
        return {"mamba_in": (inputs, hidden), "o": (hidden, self.inner)}

    @property
    def state_parameters(self) -> int:
        """Parameters of decays, of the direct path, and biases of step sizes."""
        return 3 * self.heads

    def other_parameters(self, hidden: int) -> int:
        conv = self.convolved * (self.conv + self.conv_bias)
        biases = self.bias * (self.inner + self.convolved + self.heads + hidden)
        return conv + self.state_parameters + self.norm * self.inner + biases

    def narrower(self, cut: Cut) -> Mamba2:
        # groups keep equal numbers of heads (arXiv 2504.11409, section 3.1)
        heads = cut.kept("mamba_heads", self.heads // self.groups) * self.groups
        channels = cut.kept("mamba_channels", self.channels)
        state = cut.kept("mamba_state", self.state)
        return replace(self, heads=heads, channels=channels, state=state)

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        inner = self.inner
        yield from p.quantized("qkv", part, p.hidden)
        yield from p.weight(self, "mamba_in", self.bias)
        yield convolution(p, self.convolved, self.conv, self.conv_bias)
        sizes = self.heads, self.groups, self.state, self.channels
        owned = self.state_parameters * p.owns
        yield p.recurrence("mamba", *sizes, block=self.chunk, params=owned)
        role = "gated_norm" if self.norm else "output_gate"
        yield p.move(role, part, inner, 2 * inner, inner, self.norm * inner)
        yield from p.output(self, self.bias)
