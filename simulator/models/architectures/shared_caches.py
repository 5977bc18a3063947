"""Architectures with embeddings per layer and layers that share a cache: Gemma 3n and 4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from simulator.models.architectures.architecture import (
    mlp_of,
    read_table,
    routed,
)
from simulator.models.architectures.reader import ConfigFields, Reader
from simulator.models.sublayers import AltUp, Laurel, LayerInputs, Mlp, SharedCacheAttention
from simulator.models.sublayers.base import Sublayer


def _sharing(read: Reader, windows: tuple[int, ...], default: int) -> list[bool]:
    """Return which layers read the cache of the last layer of their type before them: the last
    ``num_kv_shared_layers``."""
    layers = len(windows)
    first = layers - read.integer("num_kv_shared_layers", default, low=0, high=layers - 1)
    if lost := {window > 0 for window in windows[first:]} - {w > 0 for w in windows[:first]}:
        kind = "sliding_attention" if lost.pop() else "full_attention"
        raise read.fail(
            "num_kv_shared_layers", f"expected a layer of {kind} before the layers that share"
        )
    return [layer >= first for layer in range(layers)]


def _attention(read: Reader, **sizes: Any) -> SharedCacheAttention:
    """Return the usual attention, which rotates whole heads."""
    common = {name: read[name] for name in ("heads", "kv_heads", "head_dim", "qkv_bias", "o_bias")}
    fields = common | sizes
    return SharedCacheAttention(**fields, rotary=fields["head_dim"], norm="head")


def _inputs(read: Reader, low: int) -> list[LayerInputs]:
    """Return the sublayer with an embedding per layer, if the layers have one."""
    width = read.integer("hidden_size_per_layer_input", 256, low=low)
    vocab = read.integer("vocab_size_per_layer_input", 262144)
    return [LayerInputs(width=width, vocab=vocab)] if width else []


def _gemma3n(read: Reader) -> ConfigFields:
    attentions = [
        _attention(read, reads_cache=shares) for shares in _sharing(read, read["windows"], 15)
    ]
    streams = read.integer("altup_num_inputs", 4, low=2)
    inputs = _inputs(read, low=1)
    laurel = Laurel(rank=read.integer("laurel_rank", 64))
    return {
        "attentions": attentions,
        "mlps": [Mlp(inner=width) for width in read.integers("intermediate_size", 16384)],
        "others": ((laurel,), (AltUp(streams=streams), *inputs)),
        "streams": streams,
        "other_parameters": inputs[0].width,  # norm of the projected inputs
    }


def _gemma4(read: Reader) -> ConfigFields:
    windows = (*read["windows"][:-1], 0)  # Transformers gives the last layer full attention
    bidirectional = ("vision",)  # "all" makes an encoder
    read.value(
        "use_bidirectional_attention", "vision", "vision or null", bidirectional.__contains__
    )
    sharing = _sharing(read, windows, 0)
    equal = read.flag("attention_k_eq_v")
    full: ConfigFields = {"keys_are_values": equal}
    if read.raw("per_layer_config") is None:  # the key states these sizes otherwise
        full["head_dim"] = read.integer("global_head_dim", 512)
        groups = read.or_none("num_global_key_value_heads", 0)
        full["kv_heads"] = (equal and groups) or read["kv_heads"]
    attentions = [
        _attention(read, reads_cache=shares, skips_prompts=True, **({} if window else full))
        for shares, window in zip(sharing, windows)
    ]
    wide = read.flag("use_double_wide_mlp")
    plain = mlp_of(read)
    doubled = replace(plain, inner=2 * plain.inner)
    mlps: list[Sublayer] = [doubled if wide and shares else plain for shares in sharing]
    inputs = _inputs(read, low=0) if read.get("layer_inputs", True) else []
    return {
        "windows": windows,
        "attentions": attentions,
        "mlps": mlps,
        "others": ((), tuple(inputs)),
        "other_parameters": sum(one.width for one in inputs),  # norm of the projected inputs
    }


def _gemma4_experts(read: Reader) -> ConfigFields:
    fields = _gemma4(read)
    if not read.flag("enable_moe_block"):
        for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            read.raw(key)  # without effect
        return fields
    experts = routed(read, "num_experts", shared=read["inner"], branch_norms=True)["mlps"]
    mlps = [replace(some, shared_inner=mlp.inner) for some, mlp in zip(experts, fields["mlps"])]
    return fields | {"mlps": mlps}


TABLE = read_table(
    "shared_caches",
    more={
        "gemma3n_text": _gemma3n,
        "gemma4_text": _gemma4_experts,
        "gemma4_unified_text": _gemma4,
    },
)
