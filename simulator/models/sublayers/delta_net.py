"""Gated delta net (arXiv 2412.06464)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from simulator.codes import Kind, Part
from simulator.models.pass_rows import STATE, OperatorRow, PassRows
from simulator.models.sublayers.base import SharedSize, Sublayer, remaining


@dataclass(frozen=True, kw_only=True)
class DeltaNet(Sublayer):
    """A state of key x value features per value head instead of a cache."""

    SIZES: ClassVar[tuple[str, ...]] = ("heads", "kv_heads")
    WHOLE: ClassVar[tuple[str, ...]] = ("delta_in", "delta_ba")

    heads: int  # value heads
    kv_heads: int  # key heads
    key: int  # features of a query or key head
    value: int  # features of a value head
    conv: int  # positions of the causal convolution of queries, keys and values

    @property
    def part(self) -> Part:
        return Part.ATTENTION

    @property
    def keys(self) -> int:
        """Features of all keys."""
        return self.kv_heads * self.key

    @property
    def values(self) -> int:
        """Features of all values."""
        return self.heads * self.value

    def weights(self, hidden: int) -> Mapping[str, tuple[int, int]]:
        return {
            "delta_in": (2 * self.keys + 2 * self.values, hidden),
            "delta_ba": (2 * self.heads, hidden),
            "o": (hidden, self.values),
        }

    @property
    def state_parameters(self) -> int:
        """Parameters of the convolution and of the decay of the heads."""
        return self.conv * (2 * self.keys + self.values) + 2 * self.heads

    def parameters(self, hidden: int) -> int:
        weights = sum(self.stored(role, *shape) for role, shape in self.weights(hidden).items())
        return weights + self.state_parameters + self.value

    def shared_sizes(self, parallel: str) -> tuple[SharedSize, ...]:
        return (
            SharedSize("{} attention heads", self.heads, "width heads={}"),
            SharedSize("{} key/value heads", self.kv_heads, "width attention={}", copies=True),
        )

    def share(self, devices: int, parallel: str) -> DeltaNet:
        kv_heads = max(self.kv_heads // devices, 1)
        return replace(self, heads=self.heads // devices, kv_heads=kv_heads)

    def narrower(self, shares: Mapping[str, float], align: int, inner: int | None) -> DeltaNet:
        # a group is a key head with its value heads; the net has no query or KV heads alone
        groups = remaining(self.kv_heads, shares["attention"])
        return replace(self, heads=self.heads * groups // self.kv_heads, kv_heads=groups)

    def rows(self, p: PassRows) -> Iterator[OperatorRow]:
        part, hidden, keys, values = self.part, p.hidden, self.keys, self.values
        yield from p.quantized("qkv", part, hidden)
        yield from p.product(self, "delta_in", 2 * keys + 2 * values, hidden)
        yield p.gemm("delta_ba", part, 2 * self.heads, hidden) | p.wide
        yield {
            "kind": Kind.DELTA_NET,
            "role": "delta_net",
            "part": part,
            "params": self.state_parameters * p.owns,
            "m": p.tokens,
            "n": values,
            "batch": p.batch,
            "window": self.conv,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.key,
            "value_dim": self.value,
            "dtype": p.lowering.stream_dtype,
            "weight_dtype": STATE,
        }
        yield p.move("gated_norm", part, values, 2 * values, values, self.value)
        yield from p.quantized("o", part, values)
        yield from p.product(self, "o", hidden, values)
