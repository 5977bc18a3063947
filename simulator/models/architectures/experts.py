"""Architectures with routed experts and grouped-query attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from simulator.codes import Part
from simulator.models.architectures.architecture import (
    BIAS,
    MLP_BIAS,
    TIED,
    UNTIED,
    Architecture,
    attention_of,
    dense_layers,
    rotary_layers,
    rotated,
    routed,
)
from simulator.models.architectures.reader import ConfigFields, Reader
from simulator.models.sublayers import AttentionExperts, ConvolvedAttention, ResidualScale


def _local_experts(read: Reader, values: ConfigFields) -> ConfigFields:
    return routed(read, values, "num_local_experts", values["inner"], 0, lambda layer: False)


def qwen_layers(read: Reader, values: ConfigFields) -> ConfigFields:
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
    return routed(read, values, count, width, shared, dense)


def _qwen_experts(read: Reader, values: ConfigFields) -> ConfigFields:
    used, first = read.flag("use_sliding_window"), read.integer("max_window_layers", 28, low=0)
    every = not values.get("shared_gate")  # qwen2_moe: every other layer, up to max_window_layers
    windows = read.windows(
        values["layers"], 4096, lambda i: every or (i % 2 == 0 and i < first), used
    )
    return {"windows": windows} | qwen_layers(read, values)


def _glm4_moe(read: Reader, values: ConfigFields) -> ConfigFields:
    width, start = (
        read.integer("moe_intermediate_size"),
        read.integer("first_k_dense_replace", 1, low=0),
    )
    wide = read.or_none("n_shared_experts", 1) * width
    layers = routed(read, values, "n_routed_experts", width, wide, lambda i: i < start)
    return {"qk_norm": "head" if read.flag("use_qk_norm") else ""} | layers


def _llama4(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers with experts or an MLP; their attention has rotary positions and chunks, or
    neither.

    A chunk of positions is timed as a sliding window, which is exact up to its length and computes
    more beyond."""
    layers, step = values["layers"], read.integer("interleave_moe_layer_step", 1)
    with_experts = read.numbers("moe_layers", list(range(step - 1, layers, step)), layers)
    read.raw("intermediate_size_mlp")  # layers with experts ignore it
    inner = read.integer("intermediate_size_mlp") if len(with_experts) < layers else 0
    width = values["inner"]
    fields = routed(
        read,
        {**values, "inner": inner},
        "num_local_experts",
        width,
        width,
        lambda i: i not in with_experts,
    )
    rotary = rotary_layers(read, layers)
    norm = "unit" if read.flag("use_qk_norm", True) else ""
    chunk = read.or_none("attention_chunk_size", 8192)
    types = read.layer_types(layers, ("full_attention", "chunked_attention"))
    chunked = [t == "chunked_attention" for t in types] or rotary
    windows = tuple(chunk if inside else 0 for inside in chunked)
    attentions = rotated({**values, "qk_norm": norm}, rotary)
    return {"windows": windows, "qk_norm": norm, "attentions": attentions} | fields


def mixture(
    shared: int | None = None, first: int | None = None
) -> Callable[[Reader, ConfigFields], ConfigFields]:
    """Return the rule for experts in the usual keys, with the default numbers of shared experts and
    of first layers without experts; None: no such key."""

    def more(read: Reader, values: ConfigFields) -> ConfigFields:
        width = read.integer("moe_intermediate_size")
        wide = 0 if shared is None else read.or_none("num_shared_experts", shared) * width
        layers = values["layers"]
        dense = (lambda layer: False) if first is None else dense_layers(read, layers, first)
        return routed(read, values, "num_experts", width, wide, dense)

    return more


def _dbrx(read: Reader, values: ConfigFields) -> ConfigFields:
    ffn = replace(read.part("ffn_config"), names_of={"num_experts_per_tok": "moe_top_k"})
    width, groups = ffn.integer("ffn_hidden_size"), read.part("attn_config").integer("kv_n_heads")
    experts = routed(ffn, values, "moe_num_experts", width, 0, lambda layer: False)
    return {"kv_heads": groups} | experts


def _ernie(read: Reader, values: ConfigFields) -> ConfigFields:
    layers, width = values["layers"], read.integer("moe_intermediate_size")
    first, step = (
        read.integer("moe_layer_start_index", 1, low=0),
        read.integer("moe_layer_interval", 1),
    )
    end = read.integer("moe_layer_end_index", -1, low=-1)
    last = layers - 1 if end == -1 else end
    wide = read.or_none("num_shared_experts", 2) * width

    def dense(layer: int) -> bool:
        return not first <= layer <= last or (layer + 1) % step > 0

    return routed(read, values, "num_experts", width, wide, dense)


def granite_shared(read: Reader, values: ConfigFields) -> ConfigFields:
    shared = read.integer("shared_intermediate_size", 0, low=0)
    return routed(read, values, "num_local_experts", values["inner"], shared, lambda layer: False)


