"""Gated delta net (arXiv 2412.06464), and Kimi's delta attention (arXiv 2510.26692)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.codes import Kind
from simulator.models.pass_rows import OperatorRows, PassRows, Products, Shapes
from simulator.models.sublayers.base import Cut, Sublayer


@dataclass(frozen=True, kw_only=True)
class DeltaNet(Sublayer):
    """A state of key x value features per value head instead of a cache.

    Projections make queries, keys and values, a gate of the outputs, the strength of the update and
    the decay of the state. In Kimi's delta attention every feature of a key has a decay."""

    SIZES = ("heads", "kv_heads")
    DIVIDED = (
        ("heads", "{} attention heads", "width heads={}"),
        ("kv_heads", "{} key/value heads", "width attention={}"),
    )
    COPIED = ("kv_heads",)
    NAMED = (("value heads", "heads"), ("key heads", "kv_heads"))
    LABEL = "gated delta net"
    SHAPE = "{0.heads} value heads of {0.value} on {0.kv_heads} key heads of {0.key}"
    WHOLE = ("delta_in", "delta_ba", "delta_rank", "delta_up")

    heads: int  # value heads
    kv_heads: int  # key heads
    key: int  # features of a query or key head
    value: int  # features of a value head
    conv: int  # positions of the causal convolution of queries, keys and values
    # projections that a checkpoint stores as one weight: "all" (two weights: queries to gate;
    # strength and decay), "qkv" (queries, keys and values), or "none"
    joint: str = "all"
    channel_decay: bool = False  # a decay per feature of a key
    rank: int = 0  # rank of the projections that make gate and decays; 0: one projection each

    @property
    def label(self) -> str:
        return "Kimi delta attention" if self.channel_decay else self.LABEL

    @property
    def keys(self) -> int:
        """Features of all keys."""
        return self.kv_heads * self.key

    @property
    def values(self) -> int:
        """Features of all values."""
        return self.heads * self.value

    @property
    def decays(self) -> int:
        return self.heads * self.key if self.channel_decay else self.heads

    @property
    def projected(self) -> dict[str, int]:
        """Outputs of the projections that read the residual stream."""
        made = {"q": self.keys, "k": self.keys, "v": self.values}
        if self.rank:
            return {**made, "strength": self.heads}
        return {**made, "gate": self.values, "strength": self.heads, "decay": self.decays}

    def _sum(self, *names: str) -> int:
        return sum(self.projected.get(name, 0) for name in names)

    def weights(self, hidden: int) -> Shapes:
        factors = {
            "delta_rank": (2 * self.rank, hidden),
            "delta_up": (self.values + self.decays, self.rank),
        }
        return {
            "delta_in": (self._sum("q", "k", "v", "gate"), hidden),
            "delta_ba": (self._sum("strength", "decay"), hidden),
            **(factors if self.rank else {}),
            "o": (hidden, self.values),
        }

    def products(self, hidden: int) -> Products:
        if self.joint == "all":
            return super().products(hidden)
        out = {role: (n, hidden, 1) for role, n in self.projected.items()}
        if self.joint == "qkv":
            out = {"qkv": (self._sum("q", "k", "v"), hidden, 1)} | out
            out = {role: product for role, product in out.items() if role not in ("q", "k", "v")}
        if self.rank:
            out |= {
                "delta_rank": (self.rank, hidden, 2),
                "gate_up": (self.values, self.rank, 1),
                "decay_up": (self.decays, self.rank, 1),
            }
        return {**out, "o": (hidden, self.values, 1)}

    @property
    def state_parameters(self) -> int:
        """Parameters of the convolution and of the decays."""
        return self.conv * (2 * self.keys + self.values) + self.heads + self.decays

    def other_parameters(self, hidden: int) -> int:
        return self.state_parameters + self.value

    def narrower(self, cut: Cut) -> DeltaNet:
        # a group is a key head with its value heads; the net has no query or KV heads alone
        groups = cut.kept("attention", self.kv_heads)
        return replace(self, heads=self.heads * groups // self.kv_heads, kv_heads=groups)

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        hidden = p.hidden
        values = self.values
        yield from p.quantized("qkv", part, hidden)
        if self.joint == "all" or p.fuses("qkv"):
            yield from p.weight(self, "delta_in")
            yield p.wide_gemm("delta_ba", part, *self.weights(hidden)["delta_ba"])
        else:
            made = self.products(hidden)
            for name in ("qkv", "q", "k", "v", "gate"):
                if name in made:
                    yield from p.product(self, "delta_in", *made[name][:2])
            for name in ("strength", "decay"):
                if name in made:
                    yield p.wide_gemm("delta_ba", part, *made[name][:2])
        if self.rank:
            for n in (self.decays, values):
                yield from p.product(self, "delta_rank", self.rank, hidden)
                yield from p.product(self, "delta_up", n, self.rank)
        yield p.recurrence(
            "kda" if self.channel_decay else "delta_net",
            self.heads,
            self.kv_heads,
            self.key,
            self.value,
            kind=Kind.DELTA_NET,
            params=self.state_parameters * p.owns,
            window=self.conv,
            kv_len=p.kept(self.conv),
        )
        yield p.move("gated_norm", part, values, 2 * values, values, self.value)
        yield from p.output(self)
