"""Attention of Gemma 3n and 4: values are normed, and layers can share a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.models.pass_rows import OperatorRows, PassRows
from simulator.models.sublayers.attention import Attention


@dataclass(frozen=True, kw_only=True)
class SharedCacheAttention(Attention):
    """Attention whose last layers read the keys and values of an earlier layer."""

    reads_cache: bool = False  # of an earlier layer: it makes no keys and values
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
    def norm_weights(self) -> int:
        """Parameters of the norms of queries and keys; the norm of values has none."""
        return (2 - self.reads_cache) * self.head_dim

    def computed(self, p: PassRows) -> PassRows:
        """Return the pass with the tokens for which the layer is computed."""
        skips = self.skips_prompts and self.reads_cache and not p.decodes
        return replace(p, q_len=1) if skips and p.lowering.engine.cache == "joined" else p

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        hidden = p.hidden
        made = super().projected
        yield from p.quantized("qkv", part, hidden)
        if p.fuses("qkv"):
            # vLLM keeps one product of queries, keys and values in every layer (models/gemma4.py)
            row = p.gemm("qkv", part, sum(made.values()), hidden, self.form("q"))
            owned = (hidden + self.qkv_bias) * sum(self.projected.values())
            yield row | {"params": owned * p.owns}
        else:
            yield from p.products(self, "qkv", self.projected, hidden, self.qkv_bias, False)
        own = 0 if self.reads_cache else self.kv_heads
        normed = made["q"] + 2 * own * self.head_dim
        yield p.move("qk_norm", part, normed, params=self.norm_weights)
        yield from p.rotary((self.heads + own) * self.rotary)
        if not self.reads_cache:
            yield p.cache_write(made["k"] + made["v"], self.heads, self.kv_heads)
        role = {"role": "shared_attention"} if self.reads_cache else {}
        yield p.attend(self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim) | role
        yield from p.output(self, self.attended, self.o_bias)
