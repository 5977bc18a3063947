"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from simulator.codes import Part
from simulator.errors import InputError
from simulator.models.pass_rows import OperatorRow, PassRows
from simulator.models.sublayers.base import SharedSize, Sublayer, remaining


@dataclass(frozen=True, kw_only=True)
class LatentAttention(Sublayer):
    """One vector per position gives keys and values of all heads."""

    SIZES: ClassVar[tuple[str, ...]] = ("heads",)
    WHOLE: ClassVar[tuple[str, ...]] = ("q_a", "kv_a", "q_b", "kv_b")

    heads: int
    query_rank: int  # rank of the queries; 0: one projection makes them
    rank: int  # rank of the cached vector
    rotary: int  # rotated features of a query head, and of the key that all heads share
    plain: int  # other features of a query or key head
    value: int  # features of a value head
    rotates_positions: bool = True
    window: int = 0  # positions that a query sees; 0: all

    @property
    def part(self) -> Part:
        return Part.ATTENTION

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        """Features of a query or key head."""
        return self.plain + self.rotary

    @property
    def cached(self) -> int:
        """Elements of one position in the cache."""
        return self.rank + self.rotary

    def weights(self, hidden: int) -> Mapping[str, tuple[int, int]]:
        queries = self.heads * self.head_dim
        made = {"q": (queries, hidden)}
        if self.query_rank:
            made = {"q_a": (self.query_rank, hidden), "q_b": (queries, self.query_rank)}
        return {
            **made,
            "kv_a": (self.cached, hidden),
            "kv_b": (self.heads * (self.plain + self.value), self.rank),
            "o": (hidden, self.heads * self.value),
        }

    def parameters(self, hidden: int) -> int:
        weights = sum(self.stored(role, *shape) for role, shape in self.weights(hidden).items())
        return weights + self.query_rank + self.rank

    def shared_sizes(self, parallel: str) -> tuple[SharedSize, ...]:
        return (SharedSize("{} attention heads", self.heads, "width heads={}"),)

    def share(self, devices: int, parallel: str) -> LatentAttention:
        return replace(self, heads=self.heads // devices)

    def sizes(self) -> Mapping[str, float]:
        return {"heads": self.heads, "KV heads": self.heads}

    def narrower(
        self, shares: Mapping[str, float], align: int, inner: int | None
    ) -> LatentAttention:
        if shares["kv"] > 0:
            raise InputError(
                "sparsity of kv: latent attention has one vector for all heads; expected attention"
                " or heads"
            )
        heads = remaining(remaining(self.heads, shares["attention"]), shares["heads"])
        return replace(self, heads=heads)

    def rows(self, p: PassRows) -> Iterator[OperatorRow]:
        """Yield the operators. A copied cache has keys and values of every head, and a decode step
        computes those of its token."""
        part, hidden, heads = self.part, p.hidden, self.heads
        whole = p.lowering.engine.cache != "paged"
        absorbs = p.decodes and not whole
        queries, inner = heads * self.head_dim, heads * self.value
        yield from p.quantized("qkv", part, hidden)
        if not self.query_rank:
            yield from p.product(self, "q", queries, hidden)
        elif p.fuses("qkv"):
            yield p.gemm("qkv_a", part, self.query_rank + self.cached, hidden)
        else:
            yield p.gemm("q_a", part, self.query_rank, hidden)
        if not (self.query_rank and p.fuses("qkv")):
            yield p.gemm("kv_a", part, self.cached, hidden)
        normed = self.query_rank + self.rank
        yield p.move("latent_norm", part, normed, normed, normed, normed)
        if self.query_rank:
            yield p.gemm("q_b", part, queries, self.query_rank)
        if absorbs:
            yield p.gemm("absorb_k", part, heads * self.rank, self.plain)
        else:
            yield p.gemm("kv_b", part, heads * (self.plain + self.value), self.rank)
        yield from p.rotary((heads + 1) * self.rotary * self.rotates_positions)
        elements = heads * (self.head_dim + self.value) if whole else self.cached
        yield p.cache_write(elements, heads, heads)
        sizes = {"kv_heads": heads, "head_dim": self.head_dim, "value_dim": self.value}
        if absorbs:
            sizes = {"kv_heads": 1, "head_dim": self.cached, "value_dim": self.rank}
        yield p.attend(heads, **sizes, latent=0 if whole else self.cached)
        if absorbs:
            yield p.gemm("absorb_v", part, inner, self.rank)
        yield from p.quantized("o", part, inner)
        yield from p.product(self, "o", hidden, inner)
