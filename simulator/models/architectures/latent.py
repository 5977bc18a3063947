"""Architectures with latent attention or an indexer (DeepSeek, GLM-5, Kimi-K2, MiniMax-M3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from simulator.models.architectures.architecture import (
    Rule,
    attention_of,
    mlp_of,
    read_table,
    routed,
    windowed_rotary,
)
from simulator.models.architectures.experts import qwen_layers
from simulator.models.architectures.hybrids import latent_of, qwen_mixers
from simulator.models.architectures.reader import ConfigFields, Reader
from simulator.models.sublayers import (
    Attention,
    CompressedAttention,
    Experts,
    LatentAttention,
)
from simulator.models.sublayers.entry import Entry, GatedNorm, Streams
from simulator.models.sublayers.indexer import Compressor, Indexer


def _dense_layers(read: Reader, first: int) -> Callable[[int], bool]:
    """Return which layers have no experts: the first ones, those between one of so many, or as a
    list states."""
    layers = read["layers"]
    kinds = read.types("mlp_layer_types", layers, ("dense", "sparse"))
    start = read.integer("first_k_dense_replace", first, low=0)
    sparse = _flags(read, "moe_layer_freq", layers)
    if kinds:
        sparse = [kind == "sparse" for kind in kinds]
    elif not sparse:
        every = read.integer("moe_layer_freq", 1)
        sparse = [i >= start and i % every == 0 for i in range(layers)]
    return lambda layer: not sparse[layer]


def _flags(read: Reader, key: str, layers: int) -> list[bool]:
    """Return a list of 0 and 1 per layer; an empty list for another value."""
    if not isinstance(read.raw(key), list):
        return []
    flags = read.items(key, None, f"a list of {layers} of 0 or 1", (0, 1).__contains__, layers)
    return [bool(flag) for flag in flags]


def _experts(
    read: Reader, shared: int, dense: Callable[[int], bool] = lambda layer: False
) -> list[Any]:
    """Return the MLP of each layer; ``shared`` is the default number of shared experts."""
    copies = read.or_none("n_shared_experts", shared)
    return list(routed(read, "n_routed_experts", dense=dense, copies=copies)["mlps"])


def _deepseek(
    shared: int = 1,
    first: int = 1,
    rank: int = 1536,
    attentions: Callable[[Reader, LatentAttention], list[Any]] | None = None,
    **more: Any,
) -> Rule:
    """Return the rule for latent attention and experts, with defaults of shared experts and first
    dense layers. ``attentions`` returns the attention of each layer from the usual one."""

    def rule(read: Reader) -> ConfigFields:
        layers = read["layers"]
        latent = latent_of(read, "latent", rank, **more)
        each = attentions(read, latent) if attentions else [latent] * layers
        return {"attentions": each, "mlps": _experts(read, shared, _dense_layers(read, first))}

    return rule


def _dense(rank: int) -> Rule:
    """Return the rule for latent attention and an MLP."""
    return lambda read: {"attentions": [latent_of(read, "latent", rank)] * read["layers"]}


def _index(read: Reader, rank: int, **more: Any) -> Indexer:
    return Indexer(rank=rank, **read.fields("indexer"), **more)


def _indexed(read: Reader, latent: LatentAttention) -> list[LatentAttention]:
    """Return attention to selected positions. Layers may share the selection of the layer before
    (GLM-5.2, arXiv 2603.12201)."""
    layers = read["layers"]
    read.layer_types(layers, ("indexed_attention",))
    topk = read.integer("index_topk", 2048)
    shares = replace(latent, topk=topk)
    selects = replace(shares, indexer=_index(read, latent.query_rank))
    return [selects if own else shares for own in _selecting(read)]


def _selecting(read: Reader) -> list[bool]:
    """Return which layers have an own indexer, as a list states or two rules."""
    layers = read["layers"]
    kinds = read.types("indexer_types", layers, ("full", "shared"))
    pattern = read.value(
        "index_topk_pattern",
        "F" * layers,
        f"{layers} letters F or S",
        lambda x: isinstance(x, str) and len(x) == layers and not {*x} - {*"FS"},
    )
    step = read.integer("index_topk_freq", 1)
    offset = read.integer("index_skip_topk_offset", 2)
    if kinds:
        return [kind == "full" for kind in kinds]
    return [
        letter == "F" and max(i - offset + 1, 0) % step == 0 for i, letter in enumerate(pattern)
    ]


def _with_entries(sublayers: Sequence[Any], entry: Entry) -> list[Any]:
    return [replace(sublayer, entry=entry) for sublayer in sublayers]


def _axk1(read: Reader) -> ConfigFields:
    """Return layers whose experts are also followed by a norm."""
    fields = _deepseek()(read)
    mlps = [replace(mlp, norms=(True, isinstance(mlp, Experts))) for mlp in fields["mlps"]]
    return {**fields, "mlps": mlps}


def _axk2(read: Reader) -> ConfigFields:
    """Return layers whose norms before attention and experts are gated."""
    fields = _deepseek(rank=384, attentions=_indexed, gate="query")(read)
    entry = GatedNorm(rank=read.integer("gated_norm_rank", 16))
    mlps = [
        replace(mlp, entry=entry) if isinstance(mlp, Experts) else mlp for mlp in fields["mlps"]
    ]
    return {"attentions": _with_entries(fields["attentions"], entry), "mlps": mlps}


def _streams(read: Reader, fields: ConfigFields, streams: Streams) -> ConfigFields:
    """Return layers between which the residual is several streams."""
    return {
        **fields,
        "attentions": _with_entries(fields["attentions"], streams),
        "mlps": _with_entries(fields["mlps"], streams),
        "other_parameters": streams.last(read["hidden"]),
    }


def _hy_v4(read: Reader) -> ConfigFields:
    layers = read["layers"]
    # the layers 0, 1, 5, 9 and so on select
    usual = ["full" if i == 0 or (i - 1) % 4 == 0 else "shared" for i in range(layers)]
    if read.raw("indexer_types") is None:
        read = replace(read, data={**read.data, "indexer_types": usual})
    fields = _deepseek(attentions=_indexed, gate="value", sinks=True)(read)
    return _streams(read, fields, Streams(streams=read.integer("hc_mult", 4)))


_SPARSE = "compressed_sparse_attention"
_HEAVY = "heavily_compressed_attention"
_RATIOS = {"sliding_attention": 0, _SPARSE: 4, _HEAVY: 128}
"""Positions per entry of the compressed cache of DeepSeek-V4 by type of layer, 0 without one."""


def _deepseek_v4(read: Reader) -> ConfigFields:
    layers = read["layers"]
    if read.flag("attention_bias"):
        raise read.fail("attention_bias", "expected false, got True")
    kinds = read.types("mlp_layer_types", layers, ("hash_moe", "moe"))
    hashed = read.integer("num_hash_layers", 3, low=0)
    kinds = kinds or ["hash_moe" if i < hashed else "moe" for i in range(layers)]
    types = _compressed_types(read)
    ratios = _ratios(read)
    attention = {kind: _compressed(read, kind, ratios[kind]) for kind in _RATIOS}
    experts = _experts(read, 1)
    # a table maps token ids to experts in the first layers
    biased = {kind: replace(experts[0], router_bias=kind == "moe") for kind in {*kinds}}
    fields = {
        "attentions": [attention[kind] for kind in types],
        "mlps": [biased[kind] for kind in kinds],
    }
    streams = Streams(streams=read.integer("hc_mult", 4), mixes=True)
    return _streams(read, fields, streams)


def _compressed_types(read: Reader) -> list[str]:
    """Return the type of each layer; released files state the positions per entry instead."""
    layers = read["layers"]
    types = read.layer_types(layers, tuple(_RATIOS))
    names = {ratio: kind for kind, ratio in _RATIOS.items()}

    def right(stated: Any) -> bool:
        # further numbers are those of layers that predict further tokens
        known = isinstance(stated, list) and all(ratio in (*names,) for ratio in stated)
        return known and len(stated) >= layers

    usual = [4 if i > 2 and i % 2 else 128 for i in range(layers)]
    stated = read.value("compress_ratios", usual, f"a list of {layers} of 0, 4 or 128", right)
    return types or [names[ratio] for ratio in stated[:layers]]


def _ratios(read: Reader) -> dict[str, int]:
    """Return the positions per entry of each type of layer."""
    stated = read.part("compress_rates") if read.raw("compress_rates") is not None else read
    former = {_SPARSE: "compress_rate_csa", _HEAVY: "compress_rate_hca"}
    found = {
        kind: read.integer(key, stated.integer(kind, _RATIOS[kind])) for kind, key in former.items()
    }
    return {**_RATIOS, **found}


def _compressed(read: Reader, kind: str, ratio: int) -> CompressedAttention:
    sizes = read.fields("deepseek_v4 attention")
    width = read["head_dim"]
    heads = read["heads"]
    share = read.number("partial_rotary_factor", 64 / 512, high=1)
    rotary = read.integer("qk_rope_head_dim", max(int(width * share), 1), high=width)
    read.divisor("o_groups", sizes["groups"], heads, "num_attention_heads")
    # an entry of few positions also covers those of the entry before it, and an indexer selects
    selects = kind == _SPARSE
    compressor = Compressor(ratio=ratio, features=width, series=1 + selects) if ratio else None
    keys = Compressor(ratio=ratio or 1, features=read.integer("index_head_dim", 128), series=2)
    indexer = _index(read, sizes["query_rank"], ratio=ratio, compressor=keys)
    topk = read.integer("index_topk", 512)
    return CompressedAttention(
        heads=heads,
        rank=width - rotary,
        rotary=rotary,
        plain=width - rotary,
        value=width,
        sinks=True,
        topk=topk if selects else 0,
        indexer=indexer if selects else None,
        compressor=compressor,
        **sizes,
    )


def _dots3(read: Reader) -> ConfigFields:
    """Return layers that select positions, and layers with a window and other sizes, which
    ``per_layer_config`` or keys with ``swa_`` state."""
    layers = read["layers"]
    names = ("indexed_attention", "sliding_attention", "full_attention")
    usual = [names[i >= 2 and i % 4 != 1] for i in range(layers)]
    types = read.layer_types(layers, names) or usual
    latent = latent_of(read, "latent", 1024, gate="head", key_norm=True)
    own = read.raw("per_layer_config") is None
    windowed = _dots3_sliding(read, latent) if own else latent
    window = read.integer("sliding_window", read.integer("sliding_window_size", 512))
    full = latent
    if read.flag("use_dsa", True):
        topk = read.integer("index_topk", 2048)
        full = replace(latent, topk=topk, indexer=_index(read, latent.query_rank))
    slides = replace(windowed, window=window)
    attentions = [slides if kind == "sliding_attention" else full for kind in types]
    shared = "moe_shared_expert_intermediate_size"
    wide = read.integer(shared, read.integer("shared_experts_intermediate_size", 1536))
    wide *= read.integer("n_shared_experts", 1)
    dense = _dense_layers(read, 1)
    found = routed(read, "n_routed_experts", shared=wide, dense=dense)
    return {"attentions": attentions, **found}


def _dots3_sliding(read: Reader, latent: LatentAttention) -> LatentAttention:
    sizes = read.fields("dots3 sliding")
    read.integer("swa_num_key_value_heads", 64)
    rotary = read.integer("swa_head_dim", 256) - sizes["plain"]
    return replace(latent, rotary=read.integer("swa_qk_rope_head_dim", rotary), **sizes)


def _longcat(read: Reader) -> ConfigFields:
    """Return layers of two attentions and two MLPs; experts read the input of the first MLP, and
    their output joins after the second (arXiv 2509.01322).

    Tokens that choose experts without work compute fewer: on average, the choices are spread evenly
    (Transformers also allocates gate and up projections of these experts, which no checkpoint
    has)."""
    if read.flag("router_bias"):
        raise read.fail("router_bias", "expected false (a second bias), got True")
    latent = latent_of(read, "latent", 1536)
    mlp = mlp_of(read)
    experts = read.integer("n_routed_experts")
    none = read.or_none("zero_expert_num", 256)
    topk = read.integer("moe_topk", 12, high=experts + none)
    routed_experts = Experts(
        experts=experts,
        active=topk * experts / (experts + none),
        inner=read.integer("expert_ffn_hidden_size", 2048),
        outputs_of_router=experts + none,
        router_bias=True,
    )
    second = replace(latent, second=True)
    sublayers = (latent, routed_experts, replace(mlp, joins=True), second, mlp)
    return {"sublayers": [sublayers] * read["layers"]}


def _minimax_m3(read: Reader) -> ConfigFields:
    """Return layers of which some select blocks of positions; the configuration states them as
    types of layers, or in ``sparse_attention_config``."""
    layers = read["layers"]
    attention = replace(attention_of(read), rotary=read.integer("rotary_dim", 64))
    old = read.raw("sparse_attention_config") is not None
    inside = read.part("sparse_attention_config") if old else read
    kind = "minimax_m3 sparse_attention_config" if old else "minimax_m3"
    indexer = Indexer(**inside.fields(f"{kind} indexer"), weighs=False)
    topk = math.prod(inside.fields(f"{kind} blocks").values())
    types = read.layer_types(layers, ("full_attention", "minimax_m3_sparse"))
    selecting = [kind == "minimax_m3_sparse" for kind in types]
    selecting = selecting or (_flags(inside, "sparse_attention_freq", layers) if old else [])
    sparse = replace(attention, topk=topk, indexer=indexer)
    attentions = [sparse if own else attention for own in selecting or [False] * layers]
    inner = read.integer("dense_intermediate_size", 12288)
    wide = read.integer("shared_intermediate_size", 3072)
    wide *= read.integer("n_shared_experts", 1)
    dense = read.with_fields(inner=inner)
    experts = _dense_layers(read, 0)
    found = routed(dense, "num_local_experts", read["inner"], wide, experts)
    return {"attentions": attentions, **found}


def _mimo_v2(read: Reader) -> ConfigFields:
    """Return layers with all positions, and layers with a window, sinks and twice the KV heads."""
    layers = read["layers"]
    pattern = _flags(read, "hybrid_layer_pattern", layers)
    types = read.layer_types(layers, ("full_attention", "sliding_attention"))
    slides = [kind == "sliding_attention" for kind in types] or pattern
    slides = slides or [i > 0 and (i + 1) % 6 > 0 for i in range(layers)]
    former = read.or_none("sliding_window_size", 0)  # without the query's own position
    window = former + 1 if former else read.integer("sliding_window", 129)
    full = replace(attention_of(read), value_dim=read.integer("v_head_dim", 128))
    other = replace(
        full,
        heads=read.integer("swa_num_attention_heads", read["heads"]),
        kv_heads=read.integer("swa_num_key_value_heads", 2 * read["kv_heads"]),
        head_dim=read.integer("swa_head_dim", read["head_dim"]),
        value_dim=read.integer("swa_v_head_dim", full.value_dim),
        sinks=read.flag("add_swa_attention_sink_bias", True),
        window=window,
    )
    read.divisor("swa_num_key_value_heads", other.kv_heads, other.heads, "swa_num_attention_heads")
    full = replace(full, sinks=read.flag("add_full_attention_sink_bias"))
    mlps = _experts(read, 0, _dense_layers(read, 1))
    return {"attentions": [other if own else full for own in slides], "mlps": mlps}


def _beam(read: Reader) -> ConfigFields:
    gates = {"gates": read["heads"] * read["head_dim"]}
    mlps = routed(read, "num_experts", dense=_dense_layers(read, 3))
    return windowed_rotary(read.with_fields(**gates), read["windows"]) | mlps


def _kolibri(read: Reader) -> ConfigFields:
    shared = read.integer("shared_expert_intermediate_size", 512, low=0)
    count = "num_local_experts" if read.has("num_local_experts") else "num_experts"
    layers = windowed_rotary(read, read["windows"])
    return layers | routed(read, count, shared=shared)


def _qwen4(read: Reader) -> ConfigFields:
    """Return gated delta nets, and attention that selects positions by keys of several positions;
    between them, the residual is several streams."""
    if read.raw("ple_layer_ids"):
        raise read.fail("ple_layer_ids", "expected none: embeddings of n-grams are not supported")
    read.integer("indexer_kv_heads", 1, high=1)
    indexer = Indexer(**read.fields("qwen4 indexer"), weighs=False, joint=True)
    topk = read.integer("indexer_budget")
    types = read.raw("layer_types")
    if isinstance(types, list):  # released files write the name of attention to all positions
        types = ["full_attention" if name == "indexed_attention" else name for name in types]
    read = replace(read, data={**read.data, "layer_types": types})
    fields = qwen_mixers(read, "qkv") | qwen_layers(read)
    attentions = [
        replace(attention, topk=topk, indexer=indexer)
        if isinstance(attention, Attention)
        else attention
        for attention in fields["attentions"]
    ]
    streams = Streams(streams=read.integer("hc_count", 4), rank=read.integer("hc_lowrank", 320))
    return _streams(read, {**fields, "attentions": attentions}, streams)


TABLE = read_table(
    "latent",
    more={
        "deepseek_v2": _deepseek(shared=2, first=0),
        "deepseek_v3": _deepseek(first=3),
        "deepseek_v32": _deepseek(first=3, attentions=_indexed),
        "glm_moe_dsa": _deepseek(first=3, rank=2048, attentions=_indexed),
        "axk1": _axk1,
        "axk2": _axk2,
        "hy_v4": _hy_v4,
        "deepseek_v4": _deepseek_v4,
        "dots3_note_text": _dots3,
        "glm4_moe_lite": _deepseek(rank=768),
        "sarvam_mla": _deepseek(rank=0),
        "youtu": _dense(1536),
        "minicpm3": _dense(768),
        "longcat_flash": _longcat,
        "minimax_m3_vl_text": _minimax_m3,
        "mimo_v2_flash": _mimo_v2,
        "beam": _beam,
        "kolibri1": _kolibri,
        "qwen4_exp_text": _qwen4,
    },
)
