"""Grouped-query attention (J. Ainslie et al., arXiv 2305.13245)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from simulator.codes import Part
from simulator.models.form import present
from simulator.models.pass_rows import OperatorRow, PassRows
from simulator.models.sublayers.base import SharedSize, Sublayer, remaining


@dataclass(frozen=True, kw_only=True)
class Attention(Sublayer):
    """Grouped-query attention: query heads share the key/value heads."""

    SIZES: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim", "rotary")

    heads: int
    kv_heads: int
    head_dim: int  # features of a query or key head
    rotary: int = 0  # rotated features of a head
    window: int = 0  # positions that a query sees; 0: all
    norm: str = ""  # of queries and keys: per "head", over their "width", "unit" without weights
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False  # each head has a learned logit in addition to its keys
    gate: bool = False  # the query projection also makes a gate of the outputs
    softcap: bool = False  # scores are soft-capped

    @property
    def part(self) -> Part:
        return Part.ATTENTION

    @property
    def projected(self) -> dict[str, int]:
        """Outputs of the projections that read the residual stream."""
        keys = self.kv_heads * self.head_dim
        return {"q": (1 + self.gate) * self.heads * self.head_dim, "k": keys, "v": keys}

    def weights(self, hidden: int) -> Mapping[str, tuple[int, int]]:
        queries = self.heads * self.head_dim
        if self.stores("qkv"):
            inputs = {"qkv": (sum(self.projected.values()), hidden)}
        else:
            inputs = {role: (n, hidden) for role, n in self.projected.items()}
        return {**inputs, "o": (hidden, queries)}

    def parameters(self, hidden: int) -> int:
        weights = sum(self.stored(role, *shape) for role, shape in self.weights(hidden).items())
        biases = self.qkv_bias * sum(self.projected.values()) + self.o_bias * hidden
        return weights + biases + self.norm_weights + self.sinks * self.heads

    @property
    def norm_weights(self) -> int:
        """Parameters of the norms of queries and keys."""
        width = (self.heads + self.kv_heads) * self.head_dim
        return {"head": 2 * self.head_dim, "width": width}.get(self.norm, 0)

    def shared_sizes(self, parallel: str) -> tuple[SharedSize, ...]:
        # without groups, a query head goes with its key/value head
        prune = "width attention={}" if self.heads == self.kv_heads else "width heads={}"
        return (
            SharedSize("{} attention heads", self.heads, prune),
            SharedSize("{} key/value heads", self.kv_heads, "width kv={}", copies=True),
        )

    def share(self, devices: int, parallel: str) -> Attention:
        # devices beyond the number of key/value heads hold copies of them
        kv_heads = max(self.kv_heads // devices, 1)
        return replace(self, heads=self.heads // devices, kv_heads=kv_heads)

    def sizes(self) -> Mapping[str, float]:
        return {"heads": self.heads, "KV heads": self.kv_heads}

    def narrower(self, shares: Mapping[str, float], align: int, inner: int | None) -> Attention:
        groups = remaining(self.kv_heads, shares["attention"])
        heads = remaining(self.heads * groups // self.kv_heads, shares["heads"])
        return replace(self, heads=heads, kv_heads=remaining(groups, shares["kv"]))

    def rows(self, p: PassRows) -> Iterator[OperatorRow]:
        part, hidden, features = self.part, p.hidden, self.head_dim
        queries, keys = self.heads * features, self.kv_heads * features
        yield from p.quantized("qkv", part, hidden)
        yield from p.products(
            self, "qkv", self.projected, hidden, self.qkv_bias, fuses=p.fuses("qkv")
        )
        if self.norm and (self.norm != "unit" or present(self.rotary)):
            width = queries + keys
            yield p.move("qk_norm", part, width, width, width, self.norm_weights)
        yield from p.rotary((self.heads + self.kv_heads) * self.rotary)
        yield p.cache_write(2 * keys, self.heads, self.kv_heads)
        row = p.attend(self.heads, kv_heads=self.kv_heads, head_dim=features)
        yield row | {"params": self.sinks * self.heads * p.owns}
        if self.gate:
            yield p.move("output_gate", part, queries, 2 * queries, queries)
        yield from p.quantized("o", part, queries)
        yield from p.product(self, "o", hidden, queries, self.o_bias)
