"""Architectures whose layers hold a recurrent state instead of a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from simulator.codes import Part
from simulator.errors import one_line
from simulator.models.architectures.architecture import (
    Rule,
    attention_of,
    dense_layers,
    except_every,
    mlp_of,
    read_table,
    routed,
)
from simulator.models.architectures.experts import qwen_layers
from simulator.models.architectures.reader import ConfigFields, Reader
from simulator.models.sublayers import (
    Attention,
    DeltaNet,
    Experts,
    LatentAttention,
    LightningAttention,
    Mamba,
    Mamba2,
    Projection,
    RelativeAttention,
    ShortConv,
)
from simulator.models.sublayers.base import Sublayer
from simulator.models.sublayers.relative import Blocks

_ATTENTION = "full_attention"
_LINEAR = "linear_attention"
# names that published files use for the types of layers of Transformers 5
_OLD_NAMES = {"attention": _ATTENTION, "mamba": _LINEAR}
# characters of a hybrid_override_pattern of Nemotron-H -> type of layer
_PATTERN = {"M": _LINEAR, "*": _ATTENTION, "-": "mlp", "E": "moe"}


def _types(read: Reader, known: Sequence[str], usual: Callable[[int], str]) -> list[str]:
    """Return the type of each layer: from a list of names, else by the rule ``usual``."""
    key = "layers_block_type" if read.raw("layers_block_type") is not None else "layer_types"
    names = [_OLD_NAMES.get(name, name) for name in read.names(key)]
    return replace(read, data={**read.data, key: names or None}).types(key, known, usual)


def _mixers(types: Sequence[str], **kinds: Sublayer) -> ConfigFields:
    return {"attentions": [kinds[kind] for kind in types]}


def _mixers_by_type(read: Reader, usual: Callable[[int], str], **kinds: Sublayer) -> ConfigFields:
    """Return the mixer of each layer, by its type."""
    return _mixers(_types(read, (*kinds,), usual), **kinds)


def _rank(read: Reader, key: str, hidden: int) -> int:
    """Return the rank of Mamba's step sizes."""
    return math.ceil(hidden / 16) if read.raw(key) in (None, "auto") else read.integer(key)


def _mamba(norm: str = "") -> Rule:
    """Return the rule for layers of Mamba alone."""

    def more(read: Reader) -> ConfigFields:
        hidden = read["hidden"]
        mixer = Mamba(
            channels=read.integer("intermediate_size", read.integer("expand", 2) * hidden),
            rank=_rank(read, "time_step_rank", hidden),
            norm=norm,
            **read.fields("mamba"),
        )
        return {"sublayers": [(mixer,)] * read["layers"]}

    return more


def _mamba2(read: Reader) -> ConfigFields:
    """Return layers of Mamba-2 alone."""
    mixer = Mamba2(**read.fields("mamba2"))
    inner = read.integer("expand", 2) * read["hidden"]
    if mixer.inner != inner:
        wrong = f"expected {inner} / head_dim {mixer.channels}, as expand x hidden_size is {inner}"
        raise read.fail("num_heads", f"{wrong}, got {mixer.heads}")
    return {"sublayers": [(_grouped(read, "n_groups", mixer),)] * read["layers"]}


def _grouped(read: Reader, key: str, mixer: Mamba2) -> Mamba2:
    """Return Mamba-2 whose groups, which a key states, divide its heads."""
    read.divisor(key, mixer.groups, mixer.heads, "the number of Mamba heads")
    return mixer


def _hybrid_mamba2(read: Reader, inner: int, **changes: Any) -> Mamba2:
    """Return Mamba-2 from keys that begin with ``mamba_``; ``inner`` is the width of all heads."""
    heads = read.integer("mamba_n_heads", 128)
    stated = read.raw("mamba_d_head")
    channels = inner // heads if stated in (None, "auto") else read.integer("mamba_d_head")
    if heads * channels != inner:
        raise read.fail(
            "mamba_n_heads", f"expected a divisor of {inner}, the width of all heads, got {heads}"
        )
    mixer = Mamba2(heads=heads, channels=channels, **read.fields("hybrid mamba2"), **changes)
    return _grouped(read, "mamba_n_groups", mixer)


