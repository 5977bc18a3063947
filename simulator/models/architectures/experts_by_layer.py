"""Architectures with routed experts whose layers differ in windows, positions or heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from simulator.models.architectures.architecture import (
    BIAS,
    TIED,
    UNTIED,
    Architecture,
    attention_of,
    dense_layers,
    rotated,
    routed,
)
from simulator.models.architectures.experts import HEAD_NORMS, ROUTED, granite_shared, mixture
from simulator.models.architectures.reader import ConfigFields, Reader
from simulator.models.sublayers import Attention


def _afmoe(read: Reader, values: ConfigFields) -> ConfigFields:
    every = read.integer("global_attn_every_n_layers", 4)
    windows = read.windows(values["layers"], 1024, lambda layer: (layer + 1) % every > 0)
    gates = {"gates": values["heads"] * values["head_dim"]}
    attentions = rotated(values | gates, [window > 0 for window in windows])
    mlps = mixture(shared=2, first=1)(read, values)
    return {"windows": windows, "attentions": attentions} | mlps


def _cohere2_moe(read: Reader, values: ConfigFields) -> ConfigFields:
    layers, first = values["layers"], read.integer("first_k_dense_replace", 0, low=0)
    prefix = read.integer("prefix_dense_sliding_window_pattern", 1)
    step = read.integer("sliding_window_pattern", 4)

    def windowed(layer: int) -> bool:
        return (layer + 1) % prefix > 0 if layer < first else (layer - first + 1) % step > 0

    windows, dense = read.windows(layers, 4096, windowed), dense_layers(read, layers, first)
    rotary = [window > 0 or (dense(i) and prefix == 1) for i, window in enumerate(windows)]
    width = values["inner"]
    shared = read.integer("num_shared_experts", 0, low=0) * width
    plain = {"inner": read.integer("prefix_dense_intermediate_size", width)}
    mlps = routed(read, values | plain, "num_experts", width, shared, dense)["mlps"]
    return {
        "norm": "layer_without_bias" if read.raw("rms_norm_eps") is None else "rms",
        "windows": windows,
        "attentions": rotated(values, rotary),
        "mlps": [replace(mlp, joins=True) for mlp in mlps],
    }


def _dots1(read: Reader, values: ConfigFields) -> ConfigFields:
    layers = values["layers"]
    last = read.integer("max_window_layers", layers, low=0)
    windows = read.windows(layers, 4096, lambda layer: layer >= last)
    return {"windows": windows} | mixture(shared=0, first=0)(read, values)


def _exaone_moe(read: Reader, values: ConfigFields) -> ConfigFields:
    layers = values["layers"]
    # a text pattern is accepted beside layer_types alone
    listed = read.raw("layer_types") is not None
    step = 1 if listed else read.integer("sliding_window_pattern", 4)
    windows = read.windows(layers, 4096, lambda layer: (layer + 1) % step > 0)
    attentions = rotated(values, [window > 0 or not any(windows) for window in windows])
    mlps = mixture(shared=1, first=1)(read, values)
    return {"windows": windows, "attentions": attentions} | mlps


def _flint(read: Reader, values: ConfigFields) -> ConfigFields:
    layers, step = values["layers"], read.integer("decoder_sparse_step", 1)
    plain = read.numbers("mlp_only_layers", [0, 1], layers)
    windows = read.windows(
        layers, 513, lambda layer: layer > 1 and layer % 4 != 1 and layer < layers - 1
    )
    width, wide = (
        read.integer("moe_intermediate_size"),
        read.integer("shared_expert_intermediate_size", 1024, low=0),
    )
    mlps = routed(
        read, values, "num_experts", width, wide, lambda i: i in plain or (i + 1) % step > 0
    )
    attentions = rotated(values, [window > 0 for window in windows])
    return {"windows": windows, "attentions": attentions} | mlps


def _granite_windows(read: Reader, values: ConfigFields) -> ConfigFields:
    layers = values["layers"]
    bases = read.value(
        "layer_rope_theta",
        [1] * layers,
        f"a list of {layers} numbers",
        lambda x: isinstance(x, list) and len(x) == layers,
    )
    return {"attentions": rotated(values, list(map(bool, bases)))} | granite_shared(read, values)


def _laguna(read: Reader, values: ConfigFields) -> ConfigFields:
    layers, features = values["layers"], values["head_dim"]
    gating = read.value(
        "gating",
        True,
        "true, per-head or per-element",
        lambda x: x in (True, "per-head", "per-element"),
    )
    heads = read.integers("num_attention_heads_per_layer", values["heads"], layers)
    usual = attention_of(values)

    def attention(heads: int, window: int) -> Attention:
        kind = "sliding_attention" if window else "full_attention"
        default = 1.0 if window or read.has("rope_parameters") else 0.5
        rotary = int(features * read.rotary("partial_rotary_factor", default, kind))
        gates = heads * features if gating == "per-element" else heads
        return replace(usual, heads=heads, gates=gates, rotary=rotary)

    width, wide = (
        read.integer("moe_intermediate_size"),
        read.integer("shared_expert_intermediate_size", 512, low=0),
    )
    mlps = routed(read, values, "num_experts", width, wide, dense_layers(read, layers, 1))
    return {"attentions": list(map(attention, heads, values["windows"]))} | mlps


TABLE: Mapping[str, Architecture] = {
    "afmoe": Architecture(
        16384,
        {**BIAS, **UNTIED},
        {**HEAD_NORMS, "post_norms": True, "router_bias": True},
        head_dim=128,
        keys={"first_k_dense_replace": "num_dense_layers"},
        unused=("num_expert_groups", "num_limited_groups"),
        more=_afmoe,
    ),
    "cohere2_moe": Architecture(8192, {**BIAS, **TIED}, head_dim=128, more=_cohere2_moe),
    "dots1": Architecture(
        2048,
        {**BIAS, **UNTIED},
        # files of the default configuration have no number of active experts; dots.llm1 has 6
        {**HEAD_NORMS, "router_bias": True, "active": 6},
        keys=ROUTED,
        unused=("moe_layer_freq",),
        more=_dots1,
    ),
    "exaone_moe": Architecture(
        2048,
        UNTIED,
        {**HEAD_NORMS, "router_bias": True},
        kv_heads=32,
        unused=("is_moe_layer",),
        more=_exaone_moe,
    ),
    "flint": Architecture(
        262144,
        {**BIAS, **UNTIED},
        {**HEAD_NORMS, "sinks": True},
        kv_heads=4,
        head_dim=128,
        more=_flint,
    ),
    "granitemoe_swa": Architecture(
        2048,
        {**BIAS, **UNTIED},
        {"sinks": True},
        window=128,
        windowed=lambda layer: layer % 4 > 0,
        more=_granite_windows,
    ),
    "laguna": Architecture(
        131072,
        {**BIAS, **UNTIED},
        {**HEAD_NORMS, "router_bias": True},
        kv_heads=8,
        head_dim=128,
        window=512,
        windowed=lambda layer: False,
        more=_laguna,
    ),
}
