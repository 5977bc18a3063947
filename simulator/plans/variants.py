"""Variants of layers, as texts and as :class:`~simulator.models.config.Block`.

Attention and MLP each have a text, which files and tables show:

- ``dense``: as in the dense model.
- ``none``: the sublayer is removed, with its norm and residual.
- ``linear``: one hidden x hidden product replaces it.
- attention ``kv=4`` (key/value heads), ``heads=16`` (query heads), or both: ``heads=16 kv=4``.
- an MLP its inner width, ``7168``; with routed experts ``experts=64`` (per layer), ``width=512``
  (inner width of an expert), or both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from simulator.errors import InputError
from simulator.models.config import Block, ModelConfig

SUBLAYERS: tuple[str, ...] = ("attention", "mlp")

# generated MLP widths are multiples of it per device, so that kernels have no partial tiles in K
ALIGNMENT = 128
# generated MLP widths, and numbers of experts, over the dense
WIDTHS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)

_ATTENTION, _EXPERTS = (
    {"heads": "heads", "kv": "kv_heads"},
    {"experts": "experts", "width": "expert_inner"},
)
_PAIR = re.compile(r"([a-z_]+)=(\d{1,8})", re.ASCII)


def text_of(sublayer: str, block: Block, dense: Block) -> str:
    """Return the text of a sublayer of a variant of the layer ``dense``."""
    if part_of(sublayer, block) == part_of(sublayer, dense):
        return "dense"
    if sublayer in block.linear:
        return "linear"
    if not has(sublayer, block):
        return "none"
    if sublayer == "mlp" and not block.experts:
        return str(block.inner)
    names = _ATTENTION if sublayer == "attention" else _EXPERTS
    return " ".join(
        f"{k}={getattr(block, v)}"
        for k, v in names.items()
        if getattr(block, v) != getattr(dense, v)
    )


def variant(sublayer: str, text: str, dense: Block) -> Block:
    """Return the layer ``dense`` with one sublayer as a text states; InputError for texts that do
    not fit the layer."""
    words = text.strip().lower()
    if words in ("", "dense"):
        return dense
    if words in ("none", "no_op"):
        return without(sublayer, dense)
    if words == "linear":
        return replace(without(sublayer, dense), linear=tuple(sorted({*dense.linear, sublayer})))
    if not has(sublayer, dense) or sublayer in dense.linear:
        raise InputError(
            f"{sublayer} {text!r}: the layer has no {sublayer} that a variant could change"
        )
    if sublayer == "mlp" and not dense.experts:
        return _mlp(text, dense)
    return _attention(text, dense) if sublayer == "attention" else _experts(text, dense)


def _mlp(text: str, dense: Block) -> Block:
    inner = text.strip()
    if not re.fullmatch(r"\d{1,8}", inner, re.ASCII) or not 0 <= int(inner) <= dense.inner:
        raise InputError(
            f"mlp {text!r}: expected a width up to {dense.inner}, dense, none or linear"
        )
    return replace(dense, inner=int(inner)) if int(inner) else without("mlp", dense)


def _attention(text: str, dense: Block) -> Block:
    if dense.delta:
        raise InputError(
            f"attention {text!r}: a gated delta net has no other sizes; expected dense or none"
        )
    given = _pairs("attention", text, _ATTENTION)
    heads, groups = (
        given.get("heads", dense.heads),
        given.get("kv", min(dense.kv_heads, given.get("heads", 1 << 30))),
    )
    if not heads or not groups:
        return without("attention", dense)
    if heads > dense.heads or groups > dense.kv_heads:
        raise InputError(
            f"attention {text!r}: expected at most heads={dense.heads} kv={dense.kv_heads}"
        )
    if heads % groups:
        raise InputError(
            f"attention {text!r}: expected a number of KV heads that divides the {heads} query"
            " heads"
        )
    return replace(dense, heads=heads, kv_heads=groups)


def _experts(text: str, dense: Block) -> Block:
    given = _pairs("mlp", text, _EXPERTS)
    experts, width = given.get("experts", dense.experts), given.get("width", dense.expert_inner)
    if not 1 <= experts <= dense.experts or not 1 <= width <= dense.expert_inner:
        raise InputError(
            f"mlp {text!r}: expected at most experts={dense.experts} width={dense.expert_inner}"
        )
    return replace(dense, experts=experts, active=min(dense.active, experts), expert_inner=width)


def _pairs(sublayer: str, text: str, names: dict[str, str]) -> dict[str, int]:
    parts = [_PAIR.fullmatch(part) for part in text.strip().lower().split()]
    found = {part[1]: int(part[2]) for part in parts if part is not None}
    if not parts or None in parts or len(found) < len(parts) or not found.keys() <= names.keys():
        example = " ".join(f"{name}=4" for name in names)
        raise InputError(
            f"{sublayer} {text!r}: expected dense, none, linear, or sizes such as {example}"
        )
    return found


def has(sublayer: str, block: Block) -> bool:
    return sublayer in block.linear or bool(
        block.heads if sublayer == "attention" else block.inner or block.experts
    )


def without(sublayer: str, block: Block) -> Block:
    linear = tuple(name for name in block.linear if name != sublayer)
    if sublayer == "attention":
        return replace(block, heads=0, kv_heads=0, delta=False, linear=linear)
    return replace(block, inner=0, experts=0, active=0.0, expert_inner=0, linear=linear)


def part_of(sublayer: str, block: Block) -> Block:
    return without("mlp" if sublayer == "attention" else "attention", block)


def joined(attention: Block, mlp: Block) -> Block:
    """Return the layer with the attention of one variant and the MLP of another, of one dense
    layer."""
    linear = tuple(s for s, b in (("attention", attention), ("mlp", mlp)) if s in b.linear)
    own = {name: getattr(attention, name) for name in ("heads", "kv_heads", "delta", "rotary")}
    return replace(mlp, **own, linear=linear)


def generated(sublayer: str, model: ModelConfig, dense: Block, devices: int = 1) -> Iterator[Block]:
    """Yield the usual variants of a sublayer: as it is, aligned widths that ``devices`` can share,
    and none. Attention keeps its query heads and halves its KV heads, as far as the devices can
    share them. An MLP has widths of :data:`WIDTHS`, routed experts have these shares of their
    number."""
    yield dense
    if not has(sublayer, dense):
        return
    if sublayer == "attention":
        sized = sublayer not in dense.linear and not dense.delta and model.latent is None
        groups = dense.kv_heads // 2 if sized else 0
        while groups and groups % devices == 0 and dense.heads % groups == 0:
            yield replace(dense, kv_heads=groups)
            groups //= 2
    elif sublayer not in dense.linear:
        size, step = (
            (dense.experts, devices) if dense.experts else (dense.inner, ALIGNMENT * devices)
        )
        step = step if size >= 8 * step else devices
        for value in sorted(
            {round(share * size / step) * step for share in WIDTHS} - {0, size}, reverse=True
        ):
            if dense.experts:
                yield replace(dense, experts=value, active=min(dense.active, value))
            else:
                yield replace(dense, inner=value)
    yield without(sublayer, dense)