def _hunyuan(read: Reader, values: ConfigFields) -> ConfigFields:
    width = values["inner"]
    return routed(read, values, "num_experts", width, width, lambda layer: False)


def _jetmoe(read: Reader, values: ConfigFields) -> ConfigFields:
    count = "num_local_experts"
    mlps = routed(read, values, count, values["inner"], 0, lambda layer: False, output_bias=True)[
        "mlps"
    ]
    groups, active = values["kv_heads"], int(mlps[0].active)
    attention = AttentionExperts(
        heads=groups * active,
        kv_heads=groups,
        head_dim=values["head_dim"],
        rotary=values["head_dim"],
        o_bias=True,
        experts=mlps[0].experts,
        active=active,
    )
    return {"attentions": [attention] * values["layers"], "mlps": mlps}


def _minimax_m2(read: Reader, values: ConfigFields) -> ConfigFields:
    rotary = read.integer("rotary_dim", values["rotary_dim"], high=values["head_dim"])
    return _local_experts(read, values) | {"rotary_dim": rotary}


def _normed_heads(read: Reader, values: ConfigFields) -> ConfigFields:
    norm = "head" if read.flag("use_qk_norm", True) else ""
    return {"qk_norm": norm} | mixture(shared=1, first=1)(read, values)


def _olmoe(read: Reader, values: ConfigFields) -> ConfigFields:
    hidden, heads = values["hidden"], values["heads"]
    if heads * values["head_dim"] != hidden:  # the norm of queries has hidden_size weights
        raise read.fail("head_dim", f"expected hidden_size {hidden} / {heads} query heads")
    return mixture()(read, values)


def _zaya(read: Reader, values: ConfigFields) -> ConfigFields:
    layers, hidden = values["layers"], values["hidden"]
    types = read.layer_types(layers, ("hybrid", "hybrid_sliding")) or ["hybrid"] * layers
    window = read.or_none("sliding_window", 0)
    shares = {kind: read.rotary("partial_rotary_factor", 0.5, kind) for kind in set(types)}
    usual = attention_of(values)

    def attention(kind: str) -> ConvolvedAttention:
        return ConvolvedAttention(
            heads=usual.heads,
            kv_heads=usual.kv_heads,
            head_dim=usual.head_dim,
            rotary=int(usual.head_dim * shares[kind]),
            norm="unit",
            qkv_bias=usual.qkv_bias,
            o_bias=usual.o_bias,
            channel_kernel=read.integer("cca_time0", 2),
            head_kernel=read.integer("cca_time1", 2),
        )

    width = read.integer("moe_intermediate_size")
    router = {"router_inner": read.integer("router_hidden_size", 256), "router_carry": True}
    mlps = routed(
        read, values, "num_experts", width, 0, lambda layer: False, zero_experts=1, **router
    )["mlps"]
    return {
        "windows": [window if kind == "hybrid_sliding" else 0 for kind in types],
        "attentions": list(map(attention, types)),
        "mlps": [replace(mlp, router_carry=i > 0) for i, mlp in enumerate(mlps)],
        "others": ((ResidualScale(of=Part.ATTENTION),), (ResidualScale(of=Part.MLP),)),
        "other_parameters": 2 * hidden,  # factor and addend of the embedding
    }


ROUTED = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
_AS_MLP = {"moe_intermediate_size": "intermediate_size"}  # experts of the width of MLPs
HEAD_NORMS = {"qk_norm": "head"}

