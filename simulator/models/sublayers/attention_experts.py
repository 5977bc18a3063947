"""Mixture of attention heads: experts make queries and outputs (JetMoE, arXiv 2404.07413)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.codes import Kind
from simulator.errors import InputError
from simulator.models.pass_rows import OperatorRows, PassRows, Products, Shapes
from simulator.models.sublayers.attention import Attention
from simulator.models.sublayers.base import Cut


@dataclass(frozen=True, kw_only=True)
class AttentionExperts(Attention):
    """Attention with a query head per key/value head and expert that a token uses. An expert has
    projections to its queries and from its outputs; all experts share keys and values."""

    SIZES = (*Attention.SIZES, "experts", "active")
    WHOLE = ("attention_experts",)

    experts: int
    active: int  # experts that a token uses

    @property
    def width(self) -> int:
        """Queries of an expert."""
        return self.kv_heads * self.head_dim

    def weights(self, hidden: int) -> Shapes:
        experts = {"attention_experts": (2 * self.experts * self.width, hidden)}
        return {**experts, "k": (self.width, hidden), "v": (self.width, hidden)}

    def products(self, hidden: int) -> Products:
        return {
            "router": (self.experts, hidden, 1),
            "expert_q": (self.width, hidden, self.experts),
            "k": (self.width, hidden, 1),
            "v": (self.width, hidden, 1),
            "expert_o": (hidden, self.width, self.experts),
        }

    def other_parameters(self, hidden: int) -> int:
        return (self.experts + self.o_bias) * hidden

    def narrower(self, cut: Cut) -> AttentionExperts:
        if cut.shares["heads"] > 0 or cut.shares["kv"] > 0:
            raise InputError(
                "sparsity of heads or kv: attention experts have a query head per KV head; expected"
                " attention"
            )
        groups = cut.kept("attention", self.kv_heads)
        return replace(self, heads=groups * self.active, kv_heads=groups)

    def inputs(self, p: PassRows) -> OperatorRows:
        """Yield the projections; both products of the experts are one row."""
        part = self.part
        hidden = p.hidden
        width = self.width
        yield p.wide_gemm("router", part, self.experts, hidden)
        owned = 2 * self.experts * width * hidden + self.o_bias * hidden
        yield p.gemm("attention_experts", part, width, hidden) | {
            "kind": Kind.EXPERTS,
            "experts": self.experts,
            "active": self.active,
            "skew": p.request.skew or 0.0,
            "params": owned * p.owns,
            "gated": False,
        }
        yield from p.products(self, "qkv", {"k": width, "v": width}, hidden, False, fuses=True)

    def written(self, p: PassRows) -> OperatorRows:
        return iter(())
