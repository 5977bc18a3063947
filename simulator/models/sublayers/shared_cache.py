"""Attention of Gemma 3n and 4: values are normed, and layers can share a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.models.pass_rows import OperatorRows, PassRows
from simulator.models.sublayers.attention import Attention


@dataclass(frozen=True, kw_only=True)
class SharedCacheAttention(Attention):
    """Attention whose last layers read the keys and values of an earlier layer."""

    reads_cache: bool = False  # reads the cache of an earlier layer, makes no keys and values
    keys_are_values: bool = False  # one projection makes both
    # Transformers computes layers that read a cache for the last token of a prompt alone
    # (modeling_gemma4.py, _maybe_slice_kv_shared_inputs)
    skips_prompts: bool = False

    @property
    def shape(self) -> str:
        cache = ", on the cache of an earlier layer" if self.reads_cache else ""
        return super().shape + cache

    @property
    def projected(self) -> dict[str, int]:
        made = super().projected
        absent = ("k", "v") if self.reads_cache else ("v",) if self.keys_are_values else ()
        return {role: n for role, n in made.items() if role not in absent}

    @property
    def cached_heads(self) -> int:
        return 0 if self.reads_cache else self.kv_heads

    @property
    def normed(self) -> int:
        """Features of the norms of queries, keys and values."""
        return (self.heads + 2 * self.cached_heads) * self.head_dim

    @property
    def norm_weights(self) -> int:
        """Parameters of the norms of queries and keys; the norm of values has none."""
        return (2 - self.reads_cache) * self.head_dim

    def computed(self, p: PassRows) -> PassRows:
        """Return the pass with the tokens for which the layer is computed."""
        skips = self.skips_prompts and self.reads_cache and not p.decodes
        return replace(p, q_len=1) if skips and p.lowering.engine.cache == "joined" else p

    def inputs(self, p: PassRows) -> OperatorRows:
        if not p.fuses("qkv"):
            yield from super().inputs(p)
            return
        # vLLM keeps one product of queries, keys and values in every layer (models/gemma4.py)
        hidden = p.hidden
        yield from p.quantized("qkv", self.part, hidden)
        row = p.gemm("qkv", self.part, sum(super().projected.values()), hidden, self.form("q"))
        owned = (hidden + self.qkv_bias) * sum(self.projected.values())
        yield row | {"params": owned * p.owns}
