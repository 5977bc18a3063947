"""The shapes of a decoder-only transformer, and what follows from them alone: :class:`ModelConfig`.

Made by :func:`simulator.load_model` from the name of a shipped model, from a Hugging Face ``config.json`` or from a
checkpoint. Layers that differ are :attr:`ModelConfig.blocks`; where all are alike there are none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from simulator.arguments import AMOUNT, number, shown, whole
from simulator.display import Displayed, facts_html
from simulator.errors import InputError, unknown
from simulator.workload import DTYPES


@dataclass(frozen=True)
class Block:
    """Shapes of one decoder layer. A width of 0: it has no such sublayer."""

    heads: int
    kv_heads: int
    inner: int  # width of the MLP; beside routed experts, of the shared ones
    experts: int = 0  # routed ones
    active: float = 0.0  # of them a token uses, on one device on average
    expert_inner: int = 0
    rotary: bool = True  # queries and keys are rotated
    linear: tuple[str, ...] = ()  # sublayers ("attention", "mlp") that are one hidden x hidden product instead

    @property
    def sublayers(self) -> int:
        """How many of attention and MLP it has, each with its norms."""
        return bool(self.heads or "attention" in self.linear) + bool(self.inner or self.experts or "mlp" in self.linear)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values come from one vector a position."""

    query_rank: int  # of the queries' own; 0: they are projected at once
    rank: int  # of the vector that is cached
    rotary: int  # features of a query, and of the one key that all heads share, that are rotated
    plain: int  # the other features of a query or key head
    value: int  # of a value head

    @property
    def cached(self) -> int:
        """Elements of a position in the cache."""
        return self.rank + self.rotary


MOST_WIDTH = 2**31 - 1

_COUNTS: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("hidden", "head_dim", "vocab", "max_positions"), 1)
    | dict.fromkeys(("layers", "heads", "kv_heads", "inner", "rotary_dim", "learned_positions"), 0)
    | dict.fromkeys(("experts", "expert_inner"), 0)
)
"""Fields that are whole numbers, and the least of each."""

_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"norm": ("rms", "layer", "none"), "qk_norm": ("", "head", "width"), "weight_dtype": ("", *DTYPES)}
)


