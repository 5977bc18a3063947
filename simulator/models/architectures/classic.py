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
    return lambda read: {"inner": read.integer(key, 4) * read["hidden"]}


def _bigcode(read: Reader) -> ConfigFields:
    return {"kv_heads": 1 if read.flag("multi_query", True) else read["heads"]}


def _gptj(read: Reader) -> ConfigFields:
    return {"rotary_dim": read.or_none("rotary_dim", 64) or read["head_dim"]}


def _gpt_neo(read: Reader) -> ConfigFields:
    """Return the windows of local layers, from patterns and how often each repeats."""

    def right(value: object) -> bool:
        return isinstance(value, list) and all(
            isinstance(item, list)
            and len(item) == 2
            and isinstance(item[0], list)
            and {*item[0]} <= {"global", "local"}
            and isinstance(item[1], int)
            and 0 <= item[1] <= read["layers"]
            for item in value
        )

    pairs = "a list of pairs of a list of global or local, and a number"
    patterns = read.value("attention_types", [[["global", "local"], 12]], pairs, right)
    kinds = [kind for names, many in patterns for kind in names * many]
    if len(kinds) != read["layers"]:
        raise read.fail("attention_types", f"expected {read['layers']} layers, got {len(kinds)}")
    window = read.integer("window_size", 256)
    return {"windows": tuple(window if kind == "local" else 0 for kind in kinds)}


def _neox_japanese(read: Reader) -> ConfigFields:
    """Return attention whose last layer has a bias."""
    plain = attention_of(read)
    attentions = [plain] * (read["layers"] - 1) + [replace(plain, o_bias=True)]
    inner = _times_hidden("intermediate_multiple_size")(read)
    return {"attentions": attentions} | inner


def _falcon(read: Reader) -> ConfigFields:
    new = read.flag("new_decoder_architecture")
    parallel = read.flag("parallel_attn", True)
    grouped = read.integer("num_key_value_heads", read["heads"])
    several = 1 if read.flag("multi_query", True) else read["heads"]
    norms = read.integer("num_ln_in_parallel_attn", 2 if new else 1)
    return {
        "kv_heads": grouped if new else several,
        "rotary_dim": 0 if read.flag("alibi") else read["head_dim"],
        "parallel_residual": parallel and norms == 2,
        "joins": parallel and norms != 2,
    }


def _cpmant(read: Reader) -> ConfigFields:
    """Return the parameters of prompts, of segments, and of biases by distance and by pair of
    segments."""
    segments = read.integer("segment_types", 32)
    prompts = read.integer("prompt_types", 32) * read.integer("prompt_length", 32)
    biases = read.integer("position_bias_num_buckets", 512) + segments**2
    vectors = (prompts + segments) * read["hidden"]
    return {"other_parameters": vectors + biases * read["heads"]}


def _modernbert(read: Reader) -> ConfigFields:
    """Return layers of which the first has no norm before its attention."""
    layers = read["layers"]
    window = read.or_none("local_attention", 128) // 2
    step = read.integer("global_attn_every_n_layers", 3)
    local = read.of_kind("sliding_attention", "full_attention", lambda layer: layer % step > 0)
    plain = attention_of(read)
    return {
        "windows": tuple(window if inside else 0 for inside in local),
        "attentions": [replace(plain, norms=(False, False))] + [plain] * (layers - 1),
        "other_parameters": read["hidden"] * read.flag("classifier_bias"),
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
