"""Attention over a window and a compressed cache (DeepSeek-V4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.models.pass_rows import OperatorRows, PassRows, Products, Shapes
from simulator.models.sublayers.indexer import Compressor
from simulator.models.sublayers.latent import LatentAttention


@dataclass(frozen=True, kw_only=True)
class CompressedAttention(LatentAttention):
    """The cached vector is key and value of all heads. A query sees the positions of its window,
    and further entries, each of several positions: all, or the ``topk`` that an indexer selects.

    The projection of the outputs has two products; the first is one per group of heads."""

    groups: int  # groups of heads
    output_rank: int  # outputs of the first product of a group
    compressor: Compressor | None = None  # None: a query sees its window alone

    def weights(self, hidden: int) -> Shapes:
        outputs = self.groups * self.output_rank
        return {
            "q_a": (self.query_rank, hidden),
            "q_b": (self.heads * self.head_dim, self.query_rank),
            "kv_a": (self.cached, hidden),
            "o_a": (outputs, self.heads * self.value // self.groups),
            "o": (hidden, outputs),
        }

    def products(self, hidden: int) -> Products:
        entries = self.compressor.products(hidden) if self.compressor else {}
        return {**super().products(hidden), **entries}

    @property
    def normed(self) -> int:
        return self.query_rank + self.cached

    def other_parameters(self, hidden: int) -> int:
        entries = self.compressor.parameters(hidden) if self.compressor else 0
        return super().other_parameters(hidden) + entries

    def share(self, devices: int, parallel: str) -> CompressedAttention:
        return replace(self, heads=self.heads // devices, groups=max(self.groups // devices, 1))

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        hidden = p.hidden
        heads = self.heads
        weights = self.weights(hidden)
        queries = heads * self.head_dim
        paged = p.lowering.engine.cache == "paged"
        yield from p.quantized("qkv", part, hidden)
        for role in ("q_a", "kv_a"):
            yield p.gemm(role, part, *weights[role])
        yield p.move("latent_norm", part, self.normed, params=self.normed)
        yield p.gemm("q_b", part, *weights["q_b"])
        yield p.move("qk_norm", part, queries)
        yield from p.rotary((heads + 1) * self.rotary)
        yield p.cache_write(self.cached, heads, heads)
        ratio = 0
        if self.compressor:
            ratio = self.compressor.ratio
            yield from self.compressor.rows(p)
        if self.indexer:
            yield from self.indexer.rows(p, self.topk)
        row = p.attend(
            heads,
            kv_heads=1,
            head_dim=self.head_dim,
            value_dim=self.value,
            n=ratio,
            k=self.topk * paged,
            latent=self.cached,
        )
        yield row | {"params": self.sinks * heads * p.owns}
        yield from p.rotary(heads * self.rotary)  # values are rotated keys: rotated back
        yield from p.quantized("o", part, queries)
        yield p.gemm("o_a", part, *weights["o_a"])
        yield from p.weight(self, "o")
