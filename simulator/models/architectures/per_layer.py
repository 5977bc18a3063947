"""Read keys that state single layers, and refuse keys that no rule reads: :func:`model_fields`.

Architecture searches state single layers as ``block_configs`` (:func:`read_block`). DeciLM (model
type ``nemotron-nas``) writes query heads per key/value head, ``n_heads_in_group``, and the MLP's
width as a multiple of the hidden size, ``ffn_mult``, which is rounded up to a multiple of 256.
NVIDIA ModelOpt (Puzzletron) writes ``num_key_value_heads``, ``intermediate_size``, and ``moe`` for
routed experts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from simulator.arguments import shown
from simulator.codes import Part
from simulator.errors import one_line
from simulator.models.architectures.architecture import (
    Architecture,
    attention_of,
    layers_of,
)
from simulator.models.architectures.reader import ConfigFields, Reader
from simulator.models.model import Layer, Model
from simulator.models.sublayers import Attention, Experts, Linear, Mlp
from simulator.models.sublayers.base import Sublayer
from simulator.models.tables import read_names


def model_fields(kind: Architecture, read: Reader) -> ConfigFields:
    """Return the fields of :class:`simulator.Model` that a configuration states."""
    read = replace(read, names_of=kind.keys)
    read = kind.read(read)
    layers = layers_of(read)
    absent: ConfigFields = {"per_layer_config": (None, {}), "block_configs": (None,)}
    stated = [key for key, empty in absent.items() if read.raw(key) not in empty]
    if read.get("blocks_read"):  # usual keys of this type
        stated.remove("block_configs")
    elif kind.blocks or "block_configs" in stated:
        layers = _block_layers(read, layers)
    if "per_layer_config" in stated:
        layers = _overridden(kind, read, layers)
    found = {field.name: read[field.name] for field in fields(Model) if field.name in read.values}
    return found | {"layers": tuple(layers), "layer_key": stated[0] if stated else ""}


EXPERT_KEYS = {
    "experts": "num_local_experts",
    "active": "num_experts_per_tok",
    "inner": "expert_intermediate_dim",
}
"""Field of a layer -> key of ModelOpt in ``moe``."""

_UNSUPPORTED = {
    "mamba": "state-space layers are not supported",
    "llama4": "attention settings per layer are not supported",
    "sparsify": "sparsity per layer is not supported",
    "parallel_blocks": "parallel blocks are not supported",
}


def read_block(of: Reader, dense: Layer, attention: Sublayer | None, hidden: int) -> Layer:
    """Return a layer of ``block_configs`` (objects ``attention`` and ``ffn``): ``dense`` with other
    sizes. ``attention`` is that of a layer which lacks it."""
    mixing = of.part("attention")
    mlp = of.part("ffn")
    for part in (of, mixing, mlp):
        for key, why in _UNSUPPORTED.items():
            if part.data.get(key) is not None:
                raise part.fail(key, f"expected null: {why}")
    layer = dense.with_part(
        "attention", _read_attention(mixing, dense.of("attention") or attention)
    )
    return layer.with_part("mlp", _read_mlp(mlp, dense.of("mlp"), hidden))


def _read_attention(of: Reader, dense: Sublayer | None) -> Sublayer | None:
    """Return the attention of an object: ``dense`` with its KV heads, a linear product, or none."""
    if of.flag("no_op"):
        return None
    if of.flag("replace_with_linear"):
        return Linear(replaces=Part.ATTENTION)
    if not isinstance(dense, Attention):
        raise of.fail("no_op", "expected true, as the dense layer has no such attention")
    heads = dense.heads
    groups, group = "num_key_value_heads", "n_heads_in_group"
    counts = {
        key: of.divisor(key, of.integer(key), heads, "num_attention_heads")
        for key in (groups, group)
        if of.data.get(key) is not None
    }
    if not counts:
        raise of.fail(group, f"missing; expected an integer, here or in {groups}")
    kv_heads = counts.get(groups) or heads // counts[group]
    size = heads // kv_heads
    if counts.get(group, size) != size:
        raise of.fail(group, f"expected {size}, as {groups}, got {counts[group]}")
    return replace(dense, kv_heads=kv_heads)


def _read_mlp(of: Reader, dense: Sublayer | None, hidden: int) -> Sublayer | None:
    """Return the MLP of an object: ``dense`` with its width or routed experts, a linear product, or
    none."""
    if of.flag("no_op"):
        return None
    if of.flag("replace_with_linear"):
        return Linear(replaces=Part.MLP)
    if isinstance(dense, Experts):
        return _read_experts(of, dense)
    if of.data.get("moe") is not None:
        raise of.fail("moe", "expected null, as the dense layer has no routed experts")
    plain = dense if isinstance(dense, Mlp) else Mlp(inner=1)
    if of.data.get("intermediate_size") is not None:
        return replace(plain, inner=of.integer("intermediate_size"))
    if of.data.get("ffn_mult") is None:
        raise of.fail("ffn_mult", "missing; expected a number, here or in intermediate_size")
    exact = int(2 * of.number("ffn_mult", None, high=1000) * hidden / 3)
    # DeciLM rounds up to a multiple of 256
    inner = -exact // 256 * -256
    return replace(plain, inner=inner) if inner else None


def _read_experts(of: Reader, dense: Experts) -> Experts:
    if of.data.get("moe") is None:
        raise of.fail("moe", "missing; expected an object, as the dense layer has routed experts")
    moe = of.part("moe")
    other = "expert_intermediate_size"
    width = other if other in moe.data else EXPERT_KEYS["inner"]
    experts = moe.integer(EXPERT_KEYS["experts"], dense.experts)
    active = moe.integer(EXPERT_KEYS["active"], min(int(dense.active), experts), high=experts)
    shared = dense.shared_inner
    if shared:  # ModelOpt writes a default width of shared experts for models without them
        shared = moe.integer("shared_expert_intermediate_dim", shared, low=0)
    return replace(
        dense,
        experts=experts,
        active=float(active),
        inner=moe.integer(width, dense.inner),
        shared_inner=shared,
        shared_gate=dense.shared_gate and shared > 0,
    )


def _block_layers(read: Reader, layers: Sequence[Layer]) -> list[Layer]:
    """Return layers with the changes in ``block_configs``, by an architecture search (Puzzle, arXiv
    2411.19146).

    Any architecture may have them; ``nemotron-nas`` states the widths of its layers nowhere
    else."""
    if any(not isinstance(layer.of("attention"), Attention) for layer in layers):
        raise read.fail(
            "block_configs",
            "expected none: latent attention and delta nets per layer are not supported",
        )
    usual = attention_of(read)
    out = []
    for part, dense in zip(read.parts("block_configs", len(layers)), layers):
        layer = read_block(part, dense, usual, read["hidden"])
        window = part.part("attention").integer("window_length", dense.window, low=0)
        attention = layer.of("attention")
        if isinstance(attention, Attention):
            layer = layer.with_part("attention", replace(attention, window=window))
        out.append(layer)
    return out


_SKIPPED = {"attention": "attention", "self_attn": "attention", "mlp": "mlp", "feed_forward": "mlp"}
"""Name of a skipped sublayer in ``per_layer_config`` -> part of the layer."""

_LAYER_NUMBER = re.compile(r"\d{1,5}", re.ASCII)  # Transformers writes leading zeros


def _overridden(kind: Architecture, read: Reader, layers: Sequence[Layer]) -> list[Layer]:
    """Return layers with the keys that ``per_layer_config`` of Transformers overrides (pull request
    45333): each such layer is the layer of a configuration with these keys."""
    place = "per_layer_config"
    stated = read.data[place]
    if not isinstance(stated, Mapping):
        raise read.fail(place, f"expected an object by layer numbers, got {shown(stated)}")
    common = {**read.data, place: {}}  # Gemma 4 states sizes of full attention here
    whole = model_fields(kind, Reader(common, read.source, read.place))
    out = list(layers)
    for text, overrides in stated.items():
        where = f"{place}.{one_line(str(text), 40)}"
        known = _LAYER_NUMBER.fullmatch(str(text)) is not None
        number = int(text) if known else len(layers)
        if number >= len(layers):
            raise read.fail(where, f"expected layer numbers from 0 to {len(layers) - 1}")
        if not isinstance(overrides, Mapping):
            raise read.fail(where, f"expected an object of keys, got {shown(overrides)}")
        changes = {key: value for key, value in overrides.items() if key != "skip"}
        inside = Reader({**common, **changes}, read.source, f"{read.place}{where}.")
        for key in ("block_configs", place):
            if key in changes:
                raise inside.fail(key, "expected none: it states several layers")
        own = model_fields(kind, inside)
        if unread := sorted(changes.keys() - inside.known - WITHOUT_EFFECT - {*kind.unused}):
            raise inside.fail(one_line(unread[0], 80), "is not understood")
        if different := [n for n in whole if n != "layers" and own[n] != whole[n]]:
            raise inside.fail(different[0], "expected the value of all layers")
        if len(own["layers"]) != len(layers):
            raise inside.fail("num_hidden_layers", "expected the value of all layers")
        layer = own["layers"][number]
        for name in Reader(overrides, read.source, f"{read.place}{where}.").names("skip"):
            if name not in _SKIPPED:
                names = ", ".join(_SKIPPED)
                raise inside.fail("skip", f"{shown(name)} is unknown; expected some of {names}")
            layer = layer.without(_SKIPPED[name])
        out[number] = layer
    return out


_NAMES = read_names("keys")
WITHOUT_EFFECT = frozenset(key for keys in _NAMES["without_effect"].values() for key in keys)
"""Keys that name layers, heads or sizes and change no operator."""

_SIZED = frozenset(_NAMES["sized"])
"""Parts of the names of keys that can change a layer."""

_CLOSE = 0.93  # ratio of difflib from which a key is a misspelt known key


def refuse_unknown(read: Reader, kind: Architecture) -> None:
    """Raise InputError for a key that could change a layer and was not read, or that is close to a
    key that was looked up. An ignored key would be a wrong answer."""
    for key, value in read.data.items():
        if key in read.known or key in WITHOUT_EFFECT or key in kind.unused:
            continue
        parts = set(str(key).lower().split("_"))
        if "mtp" in parts:
            continue
        states_sizes = isinstance(value, int | list | Mapping) and not isinstance(value, bool)
        if value and states_sizes and _SIZED & parts:
            raise read.fail(
                one_line(key, 80),
                f"is not understood, and it could change the layers (got {shown(value)}); remove"
                " it if it has no effect",
            )
        if value is not None and (near := difflib.get_close_matches(key, read.known, 1, _CLOSE)):
            raise read.fail(one_line(key, 80), f"is unknown; did you mean {near[0]}?")
