"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.errors import InputError
from simulator.models.pass_rows import OperatorRows, PassRows, Products, Shapes
from simulator.models.sublayers.base import Cut, Sublayer
from simulator.models.sublayers.indexer import Indexer


@dataclass(frozen=True, kw_only=True)
class LatentAttention(Sublayer):
    """One vector per position gives keys and values of all heads."""

    SIZES = ("heads",)
    DIVIDED = (("heads", "{} attention heads", "width heads={}"),)
    NAMED = (("heads", "heads"), ("KV heads", "heads"))
    LABEL = "latent attention"
    WHOLE = ("q_a", "kv_a", "q_b", "kv_b")

    heads: int
    query_rank: int  # rank of the queries; 0: one projection makes them
    rank: int  # rank of the cached vector
    rotary: int  # rotated features of a query head, and of the key that all heads share
    plain: int  # other features of a query or key head
    value: int  # features of a value head
    rotates_positions: bool = True
    window: int = 0  # positions that a query sees; 0: all
    topk: int = 0  # positions that a query attends to, as an indexer selects them; 0: all
    indexer: Indexer | None = None  # None: the selection is that of an earlier layer
    bias: bool = False  # bias of the projections to the ranks and of the output
    sinks: bool = False  # each head has a learned logit in addition to its keys
    key_norm: bool = False  # the key that all heads share has a norm
    second: bool = False  # another attention precedes it in its layer
    # gate of the outputs: from the residual stream per "head" or per "value" feature, or from the
    # "query" rank, normed and not, in one product with the queries
    gate: str = ""

    @property
    def shape(self) -> str:
        window = f", window {self.window:,}" if self.window else ""
        selected = f", {self.topk:,} positions selected" if self.topk else ""
        cached = f"a latent of {self.rank} + {self.rotary}"
        return f"{self.heads} heads of {self.head_dim} on {cached}{window}{selected}"

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

    def weights(self, hidden: int) -> Shapes:
        queries = self.heads * self.head_dim
        joint = self.gate == "query"
        made = {"q": (queries, hidden)}
        if self.query_rank:
            outputs = queries + joint * self.heads * self.value
            q_b = (outputs, (1 + joint) * self.query_rank)
            made = {"q_a": (self.query_rank, hidden), "q_b": q_b}
        return {
            **made,
            "kv_a": (self.cached, hidden),
            "kv_b": (self.heads * (self.plain + self.value), self.rank),
            "o": (hidden, self.heads * self.value),
        }

    def products(self, hidden: int) -> Products:
        gates = {"head_gate": (self.gates, hidden, 1)} if self.projects_gates else {}
        indexer = self.indexer.products(hidden) if self.indexer else {}
        return {**super().products(hidden), **gates, **indexer}

    @property
    def projects_gates(self) -> bool:
        return self.gate in ("head", "value")

    @property
    def gates(self) -> int:
        """Outputs of the projection of the residual stream that makes gates."""
        return {"head": self.heads, "value": self.heads * self.value}.get(self.gate, 0)

    @property
    def normed(self) -> int:
        """Features of the norms of the ranks."""
        return self.query_rank + self.rank + self.key_norm * self.rotary

    def other_parameters(self, hidden: int) -> int:
        biases = self.bias * (self.query_rank + self.cached + hidden)
        indexer = self.indexer.parameters(hidden) if self.indexer else 0
        others = self.gates * hidden + self.sinks * self.heads + indexer
        return biases + self.normed + others

    def narrower(self, cut: Cut) -> LatentAttention:
        if cut.shares["kv"] > 0:
            raise InputError(
                "sparsity of kv: latent attention has one vector for all heads; expected attention"
                " or heads"
            )
        return replace(self, heads=cut.kept("heads", cut.kept("attention", self.heads)))

    def rows(self, p: PassRows) -> OperatorRows:
        """Yield the operators. A copied cache has keys and values of every head, and a decode step
        computes those of its token.

        Kernels that attend to selected positions read the latent vector, in prompts too
        (deepseek-ai/FlashMLA, pull request 98); prompts of at most as many positions run as without
        selection (SGLang, pull request 11892). Without a paged cache (Transformers), positions that
        are not selected are masked, so attention computes them."""
        part = self.part
        hidden = p.hidden
        heads = self.heads
        whole = p.lowering.engine.cache != "paged"
        selects = 0 < self.topk < p.request.seq
        absorbs = (p.decodes or selects) and not whole
        inner = heads * self.value
        weights = self.weights(hidden)
        yield from p.quantized("qkv", part, hidden)
        if self.query_rank and p.fuses("qkv"):
            yield from p.product(self, "qkv_a", self.query_rank + self.cached, hidden, self.bias)
        else:
            first = ("q_a", self.bias) if self.query_rank else ("q", False)
            for role, bias in (first, ("kv_a", self.bias)):
                yield from p.weight(self, role, bias)
        yield p.move("latent_norm", part, self.normed, params=self.normed)
        if self.query_rank:
            yield p.gemm("q_b", part, *weights["q_b"])
        if absorbs:
            yield p.gemm("absorb_k", part, heads * self.rank, self.plain)
        else:
            yield p.gemm("kv_b", part, *weights["kv_b"])
        yield from p.rotary((heads + 1) * self.rotary * self.rotates_positions)
        elements = heads * (self.head_dim + self.value) if whole else self.cached
        yield p.cache_write(elements, heads, heads)
        if self.indexer:
            yield from self.indexer.rows(p, self.topk)
        sizes = {"kv_heads": heads, "head_dim": self.head_dim, "value_dim": self.value}
        if absorbs:
            sizes = {"kv_heads": 1, "head_dim": self.cached, "value_dim": self.rank}
        row = p.attend(
            heads, **sizes, latent=0 if whole else self.cached, k=self.topk * (not whole)
        )
        yield row | {"params": self.sinks * heads * p.owns, "stage": self.second}
        if absorbs:
            yield p.gemm("absorb_v", part, inner, self.rank)
        if self.projects_gates:
            yield p.gemm("head_gate", part, self.gates, hidden)
        if self.gate:
            yield p.move("output_gate", part, inner, 2 * inner)
        yield from p.output(self, self.bias)
