"""Architectures with latent attention or an indexer (DeepSeek, GLM-5, Kimi-K2, MiniMax-M3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from simulator.models.architectures.architecture import (
    Rule,
    attention_of,
    dense_layers,
    mlp_of,
    read_table,
    routed,
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


def _latent(
    rank: int = 1536,
    attentions: Callable[[Reader, LatentAttention], list[Any]] | None = None,
    **more: Any,
) -> Rule:
    """Return the rule for latent attention; ``rank`` is the default of the queries' rank, and
    ``attentions`` returns the attention of each layer from the usual one."""

    def rule(read: Reader) -> ConfigFields:
        latent = latent_of(read, "latent", rank, **more)
        each = attentions(read, latent) if attentions else [latent] * read["layers"]
        return {"attentions": each}

    return rule


def _index(read: Reader, rank: int, **more: Any) -> Indexer:
    return Indexer(rank=rank, **read.fields("indexer"), **more)


def _indexed(read: Reader, latent: LatentAttention) -> list[LatentAttention]:
    """Return attention to selected positions. Layers may share the selection of the layer before
    (GLM-5.2, arXiv 2603.12201)."""
    read.types("layer_types", ("indexed_attention",), lambda layer: "indexed_attention")
    topk = read.integer("index_topk", 2048)
    shares = replace(latent, topk=topk)
    selects = replace(shares, indexer=_index(read, latent.query_rank))
    return [selects if own else shares for own in _selecting(read)]


def _selecting(read: Reader) -> list[bool]:
    """Return which layers have an own indexer, as a list states or two rules."""
    layers = read["layers"]
    pattern = read.value(
        "index_topk_pattern",
        "F" * layers,
        f"{layers} letters F or S",
        lambda x: isinstance(x, str) and len(x) == layers and not {*x} - {*"FS"},
    )
    step = read.integer("index_topk_freq", 1)
    offset = read.integer("index_skip_topk_offset", 2)

    def usual(layer: int) -> bool:
        return pattern[layer] == "F" and max(layer - offset + 1, 0) % step == 0

    return read.of_kind("full", "shared", usual, "indexer_types")


def _with_entries(sublayers: Sequence[Any], entry: Entry) -> list[Any]:
    return [replace(sublayer, entry=entry) for sublayer in sublayers]


def _axk1(read: Reader) -> ConfigFields:
    """Return layers whose experts are also followed by a norm."""
    mlps = [replace(mlp, norms=(True, isinstance(mlp, Experts))) for mlp in read["mlps"]]
    return {**_latent()(read), "mlps": mlps}


def _axk2(read: Reader) -> ConfigFields:
    """Return layers whose norms before attention and experts are gated."""
    attentions = _latent(384, _indexed, gate="query")(read)["attentions"]
    entry = GatedNorm(rank=read.integer("gated_norm_rank", 16))
    mlps = [replace(mlp, entry=entry) if isinstance(mlp, Experts) else mlp for mlp in read["mlps"]]
    return {"attentions": _with_entries(attentions, entry), "mlps": mlps}


def _streams(
    read: Reader, attentions: Sequence[Any], mlps: Sequence[Any], streams: Streams
) -> ConfigFields:
    """Return layers between which the residual is several streams."""
    return {
        "attentions": _with_entries(attentions, streams),
        "mlps": _with_entries(mlps, streams),
        "other_parameters": streams.last(read["hidden"]),
    }


def _hy_v4(read: Reader) -> ConfigFields:
    # the layers 0, 1, 5, 9 and so on select
    usual = ["full" if i in (0, 1) or i % 4 == 1 else "shared" for i in range(read["layers"])]
    if read.raw("indexer_types") is None:
        read = replace(read, data={**read.data, "indexer_types": usual})
    attentions = _latent(attentions=_indexed, gate="value", sinks=True)(read)["attentions"]
    return _streams(read, attentions, read["mlps"], Streams(streams=read.integer("hc_mult", 4)))


_SPARSE = "compressed_sparse_attention"
_HEAVY = "heavily_compressed_attention"
_RATIOS = {"sliding_attention": 0, _SPARSE: 4, _HEAVY: 128}
"""Positions per entry of the compressed cache of DeepSeek-V4 by type of layer, 0 without one."""


def _deepseek_v4(read: Reader) -> ConfigFields:
    if read.flag("attention_bias"):
        raise read.fail("attention_bias", "expected false, got True")
    # a table maps token ids to experts in the first layers
    hashed = read.integer("num_hash_layers", 3, low=0)
    routed = read.of_kind("moe", "hash_moe", lambda layer: layer >= hashed, "mlp_layer_types")
    ratios = _ratios(read)
    attention = {kind: _compressed(read, kind, ratios[kind]) for kind in _RATIOS}
    attentions = [attention[kind] for kind in _compressed_types(read)]
    mlps = [replace(mlp, router_bias=bias) for mlp, bias in zip(read["mlps"], routed)]
    streams = Streams(streams=read.integer("hc_mult", 4), mixes=True)
    return _streams(read, attentions, mlps, streams)


def _compressed_types(read: Reader) -> list[str]:
    """Return the type of each layer; released files state the positions per entry instead."""
    layers = read["layers"]
    names = {ratio: kind for kind, ratio in _RATIOS.items()}

    def right(stated: Any) -> bool:
        # further numbers are those of layers that predict further tokens
        known = isinstance(stated, list) and all(ratio in (*names,) for ratio in stated)
        return known and len(stated) >= layers

    usual = [4 if i > 2 and i % 2 else 128 for i in range(layers)]
    stated = read.value("compress_ratios", usual, f"a list of {layers} of 0, 4 or 128", right)
    return read.types("layer_types", (*_RATIOS,), lambda layer: names[stated[layer]])


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
    names = ("indexed_attention", "sliding_attention", "full_attention")
    types = read.types("layer_types", names, lambda i: names[i >= 2 and i % 4 != 1])
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
    found = routed(read, "n_routed_experts", shared=wide, dense=dense_layers(read, 1))
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
    attention = attention_of(read)
    old = read.raw("sparse_attention_config") is not None
    inside = read.part("sparse_attention_config") if old else read
    kind = "minimax_m3 sparse_attention_config" if old else "minimax_m3"
    indexer = Indexer(**inside.fields(f"{kind} indexer"), weighs=False)
    topk = math.prod(inside.fields(f"{kind} blocks").values())
    usual = (inside.flags("sparse_attention_freq") if old else []) or [False] * read["layers"]
    selecting = read.of_kind("minimax_m3_sparse", "full_attention", usual.__getitem__)
    sparse = replace(attention, topk=topk, indexer=indexer)
    attentions = [sparse if own else attention for own in selecting]
    inner = read.integer("dense_intermediate_size", 12288)
    wide = read.integer("shared_intermediate_size", 3072)
    wide *= read.integer("n_shared_experts", 1)
    dense = read.with_fields(inner=inner)
    found = routed(dense, "num_local_experts", read["inner"], wide, dense_layers(read, 0))
    return {"attentions": attentions, **found}


def _mimo_v2(read: Reader) -> ConfigFields:
    """Return layers with all positions, and layers with a window, sinks and twice the KV heads."""
    usual = [i > 0 and (i + 1) % 6 > 0 for i in range(read["layers"])]
    pattern = read.flags("hybrid_layer_pattern") or usual
    slides = read.of_kind("sliding_attention", "full_attention", pattern.__getitem__)
    former = read.or_none("sliding_window_size", 0)  # without the query's own position
    window = former + 1 if former else read.integer("sliding_window", 129)
    full = replace(attention_of(read), value_dim=read.integer("v_head_dim", 128))
    other = replace(
        full,
        kv_heads=read.integer("swa_num_key_value_heads", 2 * read["kv_heads"]),
        value_dim=read.integer("swa_v_head_dim", full.value_dim),
        window=window,
        **read.fields("mimo_v2 window"),
    )
    read.divisor("swa_num_key_value_heads", other.kv_heads, other.heads, "swa_num_attention_heads")
    full = replace(full, sinks=read.flag("add_full_attention_sink_bias"))
    return {"attentions": [other if own else full for own in slides]}


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
    return _streams(read, attentions, fields["mlps"], streams)


TABLE = read_table(
    "latent",
    more={
        "deepseek_v2": _latent(),
        "deepseek_v3": _latent(),
        "deepseek_v32": _latent(attentions=_indexed),
        "glm_moe_dsa": _latent(2048, _indexed),
        "axk1": _axk1,
        "axk2": _axk2,
        "hy_v4": _hy_v4,
        "deepseek_v4": _deepseek_v4,
        "dots3_note_text": _dots3,
        "glm4_moe_lite": _latent(768),
        "sarvam_mla": _latent(0),
        "youtu": _latent(),
        "minicpm3": _latent(768),
        "longcat_flash": _longcat,
        "minimax_m3_vl_text": _minimax_m3,
        "mimo_v2_flash": _mimo_v2,
        "qwen4_exp_text": _qwen4,
    },
)
