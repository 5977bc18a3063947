"""Architectures of dense decoders with grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from simulator.models.architectures.architecture import (
    BIAS,
    MLP_BIAS,
    TIED,
    UNTIED,
    Architecture,
    attention_of,
    mlp_of,
    rotary_layers,
    rotated,
)
from simulator.models.architectures.reader import ConfigFields, Reader

MAX_LOOPS = 100  # largest number of times that a model may repeat its layers


def _smollm3(read: Reader, values: ConfigFields) -> ConfigFields:
    layers, rotary = values["layers"], rotary_layers(read, values["layers"])
    windows = read.windows(
        layers, 0, lambda layer: not rotary[layer], read.flag("use_sliding_window")
    )
    return {"windows": windows, "attentions": rotated(values, rotary)}


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
    width, before = read.integer("word_embed_proj_dim", values["hidden"]), values["pre_norms"]
    return {
        "norm": "layer" if read.flag("layer_norm_elementwise_affine", True) else "none",
        "post_norms": not before,
        "final_norm": before and not read.flag("_remove_final_layer_norm"),
        "embedding_width": 0 if width == values["hidden"] else width,
    }


def _cohere(read: Reader, values: ConfigFields) -> ConfigFields:
    return {"qk_norm": "width" if read.flag("use_qk_norm") else ""}


def _cohere2(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers with a window and rotary positions, or neither."""
    step = read.integer("sliding_window_pattern", 4)
    windows = read.windows(values["layers"], 4096, lambda layer: (layer + 1) % step > 0)
    return {"windows": windows, "attentions": rotated(values, [w > 0 for w in windows])}


