"""The MLP of a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.codes import Part
from simulator.models.form import present
from simulator.models.pass_rows import OperatorRows, PassRows, Shapes
from simulator.models.sublayers.base import Cut, Sublayer


@dataclass(frozen=True, kw_only=True)
class Mlp(Sublayer):
    """Gate, up and down projections, or up and down."""

    PART = Part.MLP
    LABEL = "MLP"
    SIZES = ("inner", "out")
    DIVIDED = (("inner", "an MLP width of {}", "width mlp={}"),)
    NAMED = (("inner width", "inner"),)

    inner: int
    gated: bool = True
    bias: bool = False  # bias of all projections
    down_bias: bool = False  # bias of the down projection alone
    inner_norm: bool = False  # a norm precedes the down projection
    # learned vectors scale the gate and up projections, and norms have no weights (nGPT)
    channel_scales: bool = False
    scalars: int = 0  # learned numbers of the activation (two of xIELU, arXiv 2411.13010)
    out: int = 0  # features that it writes, in the last layer of SliceGPT; 0: the hidden size

    @property
    def shape(self) -> str:
        return f"{'gated' if self.gated else 'plain'}, width {self.inner:,}"

    @property
    def projected(self) -> dict[str, int]:
        """Outputs of the projections that read the residual stream."""
        return {"gate": self.inner, "up": self.inner} if self.gated else {"up": self.inner}

    def outputs(self, hidden: int) -> int:
        return self.out if present(self.out) else hidden

    def weights(self, hidden: int) -> Shapes:
        if self.stores("gate_up"):
            inputs = {"gate_up": (sum(self.projected.values()), hidden)}
        else:
            inputs = {role: (n, hidden) for role, n in self.projected.items()}
        return {**inputs, "down": (self.outputs(hidden), self.inner)}

    def other_parameters(self, hidden: int) -> int:
        biases = self.bias * sum(self.projected.values())
        biases += (self.bias or self.down_bias) * self.outputs(hidden)
        return biases + self.inner_weights + self.scalars

    @property
    def inner_weights(self) -> int:
        """Parameters of the norm before the down projection, or of the vectors that scale the
        others."""
        return (2 if self.channel_scales else self.inner_norm) * self.inner

    def narrower(self, cut: Cut) -> Mlp:
        return replace(self, inner=cut.width(self.inner, cut.inner))

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        hidden = p.hidden
        inner = self.inner
        yield from p.quantized("gate_up", part, hidden)
        fuses = self.gated and p.fuses("gate_up")
        yield from p.products(self, "gate_up", self.projected, hidden, self.bias, fuses)
        read = (2 if self.gated else 1) * inner
        yield p.move("activation", part, inner, read, inner, self.scalars)
        if self.inner_norm:
            yield p.move("inner_norm", part, inner, params=self.inner_weights)
        yield from p.quantized("down", part, inner)
        bias = self.bias or self.down_bias
        yield from p.weight(self, "down", bias)
