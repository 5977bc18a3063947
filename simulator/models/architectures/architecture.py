"""Define an architecture: how the keys of a ``config.json`` state a model's layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simulator.models.architectures.reader import MAX_POSITIONS, ConfigFields, Reader
from simulator.models.model import Layer
from simulator.models.sublayers import Attention, Experts, LatentAttention, Mlp
from simulator.models.sublayers.base import Sublayer

Rule = Callable[[Reader], ConfigFields]
"""Returns fields from the keys of a configuration and from its usual fields."""


@dataclass(frozen=True)
class Architecture:
    """Keys of one architecture, with the defaults of its configuration class in transformers."""

    positions: int  # max_position_embeddings
    flags: Mapping[str, tuple[str, bool]]  # field -> key and default
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that all its models share
    # default of num_key_value_heads; None: the query heads, also for null
    kv_heads: int | None = None
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    divides: bool = True  # whether heads must divide the hidden size if no head_dim is given
    grouped: bool = True  # whether the keys num_key_value_heads and head_dim exist
    square: bool = False  # whether its class needs heads of hidden_size together
    inner: str = "intermediate_size"  # key of the inner width; "": no such key
    widening: int = 0  # inner width in hidden sizes, if the key is null or missing
    window: int | None = None  # sliding_window; None: no such key
    # period and offset of layers without a window; None: all layers have it
    full_attention: tuple[int, int] | None = None
    # key and default of the rotated share of a head; None: all of it
    rotary: tuple[str, float] | None = None
    rotary_dim: bool = False  # whether a key of this name states the rotated features of a head
    # rows of a learned table of positions beyond these; None: no such table
    learned: int | None = None
    keys: Mapping[str, str] = field(default_factory=dict)  # usual name of a key -> its own name
    # defaults of shape keys that published files omit
    absent: Mapping[str, int] = field(default_factory=dict)
    # field -> key and default of a flag, and values of the field with and without it
    choices: Mapping[str, tuple[str, bool, str, str]] = field(default_factory=dict)
    # field -> key of a soft cap, and whether there is a cap without the key
    caps: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    # experts: key of their number, whether their width is that of an MLP, keys and defaults of the
    # width of a shared MLP or of the number of shared experts, and default number of first layers
    # without experts
    experts: Mapping[str, Any] | None = None
    blocks: bool = False  # whether block_configs states the layers
    unused: tuple[str, ...] = ()  # keys that name sizes and have no effect
    many: Callable[[Reader], int] = lambda read: read.layers()  # number of layers
    more: Rule = lambda read: {}  # further rules

    def _windowed(self, layer: int) -> bool:
        return (
            self.full_attention is None
            or (layer + self.full_attention[1]) % self.full_attention[0] > 0
        )

    def _rotated(self, read: Reader, features: int) -> int:
        """Return the rotated features of a head."""
        share = read.rotary(*self.rotary) if self.rotary else 1.0
        rotated = int(features * share)
        return read.integer("rotary_dim", rotated, high=features) if self.rotary_dim else rotated

    def _stated(self, read: Reader) -> ConfigFields:
        """Return the fields that flags and soft caps state."""
        return {
            **{name: read.flag(key, default) for name, (key, default) in self.flags.items()},
            **{name: read.capped(key, absent) for name, (key, absent) in self.caps.items()},
            **{
                name: some if read.flag(key, default) else other
                for name, (key, default, some, other) in self.choices.items()
            },
        }

    def read(self, read: Reader) -> Reader:
        """Return the keys with their usual fields."""
        hidden = read.integer("hidden_size")
        heads = read.integer("num_attention_heads", self.absent.get("heads"))
        kv_heads = heads
        head_dim = self.head_dim
        if self.grouped:
            missing = read.raw("num_key_value_heads") is None
            absent = self.kv_heads if missing and not read.has("num_key_value_heads") else None
            kv_heads = read.integer("num_key_value_heads", absent or heads)
        if read.has("head_dim") and read.raw("head_dim") is None:
            head_dim = None
        if head_dim is None and (not self.grouped or read.raw("head_dim") is None):
            if hidden % heads and self.divides:
                given = " (no head_dim is given)" if self.grouped else ""
                wrong = f"expected a divisor of hidden_size {hidden}{given}, got {heads}"
                raise read.fail("num_attention_heads", wrong)
            head_dim = hidden // heads
        else:
            head_dim = read.integer("head_dim", head_dim)
        if self.square and heads * head_dim != hidden:
            needs = f"hidden_size {hidden} / num_attention_heads {heads}"
            raise read.fail("head_dim", f"expected {needs}, got {head_dim}")
        layers = self.many(read)
        positions = read.integer("max_position_embeddings", self.positions, high=MAX_POSITIONS)
        inner = self.widening * hidden
        read = read.with_fields(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            inner=read.integer(self.inner, inner or None) if self.inner else inner,
            layers=layers,
            vocab=read.integer("vocab_size", self.absent.get("vocab")),
            rotary_dim=self._rotated(read, head_dim),
            windows=(0,) * layers,
            max_positions=positions,
            learned_positions=0 if self.learned is None else positions + self.learned,
        )
        if self.window is not None:
            read = read.with_fields(windows=read.windows(self.window, self._windowed))
        read = read.with_fields(**self._stated(read), **self.fixed)
        if self.experts is not None:
            read = read.with_fields(**_stated_experts(read, **self.experts))
        read = read.with_fields(**self.more(read))
        read.divisor("num_key_value_heads", read["kv_heads"], heads, "num_attention_heads")
        return read


Table = Mapping[str, Architecture]
"""Architectures by the ``model_type`` of their decoder."""


def read_table(name: str, **rules: Mapping[str, Any]) -> Table:
    """Return the architectures in a file of this folder, with ``rules``: fields that are functions,
    by ``model_type``. An entry is new, or ``like`` another one except for its fields; ``note`` is a
    comment."""
    text = Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8")
    table: dict[str, Architecture] = {}
    for kind, stated in json.loads(text).items():
        stated |= {field: of[kind] for field, of in rules.items() if kind in of}
        stated.pop("note", None)
        like = stated.pop("like", None)
        table[kind] = replace(table[like], **stated) if like else Architecture(**stated)
    return table


def attention_of(read: Reader) -> Attention:
    """Return the usual attention, without a window."""
    flags = (
        "qkv_bias",
        "o_bias",
        "sinks",
        "output_norm",
        "two_softmaxes",
        "masks",
        "scales",
        "channel_scales",
        "gate_bias",
    )
    return Attention(
        heads=read["heads"],
        kv_heads=read["kv_heads"],
        head_dim=read["head_dim"],
        rotary=read["rotary_dim"],
        norm=read.get("qk_norm", ""),
        gate=read.get("output_gate"),
        gates=read.get("gated_features") * read["heads"] * read["head_dim"],
        softcap=read.get("attention_softcap"),
        **{name: read.get(name) for name in flags},
    )


def mlp_of(read: Reader) -> Mlp:
    flags = ("down_bias", "inner_norm", "joins", "scales", "channel_scales")
    return Mlp(
        inner=read["inner"],
        gated=read.get("gated", True),
        bias=read.get("mlp_bias"),
        scalars=read.get("scalars", 0),
        **{name: read.get(name) for name in flags},
    )


def layers_of(read: Reader) -> list[Layer]:
    if sublayers := read.get("sublayers"):
        return [Layer(tuple(some)) for some in sublayers]
    many = read["layers"]
    parallel = read.get("parallel_residual")
    attentions: list[Sublayer] = read.get("attentions") or [attention_of(read)] * many
    mlps: list[Sublayer] = read.get("mlps") or [mlp_of(read)] * many
    after_attention, after_mlp = read.get("others", ((), ()))
    known: dict[Any, Layer] = {}
    layers = []
    still = read.get("still_without_window")  # whether only layers with a window have positions
    for attention, window, mlp in zip(attentions, read["windows"], mlps):
        key = (attention, window, mlp)
        if key not in known:
            if window and isinstance(attention, Attention | LatentAttention):
                attention = replace(attention, window=window)
            if still and not window and isinstance(attention, Attention):
                attention = replace(attention, rotary=0)
            known[key] = Layer((attention, *after_attention, mlp, *after_mlp), parallel)
        layers.append(known[key])
    return layers


def routed(
    read: Reader,
    count: str,
    width: int = 0,
    shared: int = 0,
    dense: Callable[[int], bool] = lambda layer: False,
    copies: int = 0,
    **others: Any,
) -> ConfigFields:
    """Return the MLPs of layers with experts, whose number is the key ``count``; layers that are
    ``dense`` have an MLP. ``width`` is that of an expert (0: the key moe_intermediate_size),
    ``shared`` that of shared experts, or of so many ``copies`` of an expert. ``others`` are further
    fields of the experts."""
    width = width or read.integer("moe_intermediate_size")
    shared = shared or copies * width
    experts = read.integer(count)
    usual = read.get("active", None)
    active = read.integers("num_experts_per_tok", usual, high=experts)
    routed = Experts(
        experts=experts,
        active=0.0,
        inner=width,
        **others,
        shared_inner=shared,
        shared_bias=read.get("mlp_bias"),
        shared_gate=read.get("shared_gate") and shared > 0,
        router_bias=read.get("router_bias"),
        bias=read.get("expert_bias"),
    )
    plain = mlp_of(read)
    by_active = {many: replace(routed, active=float(many)) for many in set(active)}
    mlps = [plain if dense(layer) else by_active[many] for layer, many in enumerate(active)]
    return {"mlps": mlps}


def _stated_experts(
    read: Reader,
    count: str,
    as_mlp: bool = False,
    shared: tuple[str, int] | None = None,
    copies: tuple[str, int] | None = None,
    first: int | None = None,
) -> ConfigFields:
    """Return the MLPs of layers with experts, as a table states them."""
    return routed(
        read,
        count,
        read["inner"] if as_mlp else 0,
        read.integer(*shared, low=0) if shared else 0,
        (lambda layer: False) if first is None else dense_layers(read, first),
        read.or_none(*copies) if copies else 0,
    )


def dense_layers(read: Reader, first: int) -> Callable[[int], bool]:
    """Return which layers have no experts: as a list states, else the first ones, whose number has
    the default ``first``, and those between one of so many."""
    start = read.integer("first_k_dense_replace", first, low=0)
    sparse = read.flags("moe_layer_freq")
    if not sparse:
        step = read.integer("moe_layer_freq", 1)
        sparse = [i >= start and i % step == 0 for i in range(read["layers"])]
    sparse = read.of_kind("sparse", "dense", sparse.__getitem__, "mlp_layer_types")
    return lambda layer: not sparse[layer]


def except_every(number: int) -> Callable[[int], bool]:
    """Return the rule for all layers except every ``number``-th."""
    return lambda layer: (layer + 1) % number > 0


def windowed_rotary(
    read: Reader, windows: Sequence[int], rotary: Sequence[int] = ()
) -> ConfigFields:
    """Return layers with these windows; those with a window, or as ``rotary`` states, have rotary
    positions."""
    return {"windows": windows, "attentions": rotated(read, [*map(bool, rotary or windows)])}


def rotated(read: Reader, rotary: Sequence[bool]) -> list[Attention]:
    """Return the attention of each layer, with and without rotary positions."""
    attention = attention_of(read)
    still = replace(attention, rotary=0)
    return [attention if turns else still for turns in rotary]


def rotary_layers(read: Reader) -> list[bool]:
    layers = read["layers"]
    step = read.integer("no_rope_layer_interval", 4)
    usual = [(layer + 1) % step > 0 for layer in range(layers)]

    def right(value: Any) -> bool:
        return (
            isinstance(value, list)
            and (not value or len(value) >= layers)
            and all(f in (0, 1) for f in value)
        )

    given = read.value("no_rope_layers", [], f"a list of {layers} of 0 or 1", right)
    return [bool(flag) for flag in (given or usual)[:layers]]