def _compass(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers with rotary positions, except for kinds of layers whose parameters are null."""
    types = read.layer_types(values["layers"], ("full_attention", "sliding_attention"))
    rope = read.raw("rope_parameters")
    still = {kind for kind, given in rope.items() if given is None} if rope else set()
    kinds = types or ["full_attention"] * values["layers"]
    return {"attentions": rotated(values, [kind not in still for kind in kinds])}


def _exaone4(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers of which those with a window have rotary positions, or all without windows."""
    # published files state the pattern as letters, beside a list
    step = 4 if read.has("layer_types") else read.integer("sliding_window_pattern", 4)
    windows = read.windows(values["layers"], 4096, lambda layer: (layer + 1) % step > 0)
    whole = not read.or_none("sliding_window", 4096)
    return {"windows": windows, "attentions": rotated(values, [whole or w > 0 for w in windows])}


def _granite_swa(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers of which those with a base frequency of 0 have no rotary positions."""
    layers = values["layers"]

    def right(value: object) -> bool:
        return isinstance(value, list) and len(value) == layers

    bases = read.value("layer_rope_theta", [1] * layers, f"a list of {layers} numbers", right)
    return {"attentions": rotated(values, [bool(base) for base in bases])}


def _nanochat(read: Reader, values: ConfigFields) -> ConfigFields:
    return {"logit_softcap": read.capped("final_logit_softcapping", absent=True)}


def _doge(read: Reader, values: ConfigFields) -> ConfigFields:
    if read.flag("is_moe"):
        raise read.fail("is_moe", "expected false: experts of single vectors are not supported")
    return {}


def _apertus1p5(read: Reader, values: ConfigFields) -> ConfigFields:
    outputs = read.integer("output_vocab_size", values["vocab"], high=values["vocab"])
    return {"head_vocab": 0 if outputs == values["vocab"] else outputs}


def _dory_layers(read: Reader) -> int:
    """Return the number of layers; published files count attention and MLPs."""
    return read.layers() // (2 if "mlp" in (read.raw("layer_types") or ()) else 1)


def _dory(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers of which those in the middle are repeated, each time with a cache of its
    own."""
    layers, parts = values["layers"], read.layers() // values["layers"]
    kinds = ("full_attention", "sliding_attention", "mlp")
    types = read.layer_types(layers * parts, kinds)[::parts]
    window = read.integer("sliding_window", 1024)
    full = [t == "full_attention" for t in types] or [(i + 1) % 4 == 0 for i in range(layers)]
    first, last = (
        read.integer(f"n_{end}_layers", 8, low=0) // parts for end in ("input", "output")
    )
    middle = read.integer("n_recurrent_layers", (layers - first - last) * parts) // parts
    if first + middle + last != layers:
        stated = f"{layers} layers of num_hidden_layers"
        raise read.fail("n_recurrent_layers", f"expected {stated}, got {first + middle + last}")
    if read.raw("recurrent_kv_cache_mode") not in (None, "per_loop"):
        raise read.fail("recurrent_kv_cache_mode", "expected per_loop; others are not supported")
    loops = read.integer("n_recurrent_loops", 2, high=MAX_LOOPS)
    repeated = list(range(first, first + middle)) * (loops - 1)
    order = [*range(first + middle), *repeated, *range(first + middle, layers)]
    again = range(first + middle, first + middle + len(repeated))
    attention = replace(attention_of(values), gates=values["heads"] * values["head_dim"])
    mlp, places = mlp_of(values), range(len(order))
    return {
        "windows": tuple(0 if full[number] else window for number in order),
        "attentions": [replace(attention, reused=place in again) for place in places],
        "mlps": [replace(mlp, reused=place in again) for place in places],
    }


_TABLE: Mapping[str, Architecture] = {
    "llama": Architecture(2048, {**BIAS, **UNTIED, **MLP_BIAS}),
    "mistral": Architecture(131072, UNTIED, kv_heads=8, window=4096),
    "qwen2": Architecture(32768, UNTIED, {"qkv_bias": True}, kv_heads=32, more=_qwen),
    "qwen3": Architecture(
        32768, {**BIAS, **UNTIED}, {"qk_norm": "head"}, kv_heads=32, head_dim=128, more=_qwen
    ),
    "gemma": Architecture(8192, {**BIAS, **TIED}, kv_heads=16, head_dim=256),
    "gemma2": Architecture(
        8192,
        {**BIAS, **TIED},
        {"post_norms": True},
        kv_heads=4,
        head_dim=256,
        window=4096,
        windowed=lambda layer: layer % 2 == 0,
        unused=("sliding_window_size",),
        more=_gemma,
    ),
    "gemma3_text": Architecture(
        131072,
        {**BIAS, **TIED},
        {"post_norms": True, "qk_norm": "head"},
        kv_heads=4,
        head_dim=256,
        absent={"heads": 8, "vocab": 262208},
        more=_gemma3,
    ),
    "phi3": Architecture(4096, UNTIED, window=0, rotary=("partial_rotary_factor", 1.0)),
    "opt": Architecture(
        2048,
        {
            **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("enable_bias", True)),
            **TIED,
            "pre_norms": ("do_layer_norm_before", True),
        },
        {"gated": False, "rotary_dim": 0},
        grouped=False,
        inner="ffn_dim",
        learned=2,  # the table starts with two rows of padding
        more=_opt,
    ),
    "gpt_neox": Architecture(
        2048,
        {
            **dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True)),
            **UNTIED,
            "parallel_residual": ("use_parallel_residual", True),
        },
        {"gated": False, "mlp_bias": True, "norm": "layer"},
        grouped=False,
        rotary=("rotary_pct", 0.25),
    ),
    "olmo2": Architecture(
        2048, {**BIAS, **UNTIED}, {"qk_norm": "width", "pre_norms": False, "post_norms": True}
    ),
    "granite": Architecture(2048, {**BIAS, **UNTIED, **MLP_BIAS}),
    "smollm3": Architecture(32768, {**BIAS, **TIED, **MLP_BIAS}, kv_heads=4, more=_smollm3),
    "nemotron": Architecture(
        4096,
        {**BIAS, **UNTIED, **MLP_BIAS},
        {"gated": False, "norm": "layer"},
        rotary=("partial_rotary_factor", 0.5),
    ),
    "nemotron-nas": Architecture(
        2048,
        {**BIAS, **UNTIED, **MLP_BIAS},
        inner="",
        blocks=True,
        unused=("intermediate_size",),
    ),
    "seed_oss": Architecture(
        524288,
        {
            "qkv_bias": ("attention_bias", True),
            "o_bias": ("attention_out_bias", False),
            **UNTIED,
            **MLP_BIAS,
        },
        kv_heads=8,
        head_dim=128,
    ),
    "olmo": Architecture(2048, {**BIAS, **UNTIED}, {"norm": "none"}),
    "glm": Architecture(
        131072,
        {"qkv_bias": ("attention_bias", True), **UNTIED},
        kv_heads=2,
        head_dim=128,
        rotary=("partial_rotary_factor", 0.5),
    ),
    "cohere": Architecture(
        8192, {**BIAS, **TIED}, {"joins": True, "norm": "layer_without_bias"}, more=_cohere
    ),
    "helium": Architecture(
        4096,
        {"qkv_bias": ("attention_bias", False), **UNTIED, **MLP_BIAS},
        kv_heads=20,
        head_dim=128,
        square=True,
    ),
    "hyperclovax": Architecture(
        2048, {**BIAS, **UNTIED, **MLP_BIAS, "post_norms": ("use_post_norm", True)}
    ),
    "ernie4_5": Architecture(
        131072,
        {**dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("use_bias", False)), **TIED},
        kv_heads=2,
        head_dim=128,
    ),
    "bitnet": Architecture(
        2048, {**BIAS, **UNTIED}, {"inner_norm": True, "output_norm": True}, kv_heads=5, square=True
    ),
    "jais2": Architecture(
        8192,
        {
            **dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True)),
            **UNTIED,
            "mlp_bias": ("mlp_bias", True),
        },
        {"gated": False, "norm": "layer"},
    ),
    "apertus": Architecture(
        65536, {**BIAS, **UNTIED}, {"gated": False, "qk_norm": "head", "scalars": 2}
    ),
    "cwm": Architecture(
        131072,
        {**UNTIED, **MLP_BIAS},
        kv_heads=8,
        head_dim=128,
        window=8192,
        windowed=lambda layer: layer % 4 > 0,
    ),
    "exaone4": Architecture(
        2048,
        UNTIED,
        {"qk_norm": "head", "pre_norms": False, "post_norms": True},
        kv_heads=32,
        more=_exaone4,
    ),
    "hunyuan_v1_dense": Architecture(
        2048,
        {**BIAS, **UNTIED},
        {"qk_norm": "head"},
        unused=("attention_head_dim", "org_vocab_size"),
    ),
    "nanochat": Architecture(
        2048,
        {**BIAS, **UNTIED},
        {"norm": "none", "embedding_norm": True, "qk_norm": "unit", "gated": False},
        more=_nanochat,
    ),
    "diffllama": Architecture(2048, {**BIAS, **UNTIED}, {"two_softmaxes": True}, kv_heads=32),
    "doge": Architecture(
        2048,
        {**BIAS, **UNTIED, **MLP_BIAS},
        {"masks": True, "scales": True, "qk_norm": "head"},
        unused=(
            *("num_experts", "num_experts_per_tok", "keep_window_size"),
            *("expert_retrieval_size", "num_cdmmoe_experts", "num_cdmmoe_experts_per_head"),
            *("num_cdmmoe_heads", "num_cdmoe_experts", "num_cdmoe_experts_per_head"),
            "num_cdmoe_heads",
        ),
        more=_doge,
    ),
    "dory": Architecture(
        8192,
        {**BIAS, **UNTIED, **MLP_BIAS},
        {
            **{"norm": "none", "qk_norm": "unit", "post_norms": True, "scales": True},
            **dict.fromkeys(("output_norm", "inner_norm", "channel_scales"), True),
            "head_bias": True,  # a scale of each logit, instead of a bias
        },
        kv_heads=4,
        head_dim=256,
        many=_dory_layers,
        more=_dory,
    ),
    "granite_swa": Architecture(
        8192,
        {**BIAS, **TIED, **MLP_BIAS},
        {"sinks": True},
        kv_heads=4,
        window=128,
        windowed=lambda layer: layer % 4 > 0,
        more=_granite_swa,
    ),
}


