"""Read shapes from the ``config.json`` of each ``model_type``: :data:`ARCHITECTURES`.

An architecture is an entry of the table. Rules that do not fit into the table are functions of the reader and of the
fields found so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from simulator.models.block_configs import read_block
from simulator.models.config import Block, DeltaNet, Latent
from simulator.models.keys import MAX_LAYERS, MAX_POSITIONS, Reader, is_list_of

ConfigFields = dict[str, Any]  # fields of simulator.ModelConfig


@dataclass(frozen=True)
class Architecture:
    """Keys of one architecture, with the defaults of its configuration class in transformers 4.57."""

    positions: int  # max_position_embeddings
    flags: Mapping[str, tuple[str, bool]]  # field -> key and default
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that all its models share
    kv_heads: int | None = None  # default of num_key_value_heads; None: the query heads, also for null
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    grouped: bool = True  # whether the keys num_key_value_heads and head_dim exist
    inner: str = "intermediate_size"  # key of the inner width; "": no such key
    window: int | None = None  # sliding_window; None: no such key
    windowed: Callable[[int], bool] = lambda layer: True  # layers with a window
    rotary: tuple[str, float] | None = None  # key and default of the rotated share of a head; None: all of it
    absent: Mapping[str, int] = field(default_factory=dict)  # defaults of shape keys that published files omit
    more: Callable[[Reader, ConfigFields], ConfigFields] = lambda read, values: {}  # further rules

    def values(self, read: Reader) -> ConfigFields:
        """Return the fields in a configuration."""
        hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads", self.absent.get("heads"))
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
            "windows": (0,) * layers if self.window is None else read.windows(layers, self.window, self.windowed),
            **{name: read.flag(key, default) for name, (key, default) in self.flags.items()},
            "max_positions": read.integer("max_position_embeddings", self.positions, high=MAX_POSITIONS),
            **self.fixed,
        }
        values |= self.more(read, values)
        if read.data.get("block_configs") is not None and self.more is not _per_layer:
            values |= _per_layer(read, values)
        if heads % kv_heads:
            raise read.fail("num_key_value_heads", f"expected a divisor of num_attention_heads {heads}, got {kv_heads}")
        return values


_WIDTHS = ("heads", "kv_heads", "inner", "experts", "active", "expert_inner")


def _layers(blocks: Sequence[Block]) -> ConfigFields:
    """Return the fields of layers: of the usual layer, and of each layer if they differ."""
    whole = [block for block in blocks if block.sublayers == 2 and not (block.linear or block.delta)] or blocks
    usual = Counter(whole).most_common(1)[0][0]
    fields: ConfigFields = {name: getattr(usual, name) for name in _WIDTHS}
    return fields | {"blocks": () if set(blocks) == {Block(**fields)} else tuple(blocks)}


def _each(fields: ConfigFields, layers: int) -> tuple[Block, ...]:
    """Return each layer of the fields that :func:`_layers` returns."""
    return fields.get("blocks") or (Block(*(fields.get(name, 0) for name in _WIDTHS)),) * layers


def _routed(
    read: Reader, values: ConfigFields, count: str, width: int, shared: int, dense: Callable[[int], bool]
) -> ConfigFields:
    """Return fields of layers with experts (their number is the key ``count``), or with an MLP if ``dense``."""
    experts = read.integer(count)
    active, heads = float(read.integer("num_experts_per_tok", high=experts)), (values["heads"], values["kv_heads"])
    plain, block = Block(*heads, values["inner"]), Block(*heads, shared, experts, active, width)
    return _layers([plain if dense(layer) else block for layer in range(values["layers"])])


def _local_experts(read: Reader, values: ConfigFields) -> ConfigFields:
    return _routed(read, values, "num_local_experts", values["inner"], 0, lambda layer: False)


def _gpt_oss(read: Reader, values: ConfigFields) -> ConfigFields:
    stored = read.data.get("quantization_config")
    mxfp4 = isinstance(stored, Mapping) and stored.get("quant_method") == "mxfp4"
    return _local_experts(read, values) | {"weight_dtype": "mxfp4" if mxfp4 else ""}


def _qwen_layers(read: Reader, values: ConfigFields) -> ConfigFields:
    step, last = read.integer("decoder_sparse_step", 1), values["layers"] - 1

    def right(value: Any) -> bool:
        return is_list_of(value, lambda layer: isinstance(layer, int) and 0 <= layer <= last)

    plain = set(read.value("mlp_only_layers", [], f"a list of layers from 0 to {last}", right))
    shared = read.integer("shared_expert_intermediate_size", low=0) if values.get("shared_gate") else 0
    width, dense = read.integer("moe_intermediate_size"), lambda i: i in plain or (i + 1) % step > 0
    return _routed(read, values, "num_experts", width, shared, dense)


def _qwen_experts(read: Reader, values: ConfigFields) -> ConfigFields:
    used, first = read.flag("use_sliding_window"), read.integer("max_window_layers", 28, low=0)
    every = not values.get("shared_gate")  # qwen2_moe: every other layer, up to max_window_layers
    windows = read.windows(values["layers"], 4096, lambda i: every or (i % 2 == 0 and i < first), used)
    return {"windows": windows} | _qwen_layers(read, values)


def _glm4_moe(read: Reader, values: ConfigFields) -> ConfigFields:
    width, start = read.integer("moe_intermediate_size"), read.integer("first_k_dense_replace", 1, low=0)
    wide = read.or_none("n_shared_experts", 1) * width
    layers = _routed(read, values, "n_routed_experts", width, wide, lambda i: i < start)
    return {"qk_norm": "head" if read.flag("use_qk_norm") else ""} | layers


def _qwen3_next(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers of which most have a gated delta net; the query projection of the others makes a gate too."""
    names, default = {"key": "linear_key_head_dim", "value": "linear_value_head_dim"}, 128
    sizes = {field: read.integer(key, default) for field, key in names.items()}
    own = DeltaNet(**sizes, conv=read.integer("linear_conv_kernel_dim", 4))
    heads = read.integer("linear_num_value_heads", 32), read.integer("linear_num_key_heads", 16)
    if heads[0] % heads[1]:
        expected = f"expected a divisor of linear_num_value_heads {heads[0]}"
        raise read.fail("linear_num_key_heads", f"{expected}, got {heads[1]}")
    every = read.integer("full_attention_interval", 4)
    types = read.layer_types(values["layers"], ("full_attention", "linear_attention"))
    linear = [t == "linear_attention" for t in types] or [(i + 1) % every > 0 for i in range(values["layers"])]
    plain = _each(_qwen_layers(read, values), values["layers"])
    blocks = [replace(b, heads=heads[0], kv_heads=heads[1], delta=True) if d else b for b, d in zip(plain, linear)]
    return _layers(blocks) | {"delta": own if any(linear) else None}