def _bamba(read: Reader) -> ConfigFields:
    hidden = read["hidden"]
    layers = read["layers"]
    inner = read.integer("mamba_expand", 2) * hidden
    attends = read.numbers("attn_layer_indices", [])
    types = [_ATTENTION if layer in attends else _LINEAR for layer in range(layers)]
    mixer = _hybrid_mamba2(read, inner)
    return _mixers(types, full_attention=attention_of(read), linear_attention=mixer)


def _falcon_h1(read: Reader) -> ConfigFields:
    """Return layers with Mamba-2 and attention side by side."""
    hidden = read["hidden"]
    expanded = read.integer("mamba_expand", 2) * hidden
    inner = read.or_none("mamba_d_ssm", 1024) or expanded
    mixer = _hybrid_mamba2(read, inner, norm=read.flag("mamba_rms_norm"))
    attention = replace(attention_of(read), joins=True)
    return {"sublayers": [(mixer, attention, mlp_of(read))] * read["layers"]}


def _granite(read: Reader) -> ConfigFields:
    """Return layers with Mamba-2 or attention, and with experts beside a shared MLP, or the shared
    MLP alone."""
    hidden = read["hidden"]
    mixer = _hybrid_mamba2(read, read.integer("mamba_expand", 2) * hidden)
    rotates = read.raw("position_embedding_type") == "rope"
    attention = replace(attention_of(read), rotary=rotates * read["rotary_dim"])
    shared = read.integer("shared_intermediate_size", 1024)
    if read.integer("num_local_experts", 8, low=0):
        mlps = routed(read, "num_local_experts", read["inner"], shared)
    else:
        mlps = {"mlps": [replace(mlp_of(read), inner=shared)] * read["layers"]}
    mixers = _mixers_by_type(
        read, lambda layer: _LINEAR, full_attention=attention, linear_attention=mixer
    )
    return mixers | mlps


def _nemotron_types(read: Reader) -> list[str]:
    """Return the type of each layer, from block_configs (Puzzle), a list, or a pattern; those that
    a configuration states must agree."""
    stated: dict[str, list[str]] = {}
    blocks = read.raw("block_configs")
    pattern = read.raw("hybrid_override_pattern")
    if blocks is not None:
        parts = read.parts("block_configs", len(blocks) if isinstance(blocks, list) else 1)
        stated["block_configs"] = [part.text("block_type") for part in parts]
    if names := read.names("layers_block_type"):
        stated["layers_block_type"] = names
    if pattern is not None:
        letters = read.text("hybrid_override_pattern")
        stated["hybrid_override_pattern"] = [_PATTERN.get(letter, letter) for letter in letters]
    if not stated:
        raise read.fail("layers_block_type", "missing; expected a list with the type of each layer")
    by_key = {key: [_OLD_NAMES.get(name, name) for name in names] for key, names in stated.items()}
    first, types = next(iter(by_key.items()))
    if not types or not set(types) <= set(_PATTERN.values()):
        raise read.fail(first, f"expected layers of {', '.join(_PATTERN.values())}")
    for key, others in by_key.items():
        if others != types:
            raise read.fail(key, f"expected the layers of {first}")
    if read.raw("num_hidden_layers") is not None and read.layers() != len(types):
        raise read.fail("num_hidden_layers", f"expected {len(types)}, the layers of {first}")
    return types


def _nemotron_h(read: Reader) -> ConfigFields:
    """Return layers of one sublayer each. Keys of a layer's object in ``block_configs`` take
    precedence over those of the file (Puzzle)."""
    types = _nemotron_types(read)
    blocks = read.raw("block_configs")
    # keys of all kinds, as Transformers saves those of kinds without layers too
    kinds = {kind: (_nemotron_layer(read, kind),) for kind in _PATTERN.values()}
    if blocks is None:
        return {"sublayers": [kinds[kind] for kind in types]}
    layers = []
    for i, (kind, block) in enumerate(zip(types, blocks)):
        place = f"{read.place}block_configs[{i}]."
        own = replace(read, data={**read.data, **block}, place=place, known=set())
        layers.append((_nemotron_layer(own, kind),))
        if unread := sorted(block.keys() - own.known - {"block_type"}):
            raise own.fail(one_line(unread[0], 80), f"is not understood in a layer of {kind}")
    return {"sublayers": layers, "blocks_read": True}


def _nemotron_layer(read: Reader, kind: str) -> Sublayer:
    if kind == "mlp":
        return replace(mlp_of(read), inner=read.integer("intermediate_size"))
    kinds = {_LINEAR: _nemotron_mamba, "moe": _nemotron_experts}
    return kinds[kind](read) if kind in kinds else attention_of(read)