_TABLE: Mapping[str, Architecture] = {
    "mixtral": Architecture(131072, UNTIED, kv_heads=8, window=0, more=_local_experts),
    "qwen2_moe": Architecture(
        32768,
        {**UNTIED, "qkv_bias": ("qkv_bias", True)},
        {"shared_gate": True},
        kv_heads=16,
        more=_qwen_experts,
    ),
    "qwen3_moe": Architecture(
        32768, {**BIAS, **UNTIED}, {"qk_norm": "head"}, kv_heads=4, more=_qwen_experts
    ),
    "gpt_oss": Architecture(
        131072,
        {**dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True)), **UNTIED},
        {"sinks": True, "router_bias": True, "expert_bias": True},
        kv_heads=8,
        head_dim=64,
        window=128,
        windowed=lambda layer: layer % 2 == 0,
        more=_local_experts,
    ),
    "glm4_moe": Architecture(
        131072,
        {"qkv_bias": ("attention_bias", False), **UNTIED},
        {"router_bias": True},
        kv_heads=8,
        divides=False,
        rotary=("partial_rotary_factor", 0.5),
        more=_glm4_moe,
    ),
    "llama4_text": Architecture(131072, {**BIAS, **UNTIED}, kv_heads=8, head_dim=128, more=_llama4),
    "aria_text": Architecture(
        2048,
        {**BIAS, **UNTIED, **MLP_BIAS},
        keys={
            **_AS_MLP,
            "num_experts": "moe_num_experts",
            "num_experts_per_tok": "moe_topk",
            "num_shared_experts": "moe_num_shared_experts",
        },
        more=mixture(shared=2),
    ),
    "dbrx": Architecture(
        2048,
        UNTIED,
        {"norm": "layer_without_bias"},
        grouped=False,
        inner="",
        keys={
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
            "max_position_embeddings": "max_seq_len",
        },
        unused=("num_key_value_heads",),
        more=_dbrx,
    ),
    "ernie4_5_moe": Architecture(
        131072,
        {
            **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "head_bias"), ("use_bias", False)),
            **TIED,
        },
        {"router_bias": True},
        kv_heads=4,
        keys={
            "num_experts": "moe_num_experts",
            "num_experts_per_tok": "moe_k",
            "num_shared_experts": "moe_num_shared_experts",
        },
        more=_ernie,
    ),
    "granitemoe": Architecture(2048, {**BIAS, **UNTIED}, more=_local_experts),
    "granitemoeshared": Architecture(2048, {**BIAS, **UNTIED}, more=granite_shared),
    "hunyuan_v1_moe": Architecture(
        2048,
        {**BIAS, **UNTIED},
        HEAD_NORMS,
        keys={"num_experts_per_tok": "moe_topk"},
        # of Tencent's own code: the shared MLP and all experts have intermediate_size
        unused=("attention_head_dim", "moe_intermediate_size", "num_shared_expert"),
        more=_hunyuan,
    ),
    "hy_v3": Architecture(
        131072,
        {**BIAS, **UNTIED, **MLP_BIAS},
        {**HEAD_NORMS, "router_bias": True},
        kv_heads=8,
        head_dim=128,
        unused=("expert_hidden_dim",),
        more=mixture(shared=1, first=1),
    ),
    "jetmoe": Architecture(
        4096,
        TIED,
        keys={
            "num_attention_heads": "num_key_value_heads",
            "head_dim": "kv_channels",
            # names of the first release
            "intermediate_size": "ffn_hidden_size",
            "num_local_experts": "moe_num_experts",
            "num_experts_per_tok": "moe_top_k",
            "max_position_embeddings": "n_positions",
        },
        # query heads are key/value heads times active experts
        unused=("num_attention_heads", "num_layers"),
        more=_jetmoe,
    ),
    "mellum": Architecture(
        131072,
        {**BIAS, **UNTIED},
        HEAD_NORMS,
        kv_heads=4,
        head_dim=128,
        window=1024,
        windowed=lambda layer: False,
        keys={"num_experts": "num_local_experts"},
        more=mixture(first=0),
    ),
    "minimax_m2": Architecture(
        196608,
        UNTIED,
        {"qk_norm": "width", "router_bias": True},
        kv_heads=8,
        head_dim=128,
        rotary=("partial_rotary_factor", 1.0),
        unused=("mtp_transformer_layers",),
        more=_minimax_m2,
    ),
    "olmoe": Architecture(
        4096, {**BIAS, **UNTIED}, {"qk_norm": "width"}, keys=_AS_MLP, more=_olmoe
    ),
    "phimoe": Architecture(
        131072,
        {**BIAS, **UNTIED, "head_bias": ("lm_head_bias", False)},
        {"norm": "layer"},
        kv_heads=8,
        window=0,
        more=_local_experts,
    ),
    "sarvam_moe": Architecture(
        131072,
        {"qkv_bias": ("attention_bias", False), **UNTIED},
        {"router_bias": True},
        kv_heads=4,
        head_dim=64,
        rotary=("partial_rotary_factor", 1.0),
        keys={**ROUTED, "attention_bias": "use_qkv_bias"},
        unused=("max_window_layers", "moe_shared_expert_intermediate_size"),
        more=_normed_heads,
    ),
    "solar_open": Architecture(
        131072,
        {"qkv_bias": ("attention_bias", False), **UNTIED},
        {"router_bias": True},
        kv_heads=8,
        head_dim=128,
        inner="",
        rotary=("partial_rotary_factor", 1.0),
        keys=ROUTED,
        unused=("intermediate_size",),
        more=mixture(shared=1),
    ),
    "zaya": Architecture(
        131072,
        {**BIAS, **TIED, "head_bias": ("lm_head_bias", False)},
        {"router_bias": True},
        kv_heads=2,
        head_dim=128,
        inner="",
        more=_zaya,
    ),
}


TABLE: Mapping[str, Architecture] = {
    **_TABLE,
    # the same keys and shapes, with other defaults
    "flex_olmo": replace(
        _TABLE["olmoe"], fixed={"qk_norm": "width", "pre_norms": False, "post_norms": True}
    ),
    "glm4v_moe_text": replace(
        _TABLE["glm4_moe"],
        positions=65536,
        flags={"qkv_bias": ("attention_bias", True), **UNTIED},
    ),
    "qwen3_vl_moe_text": replace(
        _TABLE["qwen3_moe"], positions=128000, flags={**BIAS, **TIED}, kv_heads=16
    ),
}