def _llama4(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers with experts or an MLP, in chunks of positions or over all of them without rotary positions.

    A chunk of positions is timed as a sliding window: exact up to its length, more pairs beyond."""
    layers, step = values["layers"], read.integer("interleave_moe_layer_step", 1)

    def right(value: Any) -> bool:
        return is_list_of(value, lambda layer: isinstance(layer, int) and 0 <= layer < layers)

    usual = list(range(step - 1, layers, step))
    routed = set(read.value("moe_layers", usual, f"a list of layers from 0 to {layers - 1}", right))
    inner = read.integer("intermediate_size_mlp") if len(routed) < layers else 0
    width = values["inner"]
    fields = _routed(read, {**values, "inner": inner}, "num_local_experts", width, width, lambda i: i not in routed)
    rotary = _rotary_layers(read, layers)
    blocks = [replace(b, rotary=turns) for b, turns in zip(_each(fields, layers), rotary)]
    chunk = read.or_none("attention_chunk_size", 8192)
    types = read.layer_types(layers, ("full_attention", "chunked_attention"))
    chunked = [t == "chunked_attention" for t in types] or rotary
    windows = tuple(chunk if inside else 0 for inside in chunked)
    return {"windows": windows, "qk_norm": "unit" if read.flag("use_qk_norm", True) else ""} | _layers(blocks)


def _deepseek(shared: int, first: int) -> Callable[[Reader, ConfigFields], ConfigFields]:
    """Return the rule for latent attention and experts, with defaults of shared experts and first dense layers."""

    def more(read: Reader, values: ConfigFields) -> ConfigFields:
        if read.flag("attention_bias"):
            raise read.fail("attention_bias", "expected false (biases of latent attention are not supported), got True")
        rank, width = read.or_none("q_lora_rank", 1536), read.integer("moe_intermediate_size")
        heads = (read.integer(f"{name}_head_dim") for name in ("qk_rope", "qk_nope", "v"))
        latent = Latent(rank, read.integer("kv_lora_rank"), *heads)
        start, step = read.integer("first_k_dense_replace", first, low=0), read.integer("moe_layer_freq", 1)
        wide = read.or_none("n_shared_experts", shared) * width
        layers = _routed(read, values, "n_routed_experts", width, wide, lambda i: i < start or i % step > 0)
        return {"latent": latent, "head_dim": latent.plain + latent.rotary, "rotary_dim": latent.rotary} | layers

    return more


def _per_layer(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers of an architecture search (Puzzle, arXiv 2411.19146): sublayers are kept, removed or linear.

    Any architecture may have ``block_configs``, which change its layers. ``nemotron-nas`` has nothing else."""
    layers = values["layers"]
    if values.get("latent") or values.get("delta"):
        raise read.fail("block_configs", "expected none: latent attention and delta nets per layer are not supported")
    parts, olds = read.parts("block_configs", layers), _each(values, layers)
    # the query heads of a layer without attention are those of the model
    olds = tuple(replace(old, heads=old.heads or values["heads"]) for old in olds)
    blocks = [read_block(of, old, values["hidden"]) for of, old in zip(parts, olds)]
    of_window = zip(parts, values["windows"])
    windows = [of.part("attention").integer("window_length", window, low=0) for of, window in of_window]
    return {"windows": tuple(windows)} | _layers(blocks)


def _rotary_layers(read: Reader, layers: int) -> list[bool]:
    """Return whether each layer has rotary positions: by the list ``no_rope_layers``, else by the interval."""
    step = read.integer("no_rope_layer_interval", 4)

    def right(value: Any) -> bool:
        return is_list_of(value, lambda flag: flag in (0, 1)) and (not value or len(value) >= layers)

    usual = [(layer + 1) % step > 0 for layer in range(layers)]
    given = read.value("no_rope_layers", [], f"a list of {layers} of 0 or 1", right)
    return [bool(flag) for flag in (given or usual)[:layers]]


def _smollm3(read: Reader, values: ConfigFields) -> ConfigFields:
    layers, rotary = values["layers"], _rotary_layers(read, values["layers"])
    windows = read.windows(layers, 0, lambda layer: not rotary[layer], read.flag("use_sliding_window"))
    widths = (values["heads"], values["kv_heads"], values["inner"])
    return {"windows": windows} | _layers([Block(*widths, rotary=turns) for turns in rotary])


def _qwen(read: Reader, values: ConfigFields) -> ConfigFields:
    used, first = read.flag("use_sliding_window"), read.integer("max_window_layers", 28, low=0)
    return {"windows": read.windows(values["layers"], 4096, lambda layer: layer >= first, used)}


def _gemma(read: Reader, values: ConfigFields, absent: bool = True) -> ConfigFields:
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
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
        "learned_positions": values["max_positions"] + 2,  # OPT's table starts with two rows of padding
        "norm": "layer" if read.flag("layer_norm_elementwise_affine", True) else "none",
        "final_norm": values["final_norm"] and not read.flag("_remove_final_layer_norm"),
    }