def _nemotron_mamba(read: Reader) -> Mamba2:
    return _grouped(read, "n_groups", Mamba2(**read.fields("nemotron_h mamba2")))


def _nemotron_experts(read: Reader) -> Experts:
    """Return experts without gates."""
    sizes = read.fields("nemotron_h experts")
    return Experts(
        **sizes,
        active=float(read.integer("num_experts_per_tok", 2, high=sizes["experts"])),
        gated=False,
        latent=read.or_none("moe_latent_size", 0),
        shared_bias=read["mlp_bias"],
        router_bias=True,
    )


def _every(read: Reader, name: str, period: int, offset: int) -> Callable[[int], bool]:
    """Return whether a layer is one of a period, from its keys."""
    step = read.integer(f"{name}_layer_period", period)
    first = read.integer(f"{name}_layer_offset", offset, low=0)
    return lambda layer: layer % step == first


def _hybrid_mamba(read: Reader, hidden: int, **others: Any) -> Mamba:
    """Return Mamba from keys that begin with ``mamba_``."""
    return Mamba(
        channels=read.integer("mamba_expand", 2) * hidden,
        rank=_rank(read, "mamba_dt_rank", hidden),
        **read.fields("hybrid mamba"),
        **others,
    )


def _jamba(read: Reader) -> ConfigFields:
    mixer = _hybrid_mamba(read, read["hidden"], norm="rms")
    attends = _every(read, "attn", 8, 4)
    routes = _every(read, "expert", 2, 1)
    several = read.integer("num_experts", 16) > 1
    mlps = routed(
        read,
        "num_experts",
        read["inner"],
        dense=lambda layer: not (several and routes(layer)),
    )
    types = [_ATTENTION if attends(layer) else _LINEAR for layer in range(read["layers"])]
    attention = attention_of(read)
    return _mixers(types, full_attention=attention, linear_attention=mixer) | mlps


def _shared_blocks(
    types: Sequence[str], mixer: Sublayer, block: Callable[[int], Sequence[Sublayer]]
) -> ConfigFields:
    """Return layers of a mixer, of which hybrids begin with ``block(i)``, the i-th use of a block
    of shared weights (Zamba)."""
    uses = [types[:layer].count("hybrid") for layer in range(len(types))]
    layers = [(*(block(use) if kind == "hybrid" else ()), mixer) for kind, use in zip(types, uses)]
    return {"sublayers": layers}


