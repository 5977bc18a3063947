"""Describe one decoder layer: its widths (:class:`Block`), latent attention and gated delta nets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Shapes of one decoder layer; a width of 0 means that the layer has no such sublayer."""

    heads: int  # query heads; of a gated delta net, value heads
    kv_heads: int  # of a gated delta net, key heads
    inner: int  # inner width of the MLP; with routed experts, of the shared experts
    experts: int = 0  # routed experts
    active: float = 0.0  # routed experts that a token uses, on one device on average
    expert_inner: int = 0
    rotary: bool = True  # queries and keys are rotated
    linear: tuple[str, ...] = ()  # sublayers ("attention", "mlp") that one hidden x hidden product replaces
    delta: bool = False  # a gated delta net instead of attention
    ranks: tuple[tuple[str, int], ...] = ()  # projections (roles) that are stored as two factors, and their ranks
    shortcuts: tuple[str, ...] = ()  # sublayers whose residual a hidden x hidden product rotates (SliceGPT)
    out: int = 0  # features after the layer; 0: the hidden size

    @property
    def sublayers(self) -> int:
        """Number of sublayers, attention and MLP, each with its norms."""
        return bool(self.heads or "attention" in self.linear) + bool(self.inner or self.experts or "mlp" in self.linear)

    def weights(self, role: str, n: int, k: int) -> int:
        """Return the weights of a projection of n outputs and k inputs, of both factors if it is stored as two."""
        rank = self.rank(role)
        return rank * (n + k) if rank else n * k

    def rank(self, role: str) -> int:
        """Return the rank of a projection that is stored as two factors, else 0."""
        return dict(self.ranks).get(role, 0)

    def roles(self, fused: str, parts: Mapping[str, int], fuses: bool = False) -> Mapping[str, int]:
        """Return the projections (role -> outputs) that compute ``parts``: each part, or all as ``fused``.

        An engine that ``fuses`` projections leaves those that are stored as factors as they are."""
        stored = {role for role, _ in self.ranks}
        if fused in stored or (fuses and not stored & parts.keys()):
            return {fused: sum(parts.values())}
        return parts


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one vector per position gives keys and values."""

    query_rank: int  # rank of the queries; 0: one projection makes them
    rank: int  # rank of the cached vector
    rotary: int  # rotated features of a query head, and of the key that all heads share
    plain: int  # other features of a query or key head
    value: int  # features of a value head

    @property
    def cached(self) -> int:
        """Elements per position in the cache."""
        return self.rank + self.rotary


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta net (arXiv 2412.06464): a state of key x value features per value head instead of a cache."""

    key: int  # features of a query or key head
    value: int  # features of a value head
    conv: int  # positions of the causal convolution of queries, keys and values

    def widths(self, block: Block) -> tuple[int, int]:
        """Return the features of all keys, and of all values, of a layer."""
        return block.kv_heads * self.key, block.heads * self.value
