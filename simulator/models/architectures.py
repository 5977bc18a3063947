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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError
from simulator.models.config import Block, DeltaNet, Latent, layer_fields

ConfigFields = dict[str, Any]  # fields of simulator.ModelConfig

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

    def fail(self, key: str, reason: str) -> InputError:
        return InputError(f"{self.source}: {self.place}{key}: {reason}")

    def value(self, key: str, default: Any, expected: str, right: Callable[[Any], bool]) -> Any:
        """Return a checked value; for null or a missing key the default, or an error without a
        default."""
        value = self.data.get(key)
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
        null = key in self.data and self.data[key] is None
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
        inside = self.data.get("rope_parameters")
        if key not in self.data and isinstance(inside, Mapping):
            return Reader(inside, self.source, f"{self.place}rope_parameters.").number(
                key, default, 1
            )
        return self.number(key, default, high=1)

    def layer_types(self, layers: int, known: tuple[str, ...]) -> list[str]:
        """Return the list ``layer_types``, one of ``known`` per layer; an empty list without the
        key."""
        types = self.data.get("layer_types")
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
    more: Callable[[Reader, ConfigFields], ConfigFields] = lambda read, values: {}  # further rules

    def values(self, read: Reader) -> ConfigFields:
        hidden, heads = (
            read.integer("hidden_size"),
            read.integer("num_attention_heads", self.absent.get("heads")),
        )
        kv_heads, head_dim = heads, self.head_dim
        if self.grouped:
            absent = self.kv_heads if "num_key_value_heads" not in read.data else None
            kv_heads = read.integer("num_key_value_heads", absent or heads)
        if head_dim is None and (not self.grouped or read.data.get("head_dim") is None):
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
        if read.data.get("block_configs") is not None and self.more is not _per_layer:
            values |= _per_layer(read, values)
        if heads % kv_heads:
            raise read.fail(
                "num_key_value_heads",
                f"expected a divisor of num_attention_heads {heads}, got {kv_heads}",
            )
        return values


def _each(fields: ConfigFields, layers: int) -> tuple[Block, ...]:
    """Return each layer, from the fields that :func:`layer_fields` returns or from those of a layer
    without experts."""
    names = ("heads", "kv_heads", "inner", "experts", "active", "expert_inner")
    return fields.get("blocks") or (Block(*(fields.get(name, 0) for name in names)),) * layers


def _routed(
    read: Reader,
    values: ConfigFields,
    count: str,
    width: int,
    shared: int,
    dense: Callable[[int], bool],
) -> ConfigFields:
    """Return the fields of layers with experts, whose number is the key ``count``; layers that are
    ``dense`` have an MLP."""
    experts = read.integer(count)
    active, heads = (
        float(read.integer("num_experts_per_tok", high=experts)),
        (values["heads"], values["kv_heads"]),
    )
    plain, block = Block(*heads, values["inner"]), Block(*heads, shared, experts, active, width)
    return layer_fields([plain if dense(layer) else block for layer in range(values["layers"])])


def _local_experts(read: Reader, values: ConfigFields) -> ConfigFields:
    return _routed(read, values, "num_local_experts", values["inner"], 0, lambda layer: False)


def _gpt_oss(read: Reader, values: ConfigFields) -> ConfigFields:
    stored = read.data.get("quantization_config")
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
    return _routed(read, values, "num_experts", width, shared, dense)


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
    own = DeltaNet(key, value, conv=read.integer("linear_conv_kernel_dim", 4))
    many, groups = (
        read.integer("linear_num_value_heads", 32),
        read.integer("linear_num_key_heads", 16),
    )
    if many % groups:
        raise read.fail(
            "linear_num_key_heads",
            f"expected a divisor of linear_num_value_heads {many}, got {groups}",
        )
    every = read.integer("full_attention_interval", 4)
    types = read.layer_types(values["layers"], ("full_attention", "linear_attention"))
    linear = [t == "linear_attention" for t in types] or [
        (i + 1) % every > 0 for i in range(values["layers"])
    ]
    plain = _each(_qwen_layers(read, values), values["layers"])
    blocks = [
        replace(b, heads=many, kv_heads=groups, delta=True) if d else b
        for b, d in zip(plain, linear)
    ]
    return layer_fields(blocks) | {"delta": own if any(linear) else None}