def _wide_attention(read: Reader, rotates: bool) -> Attention:
    """Return attention to the residual stream and the embedding, side by side."""
    hidden = read["hidden"]
    features = read.integer("attention_head_dim", 2 * hidden // read["heads"])
    if (wide := read.integer("attention_hidden_size", 2 * hidden)) != 2 * hidden:
        raise read.fail("attention_hidden_size", f"expected {2 * hidden}, got {wide}")
    return replace(
        attention_of(read),
        head_dim=features,
        rotary=features * rotates,
        reads=2,
        norms=(False, False),
    )


def _zamba(read: Reader) -> ConfigFields:
    hidden = read["hidden"]
    attends = _every(read, "attn", 6, 4)

    def usual(layer: int) -> str:
        return "hybrid" if layer == 2 or (layer > 2 and attends(layer - 3)) else _LINEAR

    inner = read.integer("mamba_expand", 2) * hidden
    heads = read.integer("n_mamba_heads", 2)
    read.divisor("n_mamba_heads", heads, inner, "the channels")
    mixer = _hybrid_mamba(read, hidden, heads=heads)
    attention = _wide_attention(read, rotates=False)
    mlp = mlp_of(read)
    added = Projection(adapts=Part.MLP, norms=(False, False))

    def block(use: int) -> Sequence[Sublayer]:
        reused = use > 0
        return replace(attention, reused=reused), replace(mlp, reused=reused), added

    return _shared_blocks(_types(read, (_LINEAR, "hybrid"), usual), mixer, block)


def _zamba2(read: Reader) -> ConfigFields:
    hidden = read["hidden"]
    sizes = read.fields("zamba2 mamba2")
    channels = read.integer("mamba_expand", 2) * hidden // sizes["heads"]
    mixer = _grouped(read, "mamba_ngroups", Mamba2(channels=channels, **sizes))
    attention = _wide_attention(read, rotates=read.flag("use_mem_rope"))
    inner = read.integer("intermediate_size", 4 * hidden)
    mlp = replace(mlp_of(read), inner=inner, bias=mixer.bias)
    blocks = read.integer("num_mem_blocks", 1)
    added = Projection(adapts=Part.MLP, norms=(False, False))
    rank = read.integer("adapter_rank", 128)
    adapter = replace(added, features=2 * mlp.inner, rank=rank)
    queries = replace(adapter, adapts=Part.ATTENTION, reads=2, features=2 * hidden)
    adapters = (queries,) * 3 if read.flag("use_shared_attention_adapter") else ()

    def block(use: int) -> Sequence[Sublayer]:
        reused = use >= blocks
        first = replace(attention, reused=reused)
        return first, *adapters, replace(mlp, reused=reused), adapter, added

    def usual(layer: int) -> str:
        return "hybrid" if layer in (*range(6, 43, 6), 47, 51) else _LINEAR

    return _shared_blocks(_types(read, (_LINEAR, "hybrid"), usual), mixer, block)


def _lfm2(read: Reader) -> ConfigFields:
    layers = read["layers"]
    attends = read.numbers("full_attn_idxs", range(layers))

    def usual(layer: int) -> str:
        return _ATTENTION if layer in attends else "conv"

    inner = read["inner"]
    size = read.integer("block_multiple_of", 256)
    factor = read.number("block_ffn_dim_multiplier", 1.0, high=1000)
    if read.flag("block_auto_adjust_ff_dim", True):
        inner = size * math.ceil(int(factor * int(2 * inner / 3)) / size)
    mlp = replace(mlp_of(read), inner=inner)
    conv = ShortConv(**read.fields("lfm2"))
    mixers = _mixers_by_type(read, usual, full_attention=attention_of(read), conv=conv)
    return {**mixers, "mlps": [mlp] * layers}


def _lfm2_moe(read: Reader) -> ConfigFields:
    conv = ShortConv(**read.fields("lfm2"))
    attention = attention_of(read)
    return _mixers_by_type(read, lambda layer: _ATTENTION, full_attention=attention, conv=conv)


def _lfm3(read: Reader) -> ConfigFields:
    def usual(layer: int) -> str:
        if layer % 4 == 2:
            return _ATTENTION
        return "sliding_attention" if layer % 4 == 0 and layer else "conv"

    window = read.integer("sliding_window", 256)
    gates = read["heads"] if read.flag("use_attention_gate", True) else 0
    attention = replace(attention_of(read), gates=gates)
    return _mixers_by_type(
        read,
        usual,
        full_attention=attention,
        sliding_attention=replace(attention, window=window),
        conv=ShortConv(**read.fields("lfm3")),
    )


def _delta_net(read: Reader, kind: str, joint: str) -> DeltaNet:
    net = DeltaNet(joint=joint, **read.fields(kind))
    read.divisor("linear_num_key_heads", net.kv_heads, net.heads, "linear_num_value_heads")
    return net


def qwen_mixers(read: Reader, joint: str) -> ConfigFields:
    """Return layers with a gated delta net, and layers with attention whose query projection also
    makes a gate."""
    every = read.integer("full_attention_interval", 4)
    return _mixers_by_type(
        read,
        lambda layer: _LINEAR if (layer + 1) % every else _ATTENTION,
        full_attention=attention_of(read),
        linear_attention=_delta_net(read, "qwen delta_net", joint),
    )


def _qwen3_next(read: Reader) -> ConfigFields:
    return qwen_mixers(read, "all") | qwen_layers(read)


def _lara(read: Reader) -> ConfigFields:
    sliding = "sliding_attention"
    pattern = (_LINEAR, sliding, _LINEAR, _ATTENTION, sliding)
    attention = attention_of(read)
    return _mixers_by_type(
        read,
        lambda layer: pattern[layer % len(pattern)],
        full_attention=attention,
        sliding_attention=replace(attention, window=read.integer("sliding_window", 512)),
        linear_attention=_delta_net(read, "lara delta_net", "qkv"),
    )


def _olmo_hybrid(read: Reader) -> ConfigFields:
    """Return layers with a gated delta net and norms of the inputs, and layers with attention and
    norms of the outputs."""
    layers = read["layers"]
    every = min(layers, 4)  # the last of fewer layers has attention
    types = _types(
        read,
        (_ATTENTION, _LINEAR),
        lambda layer: _LINEAR if (layer + 1) % every else _ATTENTION,
    )
    sizes = read.fields("olmo delta_net")
    key = read.integer("linear_key_head_dim", int(0.75 * read["hidden"] / sizes["kv_heads"]))
    value = read.integer("linear_value_head_dim", 2 * key)
    net = DeltaNet(**sizes, key=key, value=value, joint="none")
    after = (False, True)
    attention = replace(attention_of(read), norms=after)
    mlp = mlp_of(read)
    mlps = [replace(mlp, norms=after) if kind == _ATTENTION else mlp for kind in types]
    mixers = _mixers(types, full_attention=attention, linear_attention=net)
    return {**mixers, "mlps": mlps}


def _minimax(read: Reader) -> ConfigFields:
    chunk = read.integer("block_size", 256)
    return _mixers_by_type(
        read,
        lambda layer: _LINEAR if layer % 2 else _ATTENTION,
        full_attention=attention_of(read),
        linear_attention=LightningAttention(
            heads=read["heads"], head_dim=read["head_dim"], chunk=chunk
        ),
    )


def latent_of(read: Reader, kind: str, rank: int, **more: Any) -> LatentAttention:
    """Return latent attention; ``rank`` is the default of ``q_lora_rank``."""
    heads = read["heads"]
    fields = {"value": read["hidden"] // heads} | read.fields(kind)
    fields["value"] = read.integer("v_head_dim", fields["value"])
    query_rank = read.or_none("q_lora_rank", rank)
    return LatentAttention(heads=heads, query_rank=query_rank, **fields, **more)


def _kimi_linear(read: Reader) -> ConfigFields:
    read.raw("linear_attn_config")
    inside = read.part("linear_attn_config") if read.data.get("linear_attn_config") else read
    nested = inside is not read
    kind = "kimi linear_attn_config" if nested else "kimi delta_net"
    net = DeltaNet(joint="none", channel_decay=True, **inside.fields(kind))

    def usual(layer: int) -> str:
        if nested:  # numbers from 1
            attends = layer + 1 in inside.numbers("full_attn_layers", [], first=1)
            return _ATTENTION if attends else _LINEAR
        return _LINEAR if layer % 4 or not layer else _ATTENTION

    latent = latent_of(read, "hybrid latent", 0, rotates_positions=False)
    return _mixers_by_type(read, usual, full_attention=latent, linear_attention=net)


def _bailing(read: Reader) -> ConfigFields:
    group = read.integer("layer_group_size", 6)

    def usual(layer: int) -> str:
        return _LINEAR if (layer + 1) % group else _ATTENTION

    # Transformers saves the rotary size of latent attention as head_dim
    net = DeltaNet(joint="none", channel_decay=True, **read.fields("bailing delta_net"))
    latent = latent_of(read, "hybrid latent", 0, gate="head")
    return _mixers_by_type(read, usual, full_attention=latent, linear_attention=net)


def _relative(read: Reader, sliding: bool, **changes: Any) -> RelativeAttention:
    """Return the attention of a layer with, or without, a window."""
    window = read.integer("sliding_window") if sliding else 0
    return RelativeAttention(
        window=window,
        norm=read.get("qk_norm", ""),
        extent=window or read.integer("rel_extent", 1024),
        **read.fields("inkling window" if sliding else "inkling heads"),
        **read.fields("inkling attention"),
        **changes,
    )


def _inkling(read: Reader) -> ConfigFields:
    layers = read["layers"]
    conv = read.integer("conv_kernel_size", 4)
    local = read.numbers("local_layer_ids", [i for i in range(layers) if (i + 1) % 6])
    sliding = read.of_kind("hybrid_sliding", "hybrid", local.__contains__)
    plain = Blocks(conv=conv)
    by_window = {inside: replace(_relative(read, inside), entry=plain) for inside in (True, False)}
    shared = read.integer("n_shared_experts", 2)
    dense = dense_layers(read, read.integer("dense_mlp_idx", 0, low=0))
    usual = read["mlps"][0]
    experts = replace(
        usual,
        shared_inner=shared * usual.inner,
        shared_parts=shared,
        outputs_of_router=usual.experts + shared,
        entry=replace(plain, scalars=usual.experts + 1),
    )
    mlp = replace(mlp_of(read), entry=replace(plain, scalars=1))
    return {
        "attentions": [by_window[inside] for inside in sliding],
        "mlps": [mlp if dense(layer) else experts for layer in range(layers)],
        "head_vocab": read.integer("unpadded_vocab_size", read["vocab"]),
    }


def _inkling2_layer(read: Reader, gates: int = 0) -> Callable[[int, bool], tuple[Sublayer, ...]]:
    """Return the function from the number of a layer, and whether it has a window, to its
    sublayers. Layers have ``gates`` of a rank if they run in several passes."""
    conv = read.integer("conv_kernel_size", 4)
    each = read.integer("n_layers_per_attn_res_block", 6)
    rank = _loop(read)["gate_rank"] if gates else 0

    def made(layer: int, sliding: bool) -> tuple[Sublayer, ...]:
        sources = layer // each + 2
        inputs = 1 if sliding else 3  # queries, keys and values, each with a norm
        attention = _relative(read, sliding, dynamic=not sliding, clips=True, projects_sinks=True)
        first = Blocks(
            conv=conv,
            sources=sources if layer else 0,
            vectors=inputs * (layer > 0) + inputs - 1,
            gates=gates * 3,
            rank=rank,
        )
        second = Blocks(conv=conv, sources=sources, vectors=1, gates=gates, rank=rank)
        gated = attention.heads * attention.head_dim
        experts = replace(read["mlps"][layer], entry=second)
        return replace(attention, gates=gated, entry=first), experts

    return made


def _inkling2(read: Reader) -> ConfigFields:
    sliding = _inkling2_windows(read)
    made = _inkling2_layer(read)
    return {
        "sublayers": [made(layer, inside) for layer, inside in enumerate(sliding)],
        "head_vocab": read.integer("unpadded_vocab_size", 200058),
        "other_parameters": read["hidden"],  # weights of the last sum of blocks
    }


def _inkling2_windows(read: Reader) -> list[bool]:
    return read.of_kind("hybrid_sliding", "hybrid", except_every(6))


def _loop(read: Reader) -> ConfigFields:
    """Return the numbers of the loop, which checkpoints state in an object."""
    stated = read.fields("inkling2 loop")
    if read.raw("loop_config") is None:
        return stated
    inside = read.part("loop_config")
    return {key: inside.integer(key, value) for key, value in stated.items()}


def _inkling2_loop(read: Reader) -> ConfigFields:
    """Return the layers in the order in which they run; those of the loop run in several passes."""
    layers = read["layers"]
    loop = _loop(read)
    start, end = loop["core_start"], loop["core_end"]
    if not 0 < start < end <= layers:
        raise read.fail("loop_layer_index_end", f"expected a layer from {start + 1} to {layers}")
    sliding = _inkling2_windows(read)
    once = _inkling2_layer(read)
    looped = _inkling2_layer(read, gates=1)
    made = [
        (looped if start <= layer < end else once)(layer, inside)
        for layer, inside in enumerate(sliding)
    ]
    again = [tuple(replace(s, reused=True) for s in sublayers) for sublayers in made[start:end]]
    # weights of the last sum of blocks, and of messages between passes
    weights = 1 + 4 * (end - start)
    return {
        "sublayers": [*made[:end], *again * (loop["num_passes"] - 1), *made[end:]],
        "head_vocab": read.integer("unpadded_vocab_size", 200058),
        "other_parameters": weights * read["hidden"],
    }


TABLE = read_table(
    "hybrids",
    more={
        "mamba": _mamba(),
        "mamba2": _mamba2,
        "bamba": _bamba,
        "falcon_h1": _falcon_h1,
        "jamba": _jamba,
        "nemotron_h": _nemotron_h,
        "zamba": _zamba,
        "zamba2": _zamba2,
        "granitemoehybrid": _granite,
        "lfm2": _lfm2,
        "lfm2_moe": _lfm2_moe,
        "lfm3": _lfm3,
        "qwen3_next": _qwen3_next,
        "qwen3_5_text": partial(qwen_mixers, joint="qkv"),
        "olmo_hybrid": _olmo_hybrid,
        "minimax": _minimax,
        "kimi_linear": _kimi_linear,
        "bailing_hybrid": _bailing,
        "inkling_text": _inkling,
        "inkling2_text": _inkling2,
        "lara_mini": _lara,
        "inkling2_loop_text": _inkling2_loop,
        "falcon_mamba": _mamba("unit"),
    },
    many={
        "nemotron_h": lambda read: len(_nemotron_types(read)),
    },
)
