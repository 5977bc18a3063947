"""Grouped-query attention (J. Ainslie et al., arXiv 2305.13245)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simulator.models.form import present
from simulator.models.pass_rows import OperatorRows, PassRows, Products, Shapes
from simulator.models.sublayers.base import Cut, SharedSize, Sublayer
from simulator.models.sublayers.indexer import Indexer


@dataclass(frozen=True, kw_only=True)
class Attention(Sublayer):
    """Grouped-query attention: query heads share the key/value heads."""

    LABEL = "attention"
    SIZES: ClassVar[tuple[str, ...]] = (
        "heads",
        "kv_heads",
        "head_dim",
        "rotary",
        "value_dim",
        "gates",
    )

    NAMED = (("heads", "heads"), ("KV heads", "kv_heads"))

    heads: int
    kv_heads: int
    head_dim: int  # features of a query or key head
    rotary: int = 0  # rotated features of a head
    window: int = 0  # positions that a query sees; 0: all
    # norm of queries and keys: one for every "head", over their "width" (or with weights of each
    # head), "layer" norms with biases for every head, "unit" without weights
    norm: str = ""
    value_dim: int = 0  # features of a value head; 0: as of a key head
    reads: int = 1  # hidden sizes that it reads; 2: the embedding too, after a norm of both (Zamba)
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False  # each head has a learned logit in addition to its keys
    gate: bool = False  # the query projection also makes a gate of the outputs
    gates: int = 0  # outputs of a further projection, which gates the outputs of the heads
    gate_bias: bool = False  # each head has a bias of its gates
    output_norm: bool = False  # a norm precedes the output projection
    softcap: bool = False  # scores are soft-capped
    topk: int = 0  # positions that a query attends to, as its indexer selects them; 0: all
    indexer: Indexer | None = None
    # two softmaxes, which share queries and keys, attend to half of the value heads each; their
    # difference is normed per pair of heads (DiffLlama, arXiv 2410.05258)
    two_softmaxes: bool = False
    masks: bool = False  # a projection of all cached values makes a mask per key head (Doge)
    # learned vectors scale queries and gates, and norms have no weights (nGPT, arXiv 2410.01131)
    channel_scales: bool = False

    @property
    def shape(self) -> str:
        window = f", window {self.window:,}" if self.window else ""
        return f"{self.heads} heads on {self.kv_heads} KV heads of {self.head_dim}{window}"

    @property
    def value_features(self) -> int:
        """Features of a value head."""
        return self.value_dim if present(self.value_dim) else self.head_dim

    @property
    def attended(self) -> int:
        """Features that the output projection reads."""
        return self.heads * self.value_features

    @property
    def cached_heads(self) -> int:
        """Key/value heads that it adds to the cache."""
        return self.kv_heads

    @property
    def normed(self) -> int:
        """Features of the norms of queries and keys."""
        return (self.heads + self.kv_heads) * self.head_dim

    @property
    def projected(self) -> dict[str, int]:
        """Outputs of the projections that read the residual stream."""
        keys = self.kv_heads * self.head_dim
        values = self.kv_heads * self.value_features
        return {"q": (1 + self.gate) * self.heads * self.head_dim, "k": keys, "v": values}

    def weights(self, hidden: int) -> Shapes:
        read = self.reads * hidden
        if self.stores("qkv"):
            inputs = {"qkv": (sum(self.projected.values()), read)}
        else:
            inputs = {role: (n, read) for role, n in self.projected.items()}
        gates = {"head_gate": (self.gates, hidden)} if present(self.gates) else {}
        return {**inputs, **gates, "o": (hidden, self.attended)}

    def products(self, hidden: int) -> Products:
        mask = {"mask_values": (self.kv_heads, self.kv_heads * self.value_features, 1)}
        indexer = self.indexer.products(hidden) if self.indexer else {}
        return {**super().products(hidden), **(mask if self.masks else {}), **indexer}

    def other_parameters(self, hidden: int) -> int:
        biases = self.qkv_bias * sum(self.projected.values()) + self.o_bias * hidden
        indexer = self.indexer.parameters(hidden) if self.indexer else 0
        norms = self.norm_weights + self.output_weights + (self.reads > 1) * self.reads * hidden
        return biases + norms + self.score_weights + self.mask_weights + indexer

    @property
    def score_weights(self) -> int:
        """Parameters of the heads: logits of sinks, biases of gates, and four vectors for the
        weight of the second softmax."""
        of_heads = (self.sinks + self.gate_bias) * self.heads
        return of_heads + self.two_softmaxes * 4 * self.head_dim

    @property
    def mask_weights(self) -> int:
        """Parameters of the mask: a projection, one factor and, with biases, one bias per key
        head."""
        features = self.kv_heads * self.value_features
        return self.masks * self.kv_heads * (features + 1 + self.qkv_bias)

    @property
    def norm_weights(self) -> int:
        """Parameters of the norms of queries and keys."""
        kinds = {"head": 2 * self.head_dim, "width": self.normed, "layer": 4 * self.head_dim}
        return kinds.get(self.norm, 0)

    @property
    def output_weights(self) -> int:
        """Parameters of the norm before the output projection, or of the vectors that scale queries
        and gates."""
        return (2 if self.channel_scales else self.output_norm) * self.attended

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
        gates = self.gates // devices
        return replace(self, heads=self.heads // devices, kv_heads=kv_heads, gates=gates)

    def narrower(self, cut: Cut) -> Attention:
        groups = cut.kept("attention", self.kv_heads)
        heads = cut.kept("heads", self.heads * groups // self.kv_heads)
        gates = self.gates * heads // self.heads
        return replace(self, heads=heads, kv_heads=cut.kept("kv", groups), gates=gates)

    def inputs(self, p: PassRows) -> OperatorRows:
        """Yield the projections of queries, keys and values."""
        read = self.reads * p.hidden
        if self.reads > 1:
            yield p.move("attention_norm", self.part, read, params=read)
        yield from p.quantized("qkv", self.part, read)
        yield from p.products(self, "qkv", self.projected, read, self.qkv_bias, p.fuses("qkv"))

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        attended = self.attended
        values = self.kv_heads * self.value_features
        yield from self.inputs(p)
        if self.norm and (self.norm != "unit" or present(self.rotary)):
            yield p.move("qk_norm", part, self.normed, params=self.norm_weights)
        yield from p.rotary((self.heads + self.cached_heads) * self.rotary)
        if present(self.cached_heads):
            cached = self.kv_heads * self.head_dim + values
            yield p.cache_write(cached, self.heads, self.kv_heads)
        if self.masks:  # Transformers projects the whole cache in each step
            row = p.wide_gemm("mask_values", part, self.kv_heads, values)
            yield row | {"params": self.mask_weights * p.owns, "m": p.batch * p.mean_positions}
        if self.indexer:
            yield from self.indexer.rows(p, self.topk)
        # without a paged cache (Transformers), other positions are masked and computed
        topk = self.topk if p.lowering.engine.cache == "paged" else 0
        row = p.attend(
            self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            k=topk,
            role="attention" if present(self.cached_heads) else "shared_attention",
        )
        yield row | {"params": self.score_weights * p.owns}
        if self.two_softmaxes:
            yield row
            yield p.move("inner_norm", part, attended, 2 * attended)
        if present(self.gates):
            yield p.gemm("head_gate", part, self.gates, p.hidden)
        if self.gate or present(self.gates):
            yield p.move("output_gate", part, attended, 2 * attended)
        if self.output_norm:
            yield p.move("inner_norm", part, attended, params=self.output_weights)
        yield from self.written(p)

    def written(self, p: PassRows) -> OperatorRows:
        """Yield the projection of the outputs."""
        yield from p.output(self, self.o_bias)
