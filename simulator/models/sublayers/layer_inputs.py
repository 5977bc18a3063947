"""Embeddings per layer (Gemma 3n and 4): every layer has a table of embeddings of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.codes import Part
from simulator.models.pass_rows import OperatorRows, PassRows, Shapes
from simulator.models.sublayers.base import Sublayer


@dataclass(frozen=True, kw_only=True)
class LayerInputs(Sublayer):
    """Product of the layer's input and a gate from the residual stream, projected back to it. The
    input is the sum of the token's embedding and of a projection of its usual embedding; all layers
    get their inputs before the first (:func:`simulator.models.lower.lower`)."""

    PART = Part.MLP
    LABEL = "embedding per layer"
    SHAPE = "{0.width} features"
    SIZES = ("width", "vocab")
    REDUCES = False

    width: int  # features of the input
    vocab: int  # rows of the table
    norms: tuple[bool, bool] | None = (False, True)

    def weights(self, hidden: int) -> Shapes:
        return {"layer_gate": (self.width, hidden), "layer_output": (hidden, self.width)}

    def parameters(self, hidden: int) -> int:
        return 2 * self.width * hidden + self.stored_outside(hidden)

    def stored_outside(self, hidden: int) -> int:
        """Return the parameters of the table and of the projection of the usual embedding."""
        return self.width * (hidden + self.vocab)

    def share(self, devices: int, parallel: str) -> LayerInputs:
        return replace(self, vocab=-(-self.vocab // devices))

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        hidden = p.hidden
        width = self.width
        yield p.gemm("layer_gate", part, width, hidden)
        yield p.move("activation", part, width, 2 * width)
        yield p.gemm("layer_output", part, hidden, width)
