"""Lightning attention: linear attention with a fixed decay per head (arXiv 2401.04658, MiniMax-01,
arXiv 2501.08313)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from simulator.codes import Kind, Part
from simulator.models.pass_rows import OperatorRow, PassRows
from simulator.models.sublayers.base import SharedSize, Sublayer, remaining


@dataclass(frozen=True, kw_only=True)
class LightningAttention(Sublayer):
    """Each head has a state of key x value features; a norm and a gate follow."""

    LABEL: ClassVar[str] = "lightning attention"
    SIZES: ClassVar[tuple[str, ...]] = ("heads",)

    heads: int
    head_dim: int
    chunk: int  # tokens of a chunk

    @property
    def part(self) -> Part:
        return Part.ATTENTION

    @property
    def shape(self) -> str:
        return f"{self.heads} heads of {self.head_dim}"

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    def weights(self, hidden: int) -> Mapping[str, tuple[int, int]]:
        return {
            "qkv": (3 * self.inner, hidden),
            "head_gate": (self.inner, hidden),
            "o": (hidden, self.inner),
        }

    def parameters(self, hidden: int) -> int:
        weights = sum(self.stored(role, *shape) for role, shape in self.weights(hidden).items())
        return weights + self.inner

    def shared_sizes(self, parallel: str) -> tuple[SharedSize, ...]:
        return (SharedSize("{} attention heads", self.heads, "width attention={}"),)

    def share(self, devices: int, parallel: str) -> LightningAttention:
        return replace(self, heads=self.heads // devices)

    def sizes(self) -> Mapping[str, float]:
        return {"heads": self.heads}

    def narrower(
        self, shares: Mapping[str, float], align: int, inner: int | None
    ) -> LightningAttention:
        return replace(self, heads=remaining(self.heads, shares["attention"]))

    def rows(self, p: PassRows) -> Iterator[OperatorRow]:
        part, inner, stream = self.part, self.inner, p.lowering.stream_dtype
        yield from p.quantized("qkv", part, p.hidden)
        yield from p.product(self, "qkv", 3 * inner, p.hidden)
        yield p.move("activation", part, 3 * inner, 3 * inner, 3 * inner)
        yield {
            "kind": Kind.STATE_SPACE,
            "role": "lightning",
            "part": part,
            "m": p.tokens,
            "n": inner,
            "batch": p.batch,
            "heads": self.heads,
            "kv_heads": self.heads,
            "head_dim": self.head_dim,
            "value_dim": self.head_dim,
            "block": self.chunk,
            "dtype": stream,
            "weight_dtype": stream,
        }
        yield p.move("inner_norm", part, inner, inner, inner, inner)
        yield from p.product(self, "head_gate", inner, p.hidden)
        yield p.move("output_gate", part, inner, 2 * inner, inner)
        yield from p.quantized("o", part, inner)
        yield from p.product(self, "o", p.hidden, inner)
