"""Read the keys of a model's ``config.json`` (:class:`Reader`) by the rules of its ``model_type``
(:data:`ARCHITECTURES`).

An architecture is an entry of the table. Rules that do not fit into the table are functions of the
reader and of the fields found so far.

Architecture searches state single layers as ``block_configs`` (:func:`read_block`). DeciLM (model
type ``nemotron-nas``) writes query heads per key/value head, ``n_heads_in_group``, and the MLP's
width as a multiple of the hidden size, ``ffn_mult``, which is rounded up to a multiple of 256.
NVIDIA ModelOpt (Puzzletron) writes ``num_key_value_heads``, ``intermediate_size``, and ``moe`` for
routed experts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from simulator.arguments import shown
from simulator.codes import Part
from simulator.errors import InputError, one_line
from simulator.models.model import Layer
from simulator.models.sublayers import Attention, DeltaNet, Experts, LatentAttention, Linear, Mlp
from simulator.models.sublayers.base import Sublayer

# values of keys by name: fields of the model and of its usual sublayers; "attentions" and "mlps"
# are the sublayers of each layer, if layers differ
ConfigFields = dict[str, Any]

# largest width, number of heads or vocabulary; products of these numbers do not overflow
MAX_VALUE = 10_000_000
# largest number of positions that a model may state; Llama-4-Scout states 10,485,760
MAX_POSITIONS = 1_000_000_000
MAX_LAYERS = 10_000  # largest number of decoder layers, which limits the size of tables per layer


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Reader:
    """Keys of a configuration, or of an object in it; errors name the source and the key."""

    data: Mapping[str, Any]
    source: str
    place: str = ""  # place of the object in the file
    # keys that were looked up, whether the object has them or not
    known: set[str] = field(default_factory=set, compare=False, repr=False)

    def raw(self, key: str) -> Any:
        """Return a value as it is, None if the key is missing."""
        self.known.add(key)
        return self.data.get(key)

    def fail(self, key: str, reason: str) -> InputError:
        return InputError(f"{self.source}: {self.place}{key}: {reason}")

    def value(self, key: str, default: Any, expected: str, right: Callable[[Any], bool]) -> Any:
        """Return a checked value; for null or a missing key the default, or an error without a
        default."""
        value = self.raw(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, f"missing; expected {expected}")
        if not right(value):
            raise self.fail(key, f"expected {expected}, got {shown(value)}")
        return value

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_VALUE
    ) -> int:
        expected = f"an integer from {low} to {high}"
        return int(
            self.value(
                key, default, expected, lambda x: _is_number(x) and low <= x <= high and x == int(x)
            )
        )

    def or_none(self, key: str, default: int | None = None) -> int:
        """Return a whole number, or 0 for null."""
        null = self.raw(key) is None and key in self.data
        return 0 if null else self.integer(key, default, low=0)

    def number(self, key: str, default: float | None, high: float) -> float:
        expected = f"a number from 0 to {high:g}"
        return float(self.value(key, default, expected, lambda x: _is_number(x) and 0 <= x <= high))

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.value(key, default, "true or false", lambda x: isinstance(x, bool)))

    def capped(self, key: str, absent: bool) -> bool:
        """Return whether a soft cap is set; null means no cap."""
        self.value(
            key, 1.0, "a positive number or null", lambda x: _is_number(x) and 0 < x < float("inf")
        )
        return self.data[key] is not None if key in self.data else absent

    def part(self, key: str) -> Reader:
        inside = self.value(key, None, "an object", lambda x: isinstance(x, Mapping))
        return Reader(inside, self.source, f"{self.place}{key}.")

    def names(self, key: str) -> list[str]:
        """Return a list of texts; an empty list without the key."""

        def right(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(name, str) for name in value)

        return list(self.value(key, [], "a list of names", right))

    def parts(self, key: str, many: int) -> list[Reader]:
        def right(value: Any) -> bool:
            return (
                isinstance(value, list)
                and len(value) == many
                and all(isinstance(item, Mapping) for item in value)
            )

        found = self.value(key, None, f"a list of {many} objects, one per layer", right)
        return [
            Reader(inside, self.source, f"{self.place}{key}[{i}].")
            for i, inside in enumerate(found)
        ]

    def numbers(self, key: str, default: list[int], layers: int) -> set[int]:
        def right(value: Any) -> bool:
            return isinstance(value, list) and all(
                isinstance(i, int) and 0 <= i < layers for i in value
            )

        return set(self.value(key, default, f"a list of layers from 0 to {layers - 1}", right))

    def rotary(self, key: str, default: float) -> float:
        """Return the rotated share of a head: from the key, or from ``rope_parameters``
        (transformers 5)."""
        inside = self.raw("rope_parameters")
        if key not in self.data and isinstance(inside, Mapping):
            return Reader(inside, self.source, f"{self.place}rope_parameters.").number(
                key, default, 1
            )
        return self.number(key, default, high=1)

    def layer_types(self, layers: int, known: tuple[str, ...]) -> list[str]:
        """Return the list ``layer_types``, one of ``known`` per layer; an empty list without the
        key."""
        types = self.raw("layer_types")
        if types is None:
            return []
        if (
            not isinstance(types, list)
            or len(types) != layers
            or any(t not in known for t in types)
        ):
            raise self.fail(
                "layer_types",
                f"expected a list of {layers} of {' or '.join(known)}, got {shown(types)}",
            )
        return types

    def windows(
        self, layers: int, default: int, windowed: Callable[[int], bool], used: bool = True
    ) -> tuple[int, ...]:
        """Return the window of each layer: from the list ``layer_types``, else by the rule
        ``windowed``.

        A ``sliding_window`` of null means no window; if the key is missing, the default is used.
        The key is ignored unless ``used``."""
        window = self.or_none("sliding_window", default) if used else 0
        types = self.layer_types(layers, ("full_attention", "sliding_attention"))
        if not types:
            return tuple(window if windowed(layer) else 0 for layer in range(layers))
        if "sliding_attention" in types and not window:
            raise self.fail(
                "sliding_window",
                "missing; expected an integer, as layer_types names sliding_attention",
            )
        return tuple(window if t == "sliding_attention" else 0 for t in types)


@dataclass(frozen=True)
class Architecture:
    """Keys of one architecture, with the defaults of its configuration class in transformers
    4.57."""

    positions: int  # max_position_embeddings
    flags: Mapping[str, tuple[str, bool]]  # field -> key and default
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that all its models share
    # default of num_key_value_heads; None: the query heads, also for null
    kv_heads: int | None = None
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    grouped: bool = True  # whether the keys num_key_value_heads and head_dim exist
    inner: str = "intermediate_size"  # key of the inner width; "": no such key
    window: int | None = None  # sliding_window; None: no such key
    windowed: Callable[[int], bool] = lambda layer: True  # layers with a window
    # key and default of the rotated share of a head; None: all of it
    rotary: tuple[str, float] | None = None
    # defaults of shape keys that published files omit
    absent: Mapping[str, int] = field(default_factory=dict)
    blocks: bool = False  # whether block_configs states the layers
    unused: tuple[str, ...] = ()  # keys that name sizes and have no effect
    more: Callable[[Reader, ConfigFields], ConfigFields] = lambda read, values: {}  # further rules

    def values(self, read: Reader) -> ConfigFields:
        hidden, heads = (
            read.integer("hidden_size"),
            read.integer("num_attention_heads", self.absent.get("heads")),
        )
        kv_heads, head_dim = heads, self.head_dim
        if self.grouped:
            missing = read.raw("num_key_value_heads") is None
            absent = self.kv_heads if missing and "num_key_value_heads" not in read.data else None
            kv_heads = read.integer("num_key_value_heads", absent or heads)
        if head_dim is None and (not self.grouped or read.raw("head_dim") is None):
            if hidden % heads:
                given = " (no head_dim is given)" if self.grouped else ""
                wrong = f"expected a divisor of hidden_size {hidden}{given}, got {heads}"
                raise read.fail("num_attention_heads", wrong)
            head_dim = hidden // heads
        else:
            head_dim = read.integer("head_dim", head_dim)
        layers = read.integer("num_hidden_layers", high=MAX_LAYERS)
        values = {
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "inner": read.integer(self.inner) if self.inner else 0,
            "layers": layers,
            "vocab": read.integer("vocab_size", self.absent.get("vocab")),
            "rotary_dim": int(head_dim * read.rotary(*self.rotary)) if self.rotary else head_dim,
            "windows": (
                (0,) * layers
                if self.window is None
                else read.windows(layers, self.window, self.windowed)
            ),
            **{name: read.flag(key, default) for name, (key, default) in self.flags.items()},
            "max_positions": read.integer(
                "max_position_embeddings", self.positions, high=MAX_POSITIONS
            ),
            **self.fixed,
        }
        values |= self.more(read, values)
        if heads % kv_heads:
            raise read.fail(
                "num_key_value_heads",
                f"expected a divisor of num_attention_heads {heads}, got {kv_heads}",
            )
        return values

    def model(self, read: Reader) -> dict[str, Any]:
        """Return the fields of :class:`simulator.Model` that the configuration states."""
        values = self.values(read)
        layers = _layers(values)
        if self.blocks or read.raw("block_configs") is not None:
            layers = _block_layers(read, values, layers)
        if read.raw("per_layer_config") is not None:
            layers = _overridden(self, read, layers)
        fields = {name: values[name] for name in _MODEL_FIELDS if name in values}
        stated = (key for key in ("per_layer_config", "block_configs") if read.raw(key) is not None)
        return fields | {"layers": tuple(layers), "layer_key": next(stated, "")}


_MODEL_FIELDS = (
    *("hidden", "vocab", "max_positions", "tied", "norm", "pre_norms", "post_norms"),
    *("final_norm", "learned_positions", "logit_softcap", "weight_dtype"),
)


def _attention(values: ConfigFields) -> Attention:
    """Return the usual attention, without a window."""
    flags = ("qkv_bias", "o_bias", "sinks")
    return Attention(
        heads=values["heads"],
        kv_heads=values["kv_heads"],
        head_dim=values["head_dim"],
        rotary=values["rotary_dim"],
        norm=values.get("qk_norm", ""),
        gate=values.get("output_gate", False),
        softcap=values.get("attention_softcap", False),
        **{name: values.get(name, False) for name in flags},
    )


def _mlp(values: ConfigFields) -> Mlp:
    flags = {"bias": values.get("mlp_bias", False), "down_bias": values.get("down_bias", False)}
    return Mlp(inner=values["inner"], gated=values.get("gated", True), **flags)


def _layers(values: ConfigFields) -> list[Layer]:
    many, parallel = values["layers"], values.get("parallel_residual", False)
    attentions: list[Sublayer] = values.get("attentions") or [_attention(values)] * many
    mlps: list[Sublayer] = values.get("mlps") or [_mlp(values)] * many
    known: dict[Any, Layer] = {}
    layers = []
    for attention, window, mlp in zip(attentions, values["windows"], mlps):
        key = (attention, window, mlp)
        if key not in known:
            if window and isinstance(attention, Attention | LatentAttention):
                attention = replace(attention, window=window)
            known[key] = Layer((attention, mlp), parallel)
        layers.append(known[key])
    return layers


def _routed(
    read: Reader,
    values: ConfigFields,
    count: str,
    width: int,
    shared: int,
    dense: Callable[[int], bool],
) -> ConfigFields:
    """Return the MLPs of layers with experts, whose number is the key ``count``; layers that are
    ``dense`` have an MLP."""
    experts = read.integer(count)
    routed = Experts(
        experts=experts,
        active=float(read.integer("num_experts_per_tok", high=experts)),
        inner=width,
        shared_inner=shared,
        shared_bias=values.get("mlp_bias", False),
        shared_gate=values.get("shared_gate", False) and shared > 0,
        router_bias=values.get("router_bias", False),
        bias=values.get("expert_bias", False),
    )
    plain = _mlp(values)
    mlps = [plain if dense(layer) else routed for layer in range(values["layers"])]
    return {"mlps": mlps}


def _local_experts(read: Reader, values: ConfigFields) -> ConfigFields:
    return _routed(read, values, "num_local_experts", values["inner"], 0, lambda layer: False)


def _gpt_oss(read: Reader, values: ConfigFields) -> ConfigFields:
    stored = read.raw("quantization_config")
    mxfp4 = isinstance(stored, Mapping) and stored.get("quant_method") == "mxfp4"
    return _local_experts(read, values) | {"weight_dtype": "mxfp4" if mxfp4 else ""}


def _qwen_layers(read: Reader, values: ConfigFields) -> ConfigFields:
    step, plain = (
        read.integer("decoder_sparse_step", 1),
        read.numbers("mlp_only_layers", [], values["layers"]),
    )
    shared = (
        read.integer("shared_expert_intermediate_size", low=0) if values.get("shared_gate") else 0
    )
    width, dense = read.integer("moe_intermediate_size"), lambda i: i in plain or (i + 1) % step > 0
    # Transformers 5 saves Qwen3's number of experts under another name
    count = "num_local_experts" if "num_local_experts" in read.data else "num_experts"
    return _routed(read, values, count, width, shared, dense)


def _qwen_experts(read: Reader, values: ConfigFields) -> ConfigFields:
    used, first = read.flag("use_sliding_window"), read.integer("max_window_layers", 28, low=0)
    every = not values.get("shared_gate")  # qwen2_moe: every other layer, up to max_window_layers
    windows = read.windows(
        values["layers"], 4096, lambda i: every or (i % 2 == 0 and i < first), used
    )
    return {"windows": windows} | _qwen_layers(read, values)


def _glm4_moe(read: Reader, values: ConfigFields) -> ConfigFields:
    width, start = (
        read.integer("moe_intermediate_size"),
        read.integer("first_k_dense_replace", 1, low=0),
    )
    wide = read.or_none("n_shared_experts", 1) * width
    layers = _routed(read, values, "n_routed_experts", width, wide, lambda i: i < start)
    return {"qk_norm": "head" if read.flag("use_qk_norm") else ""} | layers


def _qwen3_next(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers with a gated delta net, and layers with attention whose query projection also
    makes a gate."""
    key, value = (read.integer(f"linear_{name}_head_dim", 128) for name in ("key", "value"))
    heads = read.integer("linear_num_value_heads", 32)
    groups = read.integer("linear_num_key_heads", 16)
    if heads % groups:
        raise read.fail(
            "linear_num_key_heads",
            f"expected a divisor of linear_num_value_heads {heads}, got {groups}",
        )
    conv = read.integer("linear_conv_kernel_dim", 4)
    net = DeltaNet(heads=heads, kv_heads=groups, key=key, value=value, conv=conv)
    every = read.integer("full_attention_interval", 4)
    types = read.layer_types(values["layers"], ("full_attention", "linear_attention"))
    linear = [t == "linear_attention" for t in types] or [
        (i + 1) % every > 0 for i in range(values["layers"])
    ]
    attention = _attention(values)
    attentions = [net if is_linear else attention for is_linear in linear]
    return {"attentions": attentions} | _qwen_layers(read, values)


