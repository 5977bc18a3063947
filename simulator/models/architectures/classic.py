"""Architectures of older dense decoders: layer norms, learned positions or ALiBi, parallel
attention and MLP; and of encoders made decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from simulator.models.architectures.architecture import (
    BIAS,
    MLP_BIAS,
    TIED,
    UNTIED,
    Architecture,
    attention_of,
)
from simulator.models.architectures.reader import ConfigFields, Reader


def _times_hidden(key: str) -> Callable[[Reader, ConfigFields], ConfigFields]:
    """Return the rule of an inner width that ``key`` states in hidden sizes."""
    return lambda read, values: {"inner": read.integer(key, 4) * values["hidden"]}


def _bigcode(read: Reader, values: ConfigFields) -> ConfigFields:
    return {"kv_heads": 1 if read.flag("multi_query", True) else values["heads"]}


def _gptj(read: Reader, values: ConfigFields) -> ConfigFields:
    return {"rotary_dim": read.or_none("rotary_dim", 64) or values["head_dim"]}


def _gpt_neo(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return the windows of local layers, from patterns and how often each repeats."""

    def right(value: object) -> bool:
        return isinstance(value, list) and all(
            isinstance(item, list)
            and len(item) == 2
            and isinstance(item[0], list)
            and {*item[0]} <= {"global", "local"}
            and isinstance(item[1], int)
            and 0 <= item[1] <= values["layers"]
            for item in value
        )

    pairs = "a list of pairs of a list of global or local, and a number"
    patterns = read.value("attention_types", [[["global", "local"], 12]], pairs, right)
    kinds = [kind for names, many in patterns for kind in names * many]
    if len(kinds) != values["layers"]:
        raise read.fail("attention_types", f"expected {values['layers']} layers, got {len(kinds)}")
    window = read.integer("window_size", 256)
    return {"windows": tuple(window if kind == "local" else 0 for kind in kinds)}