_TIED, _UNTIED = {"tied": ("tie_word_embeddings", True)}, {"tied": ("tie_word_embeddings", False)}
_BIAS = {"qkv_bias": ("attention_bias", False), "o_bias": ("attention_bias", False)}
_MLP_BIAS = {"mlp_bias": ("mlp_bias", False)}

# fmt: off
_TABLE: Mapping[str, Architecture] = {
    "llama": Architecture(2048, {**_BIAS, **_UNTIED, **_MLP_BIAS}),
    "mistral": Architecture(131072, _UNTIED, kv_heads=8, window=4096),
    "qwen2": Architecture(32768, _UNTIED, {"qkv_bias": True}, kv_heads=32, more=_qwen),
    "qwen3": Architecture(32768, {**_BIAS, **_UNTIED}, {"qk_norm": "head"}, kv_heads=32, head_dim=128, more=_qwen),
    "gemma": Architecture(8192, {**_BIAS, **_TIED}, kv_heads=16, head_dim=256),
    "gemma2": Architecture(8192, {**_BIAS, **_TIED}, {"post_norms": True}, kv_heads=4, head_dim=256,
                           window=4096, windowed=lambda layer: layer % 2 == 0, more=_gemma),
    "gemma3_text": Architecture(
        131072, {**_BIAS, **_TIED}, {"post_norms": True, "qk_norm": "head"}, kv_heads=4, head_dim=256,
        absent={"heads": 8, "vocab": 262208}, more=_gemma3),
    "phi3": Architecture(4096, _UNTIED, window=0, rotary=("partial_rotary_factor", 1.0)),
    "opt": Architecture(
        2048,
        {**dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("enable_bias", True)), **_TIED,
         "final_norm": ("do_layer_norm_before", True)},
        {"gated": False, "rotary_dim": 0}, grouped=False, inner="ffn_dim", more=_opt),
    "gpt_neox": Architecture(
        2048,
        {**dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True)), **_UNTIED,
         "parallel_residual": ("use_parallel_residual", True)},
        {"gated": False, "mlp_bias": True, "norm": "layer"}, grouped=False, rotary=("rotary_pct", 0.25)),
    "olmo2": Architecture(2048, {**_BIAS, **_UNTIED}, {"qk_norm": "width", "pre_norms": False, "post_norms": True}),
    "granite": Architecture(2048, {**_BIAS, **_UNTIED, **_MLP_BIAS}),
    "smollm3": Architecture(32768, {**_BIAS, **_TIED, **_MLP_BIAS}, kv_heads=4, more=_smollm3),
    "nemotron": Architecture(4096, {**_BIAS, **_UNTIED, **_MLP_BIAS}, {"gated": False, "norm": "layer"},
                             rotary=("partial_rotary_factor", 0.5)),
    "nemotron-nas": Architecture(2048, {**_BIAS, **_UNTIED, **_MLP_BIAS}, grouped=False, inner="", more=_per_layer),
    "mixtral": Architecture(131072, _UNTIED, kv_heads=8, window=0, more=_local_experts),
    "qwen2_moe": Architecture(32768, {**_UNTIED, "qkv_bias": ("qkv_bias", True)}, {"shared_gate": True}, kv_heads=16,
                              more=_qwen_experts),
    "qwen3_moe": Architecture(32768, {**_BIAS, **_UNTIED}, {"qk_norm": "head"}, kv_heads=4, more=_qwen_experts),
    "gpt_oss": Architecture(
        131072, {**dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True)), **_UNTIED},
        {"sinks": True, "router_bias": True, "expert_bias": True}, kv_heads=8, head_dim=64,
        window=128, windowed=lambda layer: layer % 2 == 0, more=_gpt_oss),
    # latent attention does not use the keys of grouped heads
    "deepseek_v2": Architecture(2048, _UNTIED, grouped=False, head_dim=64, more=_deepseek(shared=2, first=0)),
    "deepseek_v3": Architecture(4096, _UNTIED, {"router_bias": True}, grouped=False, head_dim=64,
                                more=_deepseek(shared=1, first=3)),
    "glm4_moe": Architecture(131072, {"qkv_bias": ("attention_bias", False), **_UNTIED}, {"router_bias": True},
                             kv_heads=8, rotary=("partial_rotary_factor", 0.5), more=_glm4_moe),
    "llama4_text": Architecture(131072, {**_BIAS, **_UNTIED}, kv_heads=8, head_dim=128, more=_llama4),
    "qwen3_next": Architecture(
        32768, {**_BIAS, **_UNTIED}, {"qk_norm": "head", "shared_gate": True, "output_gate": True}, kv_heads=2,
        head_dim=256, rotary=("partial_rotary_factor", 0.25), more=_qwen3_next),
    "seed_oss": Architecture(
        524288, {"qkv_bias": ("attention_bias", True), "o_bias": ("attention_out_bias", False), **_UNTIED, **_MLP_BIAS},
        kv_heads=8, head_dim=128),
}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    **_TABLE,
    # the same keys and shapes, with other defaults
    "glm4v_moe_text": replace(
        _TABLE["glm4_moe"], positions=65536, flags={"qkv_bias": ("attention_bias", True), **_UNTIED}),
    "kimi_k2": _TABLE["deepseek_v3"],
    "ministral": _TABLE["mistral"],
    "ministral3": replace(_TABLE["mistral"], positions=262144, window=0),
    "olmo3": replace(_TABLE["olmo2"], positions=65536, window=4096, windowed=lambda layer: (layer + 1) % 4 > 0),
    "qwen2_vl_text": replace(_TABLE["qwen2"], kv_heads=8),
    "qwen2_5_vl_text": replace(_TABLE["qwen2"], kv_heads=8),
    "qwen3_vl_text": replace(_TABLE["qwen3"], positions=128000),
    "qwen3_vl_moe_text": replace(_TABLE["qwen3_moe"], positions=128000, flags={**_BIAS, **_TIED}, kv_heads=16),
})
# fmt: on
"""Supported architectures by the ``model_type`` of their decoder."""

NESTED: Mapping[str, str] = MappingProxyType(
    {
        "gemma3": "gemma3_text",
        "glm4v_moe": "glm4v_moe_text",
        "llama4": "llama4_text",
        "mistral3": "mistral",
        "qwen2_vl": "qwen2_vl_text",
        "qwen2_5_vl": "qwen2_5_vl_text",
        "qwen3_vl": "qwen3_vl_text",
        "qwen3_vl_moe": "qwen3_vl_moe_text",
    }
)
"""``model_type`` of models with further parts (vision) -> default architecture of their decoder, ``text_config``."""

FLAT: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl")  # models whose older files have the decoder's keys at the top
