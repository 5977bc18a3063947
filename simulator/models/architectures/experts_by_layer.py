"""Architectures with routed experts whose layers differ in windows, positions or heads."""

from __future__ import annotations

from dataclasses import replace

from simulator.models.architectures.architecture import (
    attention_of,
    dense_layers,
    except_every,
    read_table,
    routed,
    windowed_rotary,
)
from simulator.models.architectures.dense import granite_swa
from simulator.models.architectures.experts import sparse_steps
from simulator.models.architectures.reader import ConfigFields, Reader
from simulator.models.sublayers import Attention


def _afmoe(read: Reader) -> ConfigFields:
    every = read.integer("global_attn_every_n_layers", 4)
    return {"windows": read.windows(1024, except_every(every))}


def _cohere2_moe(read: Reader) -> ConfigFields:
    first = read.integer("first_k_dense_replace", 0, low=0)
    prefix = read.integer("prefix_dense_sliding_window_pattern", 1)
    step = read.integer("sliding_window_pattern", 4)

    def windowed(layer: int) -> bool:
        return (layer + 1) % prefix > 0 if layer < first else (layer - first + 1) % step > 0

    windows = read.windows(4096, windowed)
    dense = dense_layers(read, first)
    rotary = [window > 0 or (dense(i) and prefix == 1) for i, window in enumerate(windows)]
    width = read["inner"]
    shared = read.integer("num_shared_experts", 0, low=0) * width
    plain = read.with_fields(inner=read.integer("prefix_dense_intermediate_size", width))
    mlps = routed(plain, "num_experts", width, shared, dense)["mlps"]
    return {
        "norm": "layer_without_bias" if read.raw("rms_norm_eps") is None else "rms",
        **windowed_rotary(read, windows, rotary),
        "mlps": [replace(mlp, joins=True) for mlp in mlps],
    }


def _dots1(read: Reader) -> ConfigFields:
    last = read.integer("max_window_layers", read["layers"], low=0)
    return {"windows": read.windows(4096, lambda layer: layer >= last)}


def _exaone_moe(read: Reader) -> ConfigFields:
    # a text pattern is accepted beside layer_types alone
    listed = read.raw("layer_types") is not None
    step = 1 if listed else read.integer("sliding_window_pattern", 4)
    windows = read.windows(4096, except_every(step))
    rotary = () if any(windows) else [1] * read["layers"]
    return windowed_rotary(read, windows, rotary)


def _flint(read: Reader) -> ConfigFields:
    layers = read["layers"]
    windows = read.windows(513, lambda layer: layer > 1 and layer % 4 != 1 and layer < layers - 1)
    shared = read.integer("shared_expert_intermediate_size", 1024, low=0)
    dense = sparse_steps(read, [0, 1])
    return {"windows": windows} | routed(read, "num_experts", shared=shared, dense=dense)


def _laguna(read: Reader) -> ConfigFields:
    features = read["head_dim"]
    gating = read.value(
        "gating",
        True,
        "true, per-head or per-element",
        lambda x: x in (True, "per-head", "per-element"),
    )
    heads = read.integers("num_attention_heads_per_layer", read["heads"])
    usual = attention_of(read)

    def attention(heads: int, window: int) -> Attention:
        kind = "sliding_attention" if window else "full_attention"
        default = 1.0 if window or read.has("rope_parameters") else 0.5
        rotary = int(features * read.rotary("partial_rotary_factor", default, kind))
        gates = heads * features if gating == "per-element" else heads
        return replace(usual, heads=heads, gates=gates, rotary=rotary)

    return {"attentions": list(map(attention, heads, read["windows"]))}


TABLE = read_table(
    "experts_by_layer",
    more={
        "afmoe": _afmoe,
        "cohere2_moe": _cohere2_moe,
        "dots1": _dots1,
        "exaone_moe": _exaone_moe,
        "flint": _flint,
        "granitemoe_swa": granite_swa,
        "laguna": _laguna,
    },
)
