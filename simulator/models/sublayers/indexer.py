"""Indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556), a part of attention that selects
the positions to which each query attends."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.codes import Kind, Part, dtype_code
from simulator.models.pass_rows import OperatorRows, PassRows, Products, elements

_FP8 = dtype_code("fp8")


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """Entries of a compressed cache (DeepSeek-V4): weighted means of the keys of some positions."""

    ratio: int  # positions per entry
    features: int  # features of an entry
    series: int = 1  # 2: an entry also covers the positions of the entry before it

    def products(self, hidden: int) -> Products:
        """Return the products of keys and of their weights."""
        return {"compress": (self.series * self.features, hidden, 2)}

    @property
    def own(self) -> int:
        """Parameters of positions and of the norm of entries."""
        return (self.ratio * self.series + 1) * self.features

    def parameters(self, hidden: int) -> int:
        return elements(self.products(hidden)) + self.own

    def rows(self, p: PassRows) -> OperatorRows:
        """Yield the products as one, as engines fuse them, and the weighted mean."""
        width = 2 * self.series * self.features
        yield p.wide_gemm("compress", Part.ATTENTION, width, p.hidden)
        entry = self.features / self.ratio
        yield p.move("compressed", Part.ATTENTION, width, width, entry, self.own)


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Small heads whose scores of all cached keys select some of them. Every one of several devices
    computes all heads (vLLM: ReplicatedLinear)."""

    heads: int
    features: int  # features of a query or key
    rank: int = 0  # rank of the queries that it reads; 0: it reads the residual stream
    weighs: bool = True  # a further product makes the weights of the heads
    joint: bool = False  # one product makes queries and key
    ratio: int = 1  # positions per scored key
    compressor: Compressor | None = None  # makes and caches the scored keys

    def products(self, hidden: int) -> Products:
        """Return outputs and inputs of all linear products, and how many there are, by role."""
        queries = self.heads + self.joint
        out = {"index_q": (queries * self.features, self.rank or hidden, 1)}
        if self.compressor is not None:
            made = self.compressor.products(hidden)
            out |= {f"index_{role}": product for role, product in made.items()}
        elif not self.joint:
            out["index_k"] = (self.features, hidden, 1)
        return out | ({"index_weights": (self.heads, hidden, 1)} if self.weighs else {})

    @property
    def own(self) -> int:
        """Parameters of norms: of queries and key, or weight and bias for the key."""
        return self.compressor.own if self.compressor is not None else 2 * self.features

    def parameters(self, hidden: int) -> int:
        return elements(self.products(hidden)) + self.own

    @property
    def cached(self) -> int:
        """Elements per position in its cache."""
        return self.features if self.compressor is None else self.features // self.ratio

    def rows(self, p: PassRows, topk: int) -> OperatorRows:
        """Yield its products, the norm and rotation of queries and key, and the selection of
        ``topk`` keys per query. Weights of heads stay in 16 bits. Paged caches store keys as fp8
        (vLLM), others in the format of activations."""
        part = Part.ATTENTION
        products = self.products(p.hidden)
        made = (self.heads + 1) * self.features
        for role in ("index_q", "index_k", "index_weights"):
            if role in products:
                row = p.gemm(role, part, *products[role][:2])
                yield row | p.wide if role == "index_weights" else row
        if self.compressor is not None:
            yield from self.compressor.rows(p)
        owned = 0 if self.compressor is not None else self.own
        yield p.move("index_norm", part, made, params=owned)
        paged = p.lowering.engine.cache == "paged"
        row = p.kernel(
            Kind.INDEXER,
            "indexer",
            part,
            heads=self.heads,
            head_dim=self.features,
            batch=p.batch,
            q_len=p.q_len,
            k=topk,
            n=self.ratio,
            latent=self.cached,
        )
        yield row | ({"weight_dtype": _FP8} if paged else {})