def _llama4(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers with experts or an MLP; their attention has rotary positions and chunks, or
    neither.

    A chunk of positions is timed as a sliding window, which is exact up to its length and computes
    more beyond."""
    layers, step = values["layers"], read.integer("interleave_moe_layer_step", 1)
    routed = read.numbers("moe_layers", list(range(step - 1, layers, step)), layers)
    read.raw("intermediate_size_mlp")  # layers with experts ignore it
    inner = read.integer("intermediate_size_mlp") if len(routed) < layers else 0
    width = values["inner"]
    fields = _routed(
        read,
        {**values, "inner": inner},
        "num_local_experts",
        width,
        width,
        lambda i: i not in routed,
    )
    rotary = _rotary_layers(read, layers)
    norm = "unit" if read.flag("use_qk_norm", True) else ""
    chunk = read.or_none("attention_chunk_size", 8192)
    types = read.layer_types(layers, ("full_attention", "chunked_attention"))
    chunked = [t == "chunked_attention" for t in types] or rotary
    windows = tuple(chunk if inside else 0 for inside in chunked)
    attentions = _rotated({**values, "qk_norm": norm}, rotary)
    return {"windows": windows, "qk_norm": norm, "attentions": attentions} | fields


def _rotated(values: ConfigFields, rotary: Sequence[bool]) -> list[Attention]:
    """Return the attention of each layer, with and without rotary positions."""
    attention = _attention(values)
    still = replace(attention, rotary=0)
    return [attention if turns else still for turns in rotary]


def _deepseek(shared: int, first: int) -> Callable[[Reader, ConfigFields], ConfigFields]:
    """Return the rule for latent attention and experts, with defaults of shared experts and first
    dense layers."""

    def more(read: Reader, values: ConfigFields) -> ConfigFields:
        if read.flag("attention_bias"):
            raise read.fail(
                "attention_bias",
                "expected false (biases of latent attention are not supported), got True",
            )
        rank, width = read.or_none("q_lora_rank", 1536), read.integer("moe_intermediate_size")
        rotary, plain, value = (
            read.integer(f"{name}_head_dim") for name in ("qk_rope", "qk_nope", "v")
        )
        latent = LatentAttention(
            heads=values["heads"],
            query_rank=rank,
            rank=read.integer("kv_lora_rank"),
            rotary=rotary,
            plain=plain,
            value=value,
        )
        start = read.integer("first_k_dense_replace", first, low=0)
        step = read.integer("moe_layer_freq", 1)
        wide = read.or_none("n_shared_experts", shared) * width
        mlps = _routed(
            read, values, "n_routed_experts", width, wide, lambda i: i < start or i % step > 0
        )
        return {"attentions": [latent] * values["layers"]} | mlps

    return more


EXPERT_KEYS = MappingProxyType(
    {
        "experts": "num_local_experts",
        "active": "num_experts_per_tok",
        "inner": "expert_intermediate_dim",
    }
)
"""Field of a layer -> key of ModelOpt in ``moe``."""

_UNSUPPORTED = {
    "mamba": "state-space layers are not supported",
    "llama4": "attention settings per layer are not supported",
    "sparsify": "sparsity per layer is not supported",
    "parallel_blocks": "parallel blocks are not supported",
}


def read_block(of: Reader, dense: Layer, attention: Sublayer | None, hidden: int) -> Layer:
    """Return a layer of ``block_configs`` (objects ``attention`` and ``ffn``): ``dense`` with other
    sizes. ``attention`` is that of a layer which lacks it."""
    mixing, mlp = of.part("attention"), of.part("ffn")
    for part in (of, mixing, mlp):
        for key, why in _UNSUPPORTED.items():
            if part.data.get(key) is not None:
                raise part.fail(key, f"expected null: {why}")
    layer = dense.with_part(
        "attention", _read_attention(mixing, dense.of("attention") or attention)
    )
    return layer.with_part("mlp", _read_mlp(mlp, dense.of("mlp"), hidden))


def _read_attention(of: Reader, dense: Sublayer | None) -> Sublayer | None:
    """Return the attention of an object: ``dense`` with its KV heads, a linear product, or none."""
    if of.flag("no_op"):
        return None
    if of.flag("replace_with_linear"):
        return Linear(replaces=Part.ATTENTION)
    if not isinstance(dense, Attention):
        raise of.fail("no_op", "expected true, as the dense layer has no such attention")
    heads = dense.heads
    groups, sized = (
        of.data.get(key) is not None for key in ("num_key_value_heads", "n_heads_in_group")
    )
    if not (groups or sized):
        raise of.fail(
            "n_heads_in_group", "missing; expected an integer, here or in num_key_value_heads"
        )
    size = of.integer("n_heads_in_group") if sized else 1
    kv_heads = of.integer("num_key_value_heads") if groups else heads // size
    if groups and heads % kv_heads:
        raise of.fail(
            "num_key_value_heads", f"expected a divisor of {heads} query heads, got {kv_heads}"
        )
    if sized and heads % size:
        raise of.fail(
            "n_heads_in_group", f"expected a divisor of num_attention_heads {heads}, got {size}"
        )
    if sized and kv_heads != heads // size:
        raise of.fail(
            "n_heads_in_group",
            f"expected {heads // kv_heads}, as num_key_value_heads, got {size}",
        )
    return replace(dense, kv_heads=kv_heads)


def _read_mlp(of: Reader, dense: Sublayer | None, hidden: int) -> Sublayer | None:
    """Return the MLP of an object: ``dense`` with its width or routed experts, a linear product, or
    none."""
    if of.flag("no_op"):
        return None
    if of.flag("replace_with_linear"):
        return Linear(replaces=Part.MLP)
    if isinstance(dense, Experts):
        return _read_experts(of, dense)
    if of.data.get("moe") is not None:
        raise of.fail("moe", "expected null, as the dense layer has no routed experts")
    plain = dense if isinstance(dense, Mlp) else Mlp(inner=1)
    if of.data.get("intermediate_size") is not None:
        return replace(plain, inner=of.integer("intermediate_size"))
    if of.data.get("ffn_mult") is None:
        raise of.fail("ffn_mult", "missing; expected a number, here or in intermediate_size")
    exact = int(2 * of.number("ffn_mult", None, high=1000) * hidden / 3)
    # DeciLM rounds up to a multiple of 256
    inner = -exact // 256 * -256
    return replace(plain, inner=inner) if inner else None


def _read_experts(of: Reader, dense: Experts) -> Experts:
    if of.data.get("moe") is None:
        raise of.fail("moe", "missing; expected an object, as the dense layer has routed experts")
    moe = of.part("moe")
    other = "expert_intermediate_size"
    width = other if other in moe.data else EXPERT_KEYS["inner"]
    experts = moe.integer(EXPERT_KEYS["experts"], dense.experts)
    active = moe.integer(EXPERT_KEYS["active"], min(int(dense.active), experts), high=experts)
    shared = dense.shared_inner
    if shared:  # ModelOpt writes a default width of shared experts for models without them
        shared = moe.integer("shared_expert_intermediate_dim", shared, low=0)
    return replace(
        dense,
        experts=experts,
        active=float(active),
        inner=moe.integer(width, dense.inner),
        shared_inner=shared,
        shared_gate=dense.shared_gate and shared > 0,
    )


def _block_layers(read: Reader, values: ConfigFields, layers: Sequence[Layer]) -> list[Layer]:
    """Return layers with the changes in ``block_configs``, by an architecture search (Puzzle, arXiv
    2411.19146).

    Any architecture may have them; ``nemotron-nas`` states the widths of its layers nowhere
    else."""
    if any(not isinstance(layer.of("attention"), Attention) for layer in layers):
        raise read.fail(
            "block_configs",
            "expected none: latent attention and delta nets per layer are not supported",
        )
    usual, out = _attention(values), []
    for part, dense in zip(read.parts("block_configs", len(layers)), layers):
        layer = read_block(part, dense, usual, values["hidden"])
        window = part.part("attention").integer("window_length", dense.window, low=0)
        attention = layer.of("attention")
        if isinstance(attention, Attention):
            layer = layer.with_part("attention", replace(attention, window=window))
        out.append(layer)
    return out


_SKIPPED = MappingProxyType(
    {"attention": "attention", "self_attn": "attention", "mlp": "mlp", "feed_forward": "mlp"}
)
"""Name of a skipped sublayer in ``per_layer_config`` -> part of the layer."""

_LAYER_NUMBER = re.compile(r"\d{1,5}", re.ASCII)  # Transformers writes leading zeros


def _overridden(kind: Architecture, read: Reader, layers: Sequence[Layer]) -> list[Layer]:
    """Return layers with the keys that ``per_layer_config`` of Transformers overrides (pull request
    45333): each such layer is the layer of a configuration with these keys."""
    place = "per_layer_config"
    stated = read.data[place]
    if not isinstance(stated, Mapping):
        raise read.fail(place, f"expected an object by layer numbers, got {shown(stated)}")
    common = {key: value for key, value in read.data.items() if key != place}
    whole = kind.model(Reader(common, read.source, read.place))
    out = list(layers)
    for text, overrides in stated.items():
        where = f"{place}.{one_line(str(text), 40)}"
        known = _LAYER_NUMBER.fullmatch(str(text)) is not None
        number = int(text) if known else len(layers)
        if number >= len(layers):
            raise read.fail(where, f"expected layer numbers from 0 to {len(layers) - 1}")
        if not isinstance(overrides, Mapping):
            raise read.fail(where, f"expected an object of keys, got {shown(overrides)}")
        changes = {key: value for key, value in overrides.items() if key != "skip"}
        inside = Reader({**common, **changes}, read.source, f"{read.place}{where}.")
        for key in ("block_configs", place):
            if key in changes:
                raise inside.fail(key, "expected none: it states several layers")
        fields = kind.model(inside)
        if unread := sorted(changes.keys() - inside.known - WITHOUT_EFFECT - {*kind.unused}):
            raise inside.fail(one_line(unread[0], 80), "is not understood")
        if different := [n for n in whole if n != "layers" and fields[n] != whole[n]]:
            raise inside.fail(different[0], "expected the value of all layers")
        if len(fields["layers"]) != len(layers):
            raise inside.fail("num_hidden_layers", "expected the value of all layers")
        layer = fields["layers"][number]
        for name in Reader(overrides, read.source, f"{read.place}{where}.").names("skip"):
            if name not in _SKIPPED:
                names = ", ".join(_SKIPPED)
                raise inside.fail("skip", f"{shown(name)} is unknown; expected some of {names}")
            layer = layer.without(_SKIPPED[name])
        out[number] = layer
    return out


WITHOUT_EFFECT: frozenset[str] = frozenset(
    [
        # of training and generation
        *("num_beam_groups", "num_labels", "encoder_no_repeat_ngram_size", "no_repeat_ngram_size"),
        # layers that predict further tokens, which are not timed
        *("num_nextn_predict_layers", "num_mtp_modules"),
        # groups of experts among which a router chooses
        *("n_group", "topk_group", "num_expert_group"),
        # sizes that follow from others
        *("qk_head_dim", "pad_head_dim_to_multiple_of", "chunk_size_feed_forward"),
    ]
)
"""Keys that name layers, heads or sizes and change no operator."""

_SIZED = frozenset(
    [
        *("layer", "layers", "head", "heads", "hidden", "intermediate", "ffn", "inner", "width"),
        *("widths", "dim", "dims", "size", "sizes", "expert", "experts", "block", "blocks"),
        *("channel", "channels", "pruned", "rank", "ranks", "skip", "depth"),
    ]
)
"""Parts of the names of keys that can change a layer."""

_CLOSE = 0.93  # ratio of difflib from which a key is a misspelt known key


def refuse_unknown(read: Reader, kind: Architecture) -> None:
    """Raise InputError for a key that could change a layer and was not read, or that is close to a
    key that was looked up. An ignored key would be a wrong answer."""
    for key, value in read.data.items():
        if key in read.known or key in WITHOUT_EFFECT or key in kind.unused:
            continue
        states_sizes = isinstance(value, int | list | Mapping) and not isinstance(value, bool)
        if value and states_sizes and _SIZED.intersection(str(key).lower().split("_")):
            raise read.fail(
                one_line(key, 80),
                f"is not understood, and it could change the layers (got {shown(value)}); remove"
                " it if it has no effect",
            )
        if value is not None and (near := difflib.get_close_matches(key, read.known, 1, _CLOSE)):
            raise read.fail(one_line(key, 80), f"is unknown; did you mean {near[0]}?")


def _rotary_layers(read: Reader, layers: int) -> list[bool]:
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


def _smollm3(read: Reader, values: ConfigFields) -> ConfigFields:
    layers, rotary = values["layers"], _rotary_layers(read, values["layers"])
    windows = read.windows(
        layers, 0, lambda layer: not rotary[layer], read.flag("use_sliding_window")
    )
    return {"windows": windows, "attentions": _rotated(values, rotary)}


def _qwen(read: Reader, values: ConfigFields) -> ConfigFields:
    used, first = read.flag("use_sliding_window"), read.integer("max_window_layers", 28, low=0)
    return {"windows": read.windows(values["layers"], 4096, lambda layer: layer >= first, used)}


def _gemma(read: Reader, values: ConfigFields, absent: bool = True) -> ConfigFields:
    caps = {
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    }
    return {name: read.capped(key, absent) for name, key in caps.items()}


def _gemma3(read: Reader, values: ConfigFields) -> ConfigFields:
    step = read.integer("sliding_window_pattern", read.integer("_sliding_window_pattern", 6))
    windows = read.windows(values["layers"], 4096, lambda layer: (layer + 1) % step > 0)
    return {"windows": windows} | _gemma(read, values, absent=False)


def _opt(read: Reader, values: ConfigFields) -> ConfigFields:
    hidden = values["hidden"]
    if read.integer("word_embed_proj_dim", hidden) != hidden:
        projected = "projected embeddings, as in OPT-350M, are not supported"
        raise read.fail("word_embed_proj_dim", f"expected hidden_size {hidden} ({projected})")
    return {
        # OPT's table starts with two rows of padding
        "learned_positions": values["max_positions"] + 2,
        "norm": "layer" if read.flag("layer_norm_elementwise_affine", True) else "none",
        "final_norm": values["final_norm"] and not read.flag("_remove_final_layer_norm"),
    }


_TIED, _UNTIED = {"tied": ("tie_word_embeddings", True)}, {"tied": ("tie_word_embeddings", False)}
_BIAS = {"qkv_bias": ("attention_bias", False), "o_bias": ("attention_bias", False)}
_GROUPED = ("num_key_value_heads", "head_dim")  # keys of grouped heads
_MLP_BIAS = {"mlp_bias": ("mlp_bias", False)}

_TABLE: Mapping[str, Architecture] = {
    "llama": Architecture(2048, {**_BIAS, **_UNTIED, **_MLP_BIAS}),
    "mistral": Architecture(131072, _UNTIED, kv_heads=8, window=4096),
    "qwen2": Architecture(32768, _UNTIED, {"qkv_bias": True}, kv_heads=32, more=_qwen),
    "qwen3": Architecture(
        32768, {**_BIAS, **_UNTIED}, {"qk_norm": "head"}, kv_heads=32, head_dim=128, more=_qwen
    ),
    "gemma": Architecture(8192, {**_BIAS, **_TIED}, kv_heads=16, head_dim=256),
    "gemma2": Architecture(
        8192,
        {**_BIAS, **_TIED},
        {"post_norms": True},
        kv_heads=4,
        head_dim=256,
        window=4096,
        windowed=lambda layer: layer % 2 == 0,
        more=_gemma,
    ),
    "gemma3_text": Architecture(
        131072,
        {**_BIAS, **_TIED},
        {"post_norms": True, "qk_norm": "head"},
        kv_heads=4,
        head_dim=256,
        absent={"heads": 8, "vocab": 262208},
        more=_gemma3,
    ),
    "phi3": Architecture(4096, _UNTIED, window=0, rotary=("partial_rotary_factor", 1.0)),
    "opt": Architecture(
        2048,
        {
            **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("enable_bias", True)),
            **_TIED,
            "final_norm": ("do_layer_norm_before", True),
        },
        {"gated": False, "rotary_dim": 0},
        grouped=False,
        inner="ffn_dim",
        more=_opt,
    ),
    "gpt_neox": Architecture(
        2048,
        {
            **dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True)),
            **_UNTIED,
            "parallel_residual": ("use_parallel_residual", True),
        },
        {"gated": False, "mlp_bias": True, "norm": "layer"},
        grouped=False,
        rotary=("rotary_pct", 0.25),
    ),
    "olmo2": Architecture(
        2048, {**_BIAS, **_UNTIED}, {"qk_norm": "width", "pre_norms": False, "post_norms": True}
    ),
    "granite": Architecture(2048, {**_BIAS, **_UNTIED, **_MLP_BIAS}),
    "smollm3": Architecture(32768, {**_BIAS, **_TIED, **_MLP_BIAS}, kv_heads=4, more=_smollm3),
    "nemotron": Architecture(
        4096,
        {**_BIAS, **_UNTIED, **_MLP_BIAS},
        {"gated": False, "norm": "layer"},
        rotary=("partial_rotary_factor", 0.5),
    ),
    "nemotron-nas": Architecture(
        2048,
        {**_BIAS, **_UNTIED, **_MLP_BIAS},
        inner="",
        blocks=True,
        unused=("intermediate_size",),
    ),
    "mixtral": Architecture(131072, _UNTIED, kv_heads=8, window=0, more=_local_experts),
    "qwen2_moe": Architecture(
        32768,
        {**_UNTIED, "qkv_bias": ("qkv_bias", True)},
        {"shared_gate": True},
        kv_heads=16,
        more=_qwen_experts,
    ),
    "qwen3_moe": Architecture(
        32768, {**_BIAS, **_UNTIED}, {"qk_norm": "head"}, kv_heads=4, more=_qwen_experts
    ),
    "gpt_oss": Architecture(
        131072,
        {**dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True)), **_UNTIED},
        {"sinks": True, "router_bias": True, "expert_bias": True},
        kv_heads=8,
        head_dim=64,
        window=128,
        windowed=lambda layer: layer % 2 == 0,
        more=_gpt_oss,
    ),
    # latent attention does not use the keys of grouped heads
    "deepseek_v2": Architecture(
        2048,
        _UNTIED,
        grouped=False,
        head_dim=64,
        unused=_GROUPED,
        more=_deepseek(shared=2, first=0),
    ),
    "deepseek_v3": Architecture(
        4096,
        _UNTIED,
        {"router_bias": True},
        grouped=False,
        head_dim=64,
        unused=_GROUPED,
        more=_deepseek(shared=1, first=3),
    ),
    "glm4_moe": Architecture(
        131072,
        {"qkv_bias": ("attention_bias", False), **_UNTIED},
        {"router_bias": True},
        kv_heads=8,
        rotary=("partial_rotary_factor", 0.5),
        more=_glm4_moe,
    ),
    "llama4_text": Architecture(
        131072, {**_BIAS, **_UNTIED}, kv_heads=8, head_dim=128, more=_llama4
    ),
    "qwen3_next": Architecture(
        32768,
        {**_BIAS, **_UNTIED},
        {"qk_norm": "head", "shared_gate": True, "output_gate": True},
        kv_heads=2,
        head_dim=256,
        rotary=("partial_rotary_factor", 0.25),
        more=_qwen3_next,
    ),
    "seed_oss": Architecture(
        524288,
        {
            "qkv_bias": ("attention_bias", True),
            "o_bias": ("attention_out_bias", False),
            **_UNTIED,
            **_MLP_BIAS,
        },
        kv_heads=8,
        head_dim=128,
    ),
}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        **_TABLE,
        # the same keys and shapes, with other defaults
        "glm4v_moe_text": replace(
            _TABLE["glm4_moe"],
            positions=65536,
            flags={"qkv_bias": ("attention_bias", True), **_UNTIED},
        ),
        "kimi_k2": _TABLE["deepseek_v3"],
        "ministral": _TABLE["mistral"],
        "ministral3": replace(_TABLE["mistral"], positions=262144, window=0),
        "olmo3": replace(
            _TABLE["olmo2"],
            positions=65536,
            window=4096,
            windowed=lambda layer: (layer + 1) % 4 > 0,
        ),
        "qwen2_vl_text": replace(_TABLE["qwen2"], kv_heads=8),
        "qwen2_5_vl_text": replace(_TABLE["qwen2"], kv_heads=8),
        "qwen3_vl_text": replace(_TABLE["qwen3"], positions=128000),
        "qwen3_vl_moe_text": replace(
            _TABLE["qwen3_moe"], positions=128000, flags={**_BIAS, **_TIED}, kv_heads=16
        ),
    }
)
"""Supported architectures by the ``model_type`` of their decoder."""

_TEXTS = ("gemma3", "glm4v_moe", "llama4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
NESTED: Mapping[str, str] = MappingProxyType(
    {"mistral3": "mistral"} | {name: f"{name}_text" for name in _TEXTS}
)
"""``model_type`` of models with further parts (vision) -> default architecture of their decoder,
``text_config``."""

# models whose older files have the decoder's keys at the top
FLAT: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl")
