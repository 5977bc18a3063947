"""Architectures with routed experts and grouped-query attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from simulator.codes import Part
from simulator.models.architectures.architecture import (
    attention_of,
    read_table,
    rotary_layers,
    routed,
    windowed_rotary,
)
from simulator.models.architectures.reader import ConfigFields, Reader
from simulator.models.sublayers import AttentionExperts, ConvolvedAttention, ResidualScale


def sparse_steps(read: Reader, plain: list[int]) -> Callable[[int], bool]:
    """Return which layers have no experts: those of a list with a default, and those between one of
    so many."""
    step = read.integer("decoder_sparse_step", 1)
    listed = read.numbers("mlp_only_layers", plain)
    return lambda layer: layer in listed or (layer + 1) % step > 0


def qwen_layers(read: Reader) -> ConfigFields:
    shared = (
        read.integer("shared_expert_intermediate_size", low=0) if read.get("shared_gate") else 0
    )
    # Transformers 5 saves Qwen3's number of experts under another name
    count = "num_local_experts" if "num_local_experts" in read.data else "num_experts"
    return routed(read, count, shared=shared, dense=sparse_steps(read, []))


def _qwen_experts(read: Reader) -> ConfigFields:
    used = read.flag("use_sliding_window")
    first = read.integer("max_window_layers", 28, low=0)
    every = not read.get("shared_gate")  # qwen2_moe: every other layer, up to max_window_layers
    windows = read.windows(4096, lambda i: every or (i % 2 == 0 and i < first), used)
    return {"windows": windows} | qwen_layers(read)


def _llama4(read: Reader) -> ConfigFields:
    """Return layers with experts or an MLP; their attention has rotary positions and chunks, or
    neither.

    A chunk of positions is timed as a sliding window, which is exact up to its length and computes
    more beyond."""
    layers = read["layers"]
    step = read.integer("interleave_moe_layer_step", 1)
    with_experts = read.numbers("moe_layers", range(step - 1, layers, step))
    read.raw("intermediate_size_mlp")  # layers with experts ignore it
    inner = read.integer("intermediate_size_mlp") if len(with_experts) < layers else 0
    width = read["inner"]
    mlps = routed(
        read.with_fields(inner=inner),
        "num_local_experts",
        width,
        width,
        lambda i: i not in with_experts,
    )
    rotary = rotary_layers(read)
    chunk = read.or_none("attention_chunk_size", 8192)
    chunked = read.of_kind("chunked_attention", "full_attention", rotary.__getitem__)
    windows = [chunk if inside else 0 for inside in chunked]
    return windowed_rotary(read, windows, rotary) | mlps


def _dbrx(read: Reader) -> ConfigFields:
    ffn = replace(read.part("ffn_config"), names_of={"num_experts_per_tok": "moe_top_k"})
    width = ffn.integer("ffn_hidden_size")
    groups = read.part("attn_config").integer("kv_n_heads")
    return {"kv_heads": groups} | routed(ffn, "moe_num_experts", width)


def _ernie(read: Reader) -> ConfigFields:
    first = read.integer("moe_layer_start_index", 1, low=0)
    step = read.integer("moe_layer_interval", 1)
    end = read.integer("moe_layer_end_index", -1, low=-1)
    last = read["layers"] - 1 if end == -1 else end
    copies = read.or_none("num_shared_experts", 2)

    def dense(layer: int) -> bool:
        return not first <= layer <= last or (layer + 1) % step > 0

    return routed(read, "num_experts", dense=dense, copies=copies)


def _jetmoe(read: Reader) -> ConfigFields:
    mlps = routed(read, "num_local_experts", read["inner"], output_bias=True)["mlps"]
    groups = read["kv_heads"]
    active = int(mlps[0].active)
    attention = AttentionExperts(
        heads=groups * active,
        kv_heads=groups,
        head_dim=read["head_dim"],
        rotary=read["head_dim"],
        o_bias=True,
        experts=mlps[0].experts,
        active=active,
    )
    return {"attentions": [attention] * read["layers"], "mlps": mlps}


def _zaya(read: Reader) -> ConfigFields:
    known = ("hybrid", "hybrid_sliding")
    types = read.types("layer_types", known, lambda layer: "hybrid")
    window = read.or_none("sliding_window", 0)
    shares = {kind: read.rotary("partial_rotary_factor", 0.5, kind) for kind in set(types)}
    usual = attention_of(read)

    def attention(kind: str) -> ConvolvedAttention:
        return ConvolvedAttention(
            heads=usual.heads,
            kv_heads=usual.kv_heads,
            head_dim=usual.head_dim,
            rotary=int(usual.head_dim * shares[kind]),
            norm="unit",
            qkv_bias=usual.qkv_bias,
            o_bias=usual.o_bias,
            **read.fields("zaya attention"),
        )

    mlps = routed(
        read,
        "num_experts",
        zero_experts=1,
        router_inner=read.integer("router_hidden_size", 256),
        router_carry=True,
    )["mlps"]
    return {
        "windows": [window if kind == "hybrid_sliding" else 0 for kind in types],
        "attentions": list(map(attention, types)),
        "mlps": [replace(mlp, router_carry=i > 0) for i, mlp in enumerate(mlps)],
        "others": ((ResidualScale(of=Part.ATTENTION),), (ResidualScale(of=Part.MLP),)),
        "other_parameters": 2 * read["hidden"],  # factor and addend of the embedding
    }


TABLE = read_table(
    "experts",
    more={
        "qwen2_moe": _qwen_experts,
        "qwen3_moe": _qwen_experts,
        "llama4_text": _llama4,
        "dbrx": _dbrx,
        "ernie4_5_moe": _ernie,
        "jetmoe": _jetmoe,
        "zaya": _zaya,
    },
)