def _neox_japanese(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return attention whose last layer has a bias."""
    plain = attention_of(values)
    attentions = [plain] * (values["layers"] - 1) + [replace(plain, o_bias=True)]
    inner = _times_hidden("intermediate_multiple_size")(read, values)
    return {"attentions": attentions} | inner


def _falcon(read: Reader, values: ConfigFields) -> ConfigFields:
    new, parallel = read.flag("new_decoder_architecture"), read.flag("parallel_attn", True)
    grouped = read.integer("num_key_value_heads", values["heads"])
    several = 1 if read.flag("multi_query", True) else values["heads"]
    norms = read.integer("num_ln_in_parallel_attn", 2 if new else 1)
    return {
        "kv_heads": grouped if new else several,
        "rotary_dim": 0 if read.flag("alibi") else values["head_dim"],
        "parallel_residual": parallel and norms == 2,
        "joins": parallel and norms != 2,
    }


def _cpmant(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return the parameters of prompts, of segments, and of biases by distance and by pair of
    segments."""
    segments = read.integer("segment_types", 32)
    prompts = read.integer("prompt_types", 32) * read.integer("prompt_length", 32)
    biases = read.integer("position_bias_num_buckets", 512) + segments**2
    vectors = (prompts + segments) * values["hidden"]
    return {"other_parameters": vectors + biases * values["heads"]}


def _phi(read: Reader, values: ConfigFields) -> ConfigFields:
    return {"qk_norm": "layer" if read.flag("qk_layernorm", values["head_norms"]) else ""}


def _stablelm(read: Reader, values: ConfigFields) -> ConfigFields:
    return {"qk_norm": "width" if read.flag("qk_layernorm") else ""}


def _modernbert(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers of which the first has no norm before its attention."""
    layers, window = values["layers"], read.or_none("local_attention", 128) // 2
    step = read.integer("global_attn_every_n_layers", 3)
    types = read.layer_types(layers, ("full_attention", "sliding_attention"))
    local = [t == "sliding_attention" for t in types] or [i % step > 0 for i in range(layers)]
    plain = attention_of(values)
    return {
        "norm": "layer" if read.flag("norm_bias") else "layer_without_bias",
        "windows": tuple(window if inside else 0 for inside in local),
        "attentions": [replace(plain, norms=(False, False))] + [plain] * (layers - 1),
        "other_parameters": values["hidden"] * read.flag("classifier_bias"),
    }


_GPT = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
}
_BIASES = ("qkv_bias", "o_bias", "mlp_bias")
_BIASED = dict.fromkeys(_BIASES, True)
_PLAIN = {"gated": False, "norm": "layer"}
_STILL = {**_PLAIN, "rotary_dim": 0}  # without rotary positions
_GPT2 = Architecture(
    1024, TIED, {**_STILL, **_BIASED}, grouped=False, widening=4, learned=0, keys=_GPT
)
_GPTJ = Architecture(
    2048,
    UNTIED,
    {**_PLAIN, "mlp_bias": True, "joins": True, "head_bias": True},
    grouped=False,
    widening=4,
    keys=_GPT,
    unused=("n_ctx",),
    more=_gptj,
)
_PHI = Architecture(
    2048,
    UNTIED,
    {**_PLAIN, **_BIASED, "joins": True, "head_bias": True, "head_norms": False},
    rotary=("partial_rotary_factor", 0.5),
    more=_phi,
)

TABLE: Mapping[str, Architecture] = {
    "gpt2": replace(_GPT2, unused=("n_ctx",)),
    "gpt_bigcode": replace(_GPT2, unused=("num_key_value_heads",), more=_bigcode),
    "openai-gpt": replace(
        _GPT2,
        positions=512,
        fixed={**_GPT2.fixed, "pre_norms": False, "post_norms": True, "final_norm": False},
        inner="",
        unused=("n_ctx",),
        more=lambda read, values: {"inner": 4 * values["hidden"]},
    ),
    "gpt_neo": Architecture(
        2048,
        TIED,
        {**_STILL, "o_bias": True, "mlp_bias": True},
        grouped=False,
        widening=4,
        learned=0,
        keys={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
        unused=("attention_layers",),
        more=_gpt_neo,
    ),
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "gpt_neox_japanese": Architecture(
        2048,
        TIED,
        _PLAIN,
        grouped=False,
        inner="",
        rotary=("rotary_pct", 1.0),
        more=_neox_japanese,
    ),
    "bloom": Architecture(
        2048,
        TIED,
        {**_STILL, **_BIASED, "embedding_norm": True},
        grouped=False,
        inner="",
        keys={**_GPT, "hidden_size": "n_embed", "max_position_embeddings": "seq_length"},
        unused=("hidden_size",),
        more=lambda read, values: {"inner": 4 * values["hidden"]},
    ),
    "mpt": Architecture(
        2048,
        TIED,
        {**_STILL, "norm": "layer_without_bias"},
        grouped=False,
        inner="",
        keys={
            "hidden_size": "d_model",
            "max_position_embeddings": "max_seq_len",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
        },
        more=_times_hidden("expansion_ratio"),
    ),
    "falcon": Architecture(
        2048,
        {**dict.fromkeys(_BIASES, ("bias", False)), **TIED},
        _PLAIN,
        grouped=False,
        widening=4,
        keys={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
        more=_falcon,
    ),
    "ctrl": replace(
        _GPT2,
        positions=256,
        fixed={**_GPT2.fixed, "head_bias": True},
        learned=None,
        keys={**_GPT, "intermediate_size": "dff"},
    ),
    "xglm": Architecture(
        2048,
        TIED,
        {**_STILL, **_BIASED},
        grouped=False,
        keys={
            "hidden_size": "d_model",
            "intermediate_size": "ffn_dim",
            "num_attention_heads": "attention_heads",
            "num_hidden_layers": "num_layers",
        },
    ),
    "biogpt": Architecture(1024, TIED, {**_STILL, **_BIASED}, grouped=False, learned=2),
    "cpmant": Architecture(
        2048,
        {},
        {"rotary_dim": 0},
        grouped=False,
        head_dim=128,
        keys={
            "head_dim": "dim_head",
            "intermediate_size": "dim_ff",
            "max_position_embeddings": "position_bias_max_distance",
        },
        unused=("dim_model",),
        more=_cpmant,
    ),
    "phi": _PHI,
    "persimmon": Architecture(
        16384,
        UNTIED,
        {**_PLAIN, **_BIASED, "head_norms": True},
        grouped=False,
        rotary=("partial_rotary_factor", 0.5),
        more=_phi,
    ),
    "stablelm": Architecture(
        4096,
        {
            "qkv_bias": ("use_qkv_bias", False),
            "joins": ("use_parallel_residual", False),
            **UNTIED,
        },
        {"norm": "layer"},
        kv_heads=32,
        square=True,
        rotary=("partial_rotary_factor", 0.25),
        more=_stablelm,
    ),
    "starcoder2": Architecture(
        4096,
        {**dict.fromkeys(_BIASES, ("use_bias", True)), **TIED},
        _PLAIN,
        kv_heads=2,
        window=0,
    ),
    "modernbert-decoder": Architecture(
        8192,
        {**BIAS, **MLP_BIAS, **TIED, "head_bias": ("decoder_bias", True)},
        {"embedding_norm": True, "head_projection": True},
        grouped=False,
        more=_modernbert,
    ),
}