@dataclass(frozen=True, repr=False)
class ModelConfig(Displayed):
    """The shapes of a decoder-only transformer.

    >>> import simulator
    >>> simulator.load_model("llama-2-7b").parameters
    6738415616
    """

    name: str
    architecture: str  # model_type of the configuration
    hidden: int
    layers: int
    heads: int  # this and the other widths of a layer: of the usual one, where they differ
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    vocab: int
    rotary_dim: int  # features of each head that are rotated, 0 for none
    max_positions: int
    windows: tuple[int, ...]  # sliding window of each layer in positions, 0 for full attention
    gated: bool = True  # gate, up, down; else up, down
    tied: bool = False  # the head shares the embedding's weights
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    down_bias: bool = False  # of an MLP that has no other
    qk_norm: str = ""  # RMS norm of queries and keys: "head" (of each head) or "width" (of all together)
    norm: str = "rms"  # "rms" (a weight), "layer" (a weight and a bias) or "none" (a layer norm without either)
    pre_norms: bool = True  # a norm before attention, and one before the MLP
    post_norms: bool = False  # a norm of the output of either
    final_norm: bool = True
    parallel_residual: bool = False  # attention and MLP both read the layer's input
    learned_positions: int = 0  # rows of a learned table of positions
    attention_softcap: bool = False  # inside the attention kernel
    logit_softcap: bool = False
    latent: Latent | None = None
    experts: int = 0  # routed ones of a layer
    active: float = 0.0  # of them a token uses
    expert_inner: int = 0
    router_bias: bool = False
    expert_bias: bool = False
    shared_gate: bool = False  # a scalar weighs the shared experts
    sinks: bool = False  # a learned logit a head beside its keys
    blocks: tuple[Block, ...] = ()  # each layer, where they differ
    weight_dtype: str = ""  # format that a checkpoint stores its projections in; "" where it follows the arithmetic
    sparse24: bool = False  # its projections are stored as 2:4
    numbers: tuple[int, ...] = field(default=(), compare=False)  # of the layers that a checkpoint holds
    found: str = field(default="", compare=False)  # how a checkpoint differs from its configuration, in one line

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            found = whole(getattr(self, name))
            if found is None or not least <= found <= MOST_WIDTH:
                expected = f"a whole number from {least} to {MOST_WIDTH}"
                raise InputError(f"{name}: expected {expected}, got {shown(getattr(self, name))}")
        number("active", self.active, AMOUNT)
        windows = self.windows
        if not isinstance(windows, tuple) or len(windows) != self.layers or any((whole(w) or 0) < 0 for w in windows):
            raise InputError(f"windows: expected a tuple of {self.layers} positions, one a layer, got {shown(windows)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)

    def _title(self) -> str:
        shapes = f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads on {self.kv_heads}, MLP {self.inner}"
        experts = f", {self.experts} experts" if self.experts else ""
        return f"{self.name} ({self.architecture}): {self.parameters:,} parameters, {shapes}{experts}"

    def _html(self) -> str:
        """What it has; of lists by layer none."""
        return facts_html({name: v for name, v in self.to_dict().items() if v and not isinstance(v, list)})

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain Python values, and the parameters that follow from them."""
        return super().to_dict() | {"parameters": self.parameters, "active_parameters": self.active_parameters}

    @cached_property
    def layout(self) -> tuple[Block, ...]:
        """Each layer."""
        own = Block(self.heads, self.kv_heads, self.inner, self.experts, self.active, self.expert_inner)
        return self.blocks or (own,) * self.layers

    @cached_property
    def runs(self) -> tuple[tuple[int, int, Block], ...]:
        """First layer, number of layers and shapes of each run of equal layers."""
        out, first = [], 0
        for block, same in itertools.groupby(self.layout):
            many = len(list(same))
            out.append((first, many, block))
            first += many
        return tuple(out)

    def each_block(self, change: Callable[[Block], Block]) -> ModelConfig:
        """The model with every layer, and the usual one, as ``change`` makes it of what it is."""
        own = change(Block(self.heads, self.kv_heads, self.inner, self.experts, self.active, self.expert_inner))
        names = ("heads", "kv_heads", "inner", "experts", "active", "expert_inner")
        widths = {name: getattr(own, name) for name in names}
        return replace(self, blocks=tuple(map(change, self.blocks)), **widths)

    @property
    def q_width(self) -> int:
        """Output features of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Output features of the key (and of the value) projection."""
        return self.kv_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm over the hidden size."""
        return self.hidden * {"rms": 1, "layer": 2, "none": 0}[self.norm]

    def attention_parameters(self, block: Block) -> int:
        """Parameters of the attention of a layer ``block``, its norms left out."""
        h, d, own = self.hidden, self.head_dim, self.latent
        if "attention" in block.linear:
            return h * h
        if not block.heads:
            return 0
        if own is not None:
            queries = h * block.heads * d
            if own.query_rank:
                queries = h * own.query_rank + own.query_rank + own.query_rank * block.heads * d
            keys = h * own.cached + own.rank + own.rank * block.heads * (own.plain + own.value)
            return queries + keys + block.heads * own.value * h
        q, kv = block.heads * d, block.kv_heads * d
        norms = {"": 0, "head": 2 * d, "width": q + kv}[self.qk_norm]
        return (h + self.qkv_bias) * (q + 2 * kv) + (q + self.o_bias) * h + norms + self.sinks * block.heads

    def mlp_parameters(self, block: Block) -> int:
        """Parameters of the MLP of a layer ``block``, routed experts included, its norms left out."""
        h, wide = self.hidden, 2 if self.gated else 1
        if "mlp" in block.linear:
            return h * h
        biases = self.mlp_bias * wide * block.inner + (self.mlp_bias or self.down_bias) * h
        dense = (wide + 1) * h * block.inner + (block.inner > 0) * biases
        if not block.experts:
            return dense
        router = (h + self.router_bias) * block.experts + (block.inner > 0) * self.shared_gate * h
        return dense + router + block.experts * self.expert_parameters(block)

    def expert_parameters(self, block: Block) -> int:
        """Parameters of one routed expert of a layer ``block``."""
        return 3 * self.hidden * block.expert_inner + self.expert_bias * (2 * block.expert_inner + self.hidden)

    def block_parameters(self, block: Block) -> int:
        """Parameters of one decoder layer ``block``."""
        norms = block.sublayers * (self.pre_norms + self.post_norms) * self.norm_parameters
        return self.attention_parameters(block) + self.mlp_parameters(block) + norms

    @property
    def layer_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return sum(many * self.block_parameters(block) for _, many, block in self.runs)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied weights counted once (exact)."""
        outside = (self.vocab + self.learned_positions) * self.hidden + self.final_norm * self.norm_parameters
        return self.layer_parameters + outside + (0 if self.tied else self.vocab * self.hidden)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets: all but those of the routed experts that it does not use.

        >>> import simulator
        >>> model = simulator.load_model("llama-2-7b")
        >>> model.active_parameters == model.parameters
        True
        """
        idle = (many * (b.experts - b.active) * self.expert_parameters(b) for _, many, b in self.runs if b.experts)
        return self.parameters - round(sum(idle))