TABLE: Mapping[str, Architecture] = {
    **_TABLE,
    # the same keys and shapes, with other defaults
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
    "arcee": replace(_TABLE["llama"], positions=4096, fixed={"gated": False}),
    "apertus1p5_text": replace(_TABLE["apertus"], more=_apertus1p5),
    "cohere2": replace(_TABLE["cohere"], unused=("layer_switch",), more=_cohere2),
    "cohere_compass_text": replace(
        _TABLE["cohere"], window=4096, windowed=lambda layer: False, more=_compass
    ),
    "emu3_text_model": replace(_TABLE["llama"], positions=9216, kv_heads=8),
    "exaone": replace(
        _TABLE["llama"], positions=4096, kv_heads=8, keys={"num_hidden_layers": "num_layers"}
    ),
    "glm4": replace(_TABLE["glm"], fixed={"post_norms": True}),
    "internlm3": replace(
        _TABLE["llama"],
        positions=32768,
        kv_heads=2,
        head_dim=128,
        keys={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
    ),
    "iquestcoder": replace(_TABLE["llama"], positions=131072, kv_heads=8, head_dim=128),
    "phi4_multimodal": replace(_TABLE["phi3"], positions=131072, kv_heads=8),
    "vaultgemma": replace(_TABLE["gemma2"], fixed={}),
}
