"""Architectures of older dense decoders: layer norms, learned positions or ALiBi, parallel
attention and MLP; and of encoders made decoders."""

from __future__ import annotations

from dataclasses import replace

from simulator.models.architectures.architecture import (
    Rule,
    attention_of,
    read_table,
)
from simulator.models.architectures.reader import ConfigFields, Reader


def _times_hidden(key: str) -> Rule:
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
    new = read.flag("new_decoder_architecture")
    parallel = read.flag("parallel_attn", True)
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


def _modernbert(read: Reader, values: ConfigFields) -> ConfigFields:
    """Return layers of which the first has no norm before its attention."""
    layers = values["layers"]
    window = read.or_none("local_attention", 128) // 2
    step = read.integer("global_attn_every_n_layers", 3)
    types = read.layer_types(layers, ("full_attention", "sliding_attention"))
    local = [t == "sliding_attention" for t in types] or [i % step > 0 for i in range(layers)]
    plain = attention_of(values)
    return {
        "windows": tuple(window if inside else 0 for inside in local),
        "attentions": [replace(plain, norms=(False, False))] + [plain] * (layers - 1),
        "other_parameters": values["hidden"] * read.flag("classifier_bias"),
    }


TABLE = read_table(
    "classic",
    more={
        "gpt_bigcode": _bigcode,
        "gpt_neo": _gpt_neo,
        "gptj": _gptj,
        "gpt_neox_japanese": _neox_japanese,
        "mpt": _times_hidden("expansion_ratio"),
        "falcon": _falcon,
        "cpmant": _cpmant,
        "modernbert-decoder": _modernbert,
    },
)
