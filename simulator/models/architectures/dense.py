"""Architectures of dense decoders with grouped-query attention."""

from __future__ import annotations

from dataclasses import replace

from simulator.models.architectures.architecture import (
    attention_of,
    except_every,
    mlp_of,
    read_table,
    rotary_layers,
    rotated,
    windowed_rotary,
)
from simulator.models.architectures.reader import ConfigFields, Reader

MAX_LOOPS = 100  # largest number of times that a model may repeat its layers


def _smollm3(read: Reader) -> ConfigFields:
    rotary = rotary_layers(read)
    windows = read.windows(0, lambda layer: not rotary[layer], read.flag("use_sliding_window"))
    return {"windows": windows, "attentions": rotated(read, rotary)}


def _qwen(read: Reader) -> ConfigFields:
    used = read.flag("use_sliding_window")
    first = read.integer("max_window_layers", 28, low=0)
    return {"windows": read.windows(4096, lambda layer: layer >= first, used)}


def _gemma3(read: Reader) -> ConfigFields:
    step = read.integer("sliding_window_pattern", read.integer("_sliding_window_pattern", 6))
    return {"windows": read.windows(4096, except_every(step))}


def _opt(read: Reader) -> ConfigFields:
    width = read.integer("word_embed_proj_dim", read["hidden"])
    before = read["pre_norms"]
    return {
        "post_norms": not before,
        "final_norm": before and not read.flag("_remove_final_layer_norm"),
        "embedding_width": 0 if width == read["hidden"] else width,
    }


def _cohere2(read: Reader) -> ConfigFields:
    """Return layers with a window and rotary positions, or neither."""
    step = read.integer("sliding_window_pattern", 4)
    return {"windows": read.windows(4096, except_every(step))}


def _compass(read: Reader) -> ConfigFields:
    """Return layers with rotary positions, except for kinds of layers whose parameters are null."""
    known = ("full_attention", "sliding_attention")
    kinds = read.types("layer_types", known, lambda layer: "full_attention")
    rope = read.raw("rope_parameters") or {}
    return {"attentions": rotated(read, [rope.get(kind, kind) is not None for kind in kinds])}


def _exaone4(read: Reader) -> ConfigFields:
    """Return layers of which those with a window have rotary positions, or all without windows."""
    # published files state the pattern as letters, beside a list
    step = 4 if read.has("layer_types") else read.integer("sliding_window_pattern", 4)
    windows = read.windows(4096, except_every(step))
    whole = not read.or_none("sliding_window", 4096)
    return windowed_rotary(read, windows, [1] * len(windows) if whole else ())


def granite_swa(read: Reader) -> ConfigFields:
    """Return layers of which those with a base frequency of 0 have no rotary positions."""
    layers = read["layers"]
    expected = f"a list of {layers} numbers"
    bases = read.items("layer_rope_theta", [1] * layers, expected, lambda base: True, layers)
    return {"attentions": rotated(read, [bool(base) for base in bases])}


def _doge(read: Reader) -> ConfigFields:
    if read.flag("is_moe"):
        raise read.fail("is_moe", "expected false: experts of single vectors are not supported")
    return {}


def _apertus1p5(read: Reader) -> ConfigFields:
    outputs = read.integer("output_vocab_size", read["vocab"], high=read["vocab"])
    return {"head_vocab": 0 if outputs == read["vocab"] else outputs}


def _dory_layers(read: Reader) -> int:
    """Return the number of layers; published files count attention and MLPs."""
    types = read.raw("layer_types")
    return read.layers() // (2 if isinstance(types, list) and "mlp" in types else 1)


def _dory(read: Reader) -> ConfigFields:
    """Return layers of which those in the middle are repeated, each time with a cache of its
    own."""
    layers = read["layers"]
    parts = read.layers() // layers
    kinds = ("full_attention", "sliding_attention", "mlp")
    every = read.with_fields(layers=layers * parts)
    types = every.types("layer_types", kinds, lambda i: kinds[(i // parts + 1) % 4 > 0])[::parts]
    windows = [read.integer("sliding_window", 1024) * (kind != "full_attention") for kind in types]
    first, last = (
        read.integer(f"n_{end}_layers", 8, low=0) // parts for end in ("input", "output")
    )
    middle = read.integer("n_recurrent_layers", (layers - first - last) * parts) // parts
    if (stated := first + middle + last) != layers:
        expected = f"expected {layers} layers of num_hidden_layers, got {stated}"
        raise read.fail("n_recurrent_layers", expected)
    if read.raw("recurrent_kv_cache_mode") not in (None, "per_loop"):
        raise read.fail("recurrent_kv_cache_mode", "expected per_loop; others are not supported")
    loops = read.integer("n_recurrent_loops", 2, high=MAX_LOOPS)
    again = range(first, first + middle)
    order = [*range(again.stop), *[*again] * (loops - 1), *range(again.stop, layers)]
    reused = [place >= again.stop and number in again for place, number in enumerate(order)]
    attention = attention_of(read)
    mlp = mlp_of(read)
    return {
        "windows": tuple(windows[number] for number in order),
        "attentions": [replace(attention, reused=some) for some in reused],
        "mlps": [replace(mlp, reused=some) for some in reused],
    }


TABLE = read_table(
    "dense",
    more={
        "qwen2": _qwen,
        "qwen3": _qwen,
        "gemma3_text": _gemma3,
        "opt": _opt,
        "smollm3": _smollm3,
        "exaone4": _exaone4,
        "doge": _doge,
        "dory": _dory,
        "granite_swa": granite_swa,
        "apertus1p5_text": _apertus1p5,
        "cohere2": _cohere2,
        "cohere_compass_text": _compass,
    },
    many={
        "dory": _dory_layers,
    },
)