def _llama4(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers with experts or an MLP; their attention has rotary positions and chunks, or
    neither.

    A chunk of positions is timed as a sliding window, which is exact up to its length and computes
    more beyond."""
    layers, step = values["layers"], read.integer("interleave_moe_layer_step", 1)
    routed = read.numbers("moe_layers", list(range(step - 1, layers, step)), layers)
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
    blocks = [replace(b, rotary=turns) for b, turns in zip(_each(fields, layers), rotary)]
    chunk = read.or_none("attention_chunk_size", 8192)
    types = read.layer_types(layers, ("full_attention", "chunked_attention"))
    chunked = [t == "chunked_attention" for t in types] or rotary
    windows = tuple(chunk if inside else 0 for inside in chunked)
    return {
        "windows": windows,
        "qk_norm": "unit" if read.flag("use_qk_norm", True) else "",
    } | layer_fields(blocks)


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
        heads = (read.integer(f"{name}_head_dim") for name in ("qk_rope", "qk_nope", "v"))
        latent = Latent(rank, read.integer("kv_lora_rank"), *heads)
        start, step = (
            read.integer("first_k_dense_replace", first, low=0),
            read.integer("moe_layer_freq", 1),
        )
        wide = read.or_none("n_shared_experts", shared) * width
        layers = _routed(
            read, values, "n_routed_experts", width, wide, lambda i: i < start or i % step > 0
        )
        return {
            "latent": latent,
            "head_dim": latent.plain + latent.rotary,
            "rotary_dim": latent.rotary,
        } | layers

    return more


EXPERT_KEYS = MappingProxyType(
    {
        "experts": "num_local_experts",
        "active": "num_experts_per_tok",
        "expert_inner": "expert_intermediate_dim",
    }
)
"""Field of a layer -> key of ModelOpt in ``moe``."""

_UNSUPPORTED = {
    "mamba": "state-space layers are not supported",
    "llama4": "attention settings per layer are not supported",
    "sparsify": "sparsity per layer is not supported",
    "parallel_blocks": "parallel blocks are not supported",
}


def read_block(of: Reader, dense: Block, hidden: int) -> Block:
    """Return a layer of ``block_configs`` (objects ``attention`` and ``ffn``): ``dense`` with other
    sizes."""
    attention, mlp = of.part("attention"), of.part("ffn")
    for part in (of, attention, mlp):
        for key, why in _UNSUPPORTED.items():
            if part.data.get(key) is not None:
                raise part.fail(key, f"expected null: {why}")
    return _read_mlp(mlp, _read_attention(attention, dense), hidden)


def _read_attention(of: Reader, dense: Block) -> Block:
    """Return the layer ``dense`` with the attention of an object: its KV heads, a linear product,
    or none."""
    other = tuple(name for name in dense.linear if name != "attention")
    gone = replace(dense, heads=0, kv_heads=0, delta=False, linear=other)
    if of.flag("no_op"):
        return gone
    if of.flag("replace_with_linear"):
        return replace(gone, linear=("attention", *other))
    if dense.delta or not dense.heads:
        raise of.fail("no_op", "expected true, as the dense layer has no such attention")
    groups, own = (
        of.data.get(key) is not None for key in ("num_key_value_heads", "n_heads_in_group")
    )
    if not (groups or own):
        raise of.fail(
            "n_heads_in_group", "missing; expected an integer, here or in num_key_value_heads"
        )
    many = (
        of.integer("num_key_value_heads")
        if groups
        else dense.heads // of.integer("n_heads_in_group")
    )
    if groups and dense.heads % many:
        raise of.fail(
            "num_key_value_heads", f"expected a divisor of {dense.heads} query heads, got {many}"
        )
    if own:
        size = of.integer("n_heads_in_group")
        if dense.heads % size:
            raise of.fail(
                "n_heads_in_group",
                f"expected a divisor of num_attention_heads {dense.heads}, got {size}",
            )
        if many != dense.heads // size:
            raise of.fail(
                "n_heads_in_group",
                f"expected {dense.heads // many}, as num_key_value_heads, got {size}",
            )
    return replace(dense, kv_heads=many, linear=other)


def _read_mlp(of: Reader, dense: Block, hidden: int) -> Block:
    """Return the layer ``dense`` with the MLP of an object: its width, routed experts, a linear
    product, or none."""
    other = tuple(name for name in dense.linear if name != "mlp")
    gone = replace(dense, inner=0, experts=0, active=0.0, expert_inner=0, linear=other)
    if of.flag("no_op"):
        return gone
    if of.flag("replace_with_linear"):
        return replace(gone, linear=(*other, "mlp"))
    if of.data.get("moe") is not None:
        if not dense.experts:
            raise of.fail("moe", "expected null, as the dense layer has no routed experts")
        moe = of.part("moe")
        width = (
            "expert_intermediate_size"
            if "expert_intermediate_size" in moe.data
            else EXPERT_KEYS["expert_inner"]
        )
        experts = moe.integer(EXPERT_KEYS["experts"], dense.experts)
        active = moe.integer(EXPERT_KEYS["active"], min(int(dense.active), experts), high=experts)
        # ModelOpt writes a default width of shared experts for models without them
        shared = (
            moe.integer("shared_expert_intermediate_dim", dense.inner, low=0) if dense.inner else 0
        )
        inner = moe.integer(width, dense.expert_inner)
        return replace(
            dense,
            inner=shared,
            experts=experts,
            active=float(active),
            expert_inner=inner,
            linear=other,
        )
    if dense.experts:
        raise of.fail("moe", "missing; expected an object, as the dense layer has routed experts")
    if of.data.get("intermediate_size") is not None:
        return replace(dense, inner=of.integer("intermediate_size"), linear=other)
    if of.data.get("ffn_mult") is None:
        raise of.fail("ffn_mult", "missing; expected a number, here or in intermediate_size")
    exact = int(2 * of.number("ffn_mult", None, high=1000) * hidden / 3)
    # DeciLM rounds up to a multiple of 256
    return replace(dense, inner=-exact // 256 * -256, linear=other)


def _per_layer(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers with the changes in ``block_configs``, by an architecture search (Puzzle, arXiv
    2411.19146).

    Any architecture may have them; ``nemotron-nas`` states the widths of its layers nowhere
    else."""
    layers = values["layers"]
    if values.get("latent") or values.get("delta"):
        raise read.fail(
            "block_configs",
            "expected none: latent attention and delta nets per layer are not supported",
        )
    parts, blocks, windows = read.parts("block_configs", layers), [], []
    for part, old, window in zip(parts, _each(values, layers), values["windows"]):
        # the query heads of a layer without attention are those of the model
        blocks.append(
            read_block(part, replace(old, heads=old.heads or values["heads"]), values["hidden"])
        )
        windows.append(part.part("attention").integer("window_length", window, low=0))
    return {"windows": tuple(windows)} | layer_fields(blocks)


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
    widths = (values["heads"], values["kv_heads"], values["inner"])
    return {"windows": windows} | layer_fields([Block(*widths, rotary=turns) for turns in rotary])


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
        2048, {**_BIAS, **_UNTIED, **_MLP_BIAS}, grouped=False, inner="", more=_per_layer
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
        2048, _UNTIED, grouped=False, head_dim=64, more=_deepseek(shared=2, first=0)
    ),
    "deepseek_v3": Architecture(
        4096,
        _UNTIED,
        {"router_bias": True},
        grouped=False,
        head_dim=64,
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
