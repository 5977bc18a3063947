"""Variants of layers, as texts and as :class:`~simulator.models.model.Layer`.

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
from simulator.models.model import PARTS, Layer
from simulator.models.sublayers import Attention, DeltaNet, Experts, LatentAttention, Linear, Mlp
from simulator.models.sublayers.base import Cut, Sublayer
from simulator.units import parse_fraction

SUBLAYERS: tuple[str, ...] = ("attention", "mlp")

# generated MLP widths are multiples of it per device, so that kernels have no partial tiles in K
ALIGNMENT = 128
# generated MLP widths, and numbers of experts, over the dense
WIDTHS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)

ALIGN = 16  # elements: the default multiple of inner widths of the family width
_SHARE = re.compile(r"0?\.\d+|\d{1,2}(\.\d+)?\s*%", re.ASCII)  # removed, as in --prune
_ATTENTION = {"heads": "heads", "kv": "kv_heads"}
_EXPERTS = {"experts": "experts", "width": "inner"}
_PAIR = re.compile(r"([a-z_]+)=(\d{1,8})", re.ASCII)


def text_of(part: str, layer: Layer, dense: Layer) -> str:
    """Return the text of a sublayer of a variant of the layer ``dense``."""
    new, old = layer.of(part), dense.of(part)
    if new == old:
        return "dense"
    if new is None:
        return "none"
    if isinstance(new, Linear):
        return "linear"
    if isinstance(new, Mlp):
        return str(new.inner)
    names = _ATTENTION if part == "attention" else _EXPERTS
    return " ".join(
        f"{key}={getattr(new, name)}"
        for key, name in names.items()
        if getattr(new, name) != getattr(old, name)
    )


def variant(part: str, text: str, dense: Layer) -> Layer:
    """Return the layer ``dense`` with one sublayer as a text states; InputError for texts that do
    not fit the layer."""
    words, old = text.strip().lower(), dense.of(part)
    if words in ("", "dense"):
        return dense
    if words == "none":
        return dense.without(part)
    if words == "linear":
        return dense.with_part(part, Linear(replaces=PARTS[part]))
    if _SHARE.fullmatch(words) and isinstance(old, Mlp | Experts | Attention | LatentAttention):
        shares = dict.fromkeys(("attention", "heads", "kv", "mlp"), 0.0)
        shares[part] = parse_fraction(words)
        return dense.with_part(part, old.narrower(Cut(shares, ALIGN)))
    if isinstance(old, Mlp):
        return dense.with_part(part, _mlp(text, old))
    if isinstance(old, Experts):
        return dense.with_part(part, _experts(text, old))
    if isinstance(old, Attention | LatentAttention):
        return dense.with_part(part, _attention(text, old))
    if isinstance(old, DeltaNet):
        raise InputError(
            f"attention {text!r}: a gated delta net has no other sizes; expected dense or none"
        )
    raise InputError(f"{part} {text!r}: the layer has no {part} that a variant could change")


def _mlp(text: str, dense: Mlp) -> Mlp | None:
    inner = text.strip()
    if not re.fullmatch(r"\d{1,8}", inner, re.ASCII) or not 0 <= int(inner) <= dense.inner:
        raise InputError(
            f"mlp {text!r}: expected a width up to {dense.inner}, a fraction to remove, dense, none"
            " or linear"
        )
    return replace(dense, inner=int(inner)) if int(inner) else None


def _attention(text: str, dense: Attention | LatentAttention) -> Sublayer | None:
    sizes = _pairs("attention", text, _ATTENTION)
    heads = sizes.get("heads", dense.heads)
    groups = sizes.get("kv", min(dense.kv_heads, heads if "heads" in sizes else dense.kv_heads))
    if not heads or not groups:
        return None
    if heads > dense.heads or groups > dense.kv_heads:
        raise InputError(
            f"attention {text!r}: expected at most heads={dense.heads} kv={dense.kv_heads}"
        )
    if heads % groups:
        raise InputError(
            f"attention {text!r}: expected a number of KV heads that divides the {heads} query"
            " heads"
        )
    if isinstance(dense, Attention):
        return replace(dense, heads=heads, kv_heads=groups)
    if groups != heads:
        raise InputError(
            f"attention {text!r}: latent attention has one vector for all heads; expected heads"
            " alone"
        )
    return replace(dense, heads=heads)


def _experts(text: str, dense: Experts) -> Experts:
    sizes = _pairs("mlp", text, _EXPERTS)
    experts, width = sizes.get("experts", dense.experts), sizes.get("width", dense.inner)
    if not 1 <= experts <= dense.experts or not 1 <= width <= dense.inner:
        raise InputError(
            f"mlp {text!r}: expected at most experts={dense.experts} width={dense.inner}"
        )
    return with_experts(replace(dense, inner=width), experts)


def with_experts(dense: Experts, experts: int) -> Experts:
    """Return routed experts with another number; a token uses no more than there are."""
    if experts == dense.experts:
        return dense
    return dense.fewer(experts, active=min(dense.active, float(experts)))


def _pairs(sublayer: str, text: str, names: dict[str, str]) -> dict[str, int]:
    parts = [_PAIR.fullmatch(part) for part in text.strip().lower().split()]
    sizes = {part[1]: int(part[2]) for part in parts if part is not None}
    if not parts or None in parts or len(sizes) < len(parts) or not sizes.keys() <= names.keys():
        example = " ".join(f"{name}=4" for name in names)
        raise InputError(
            f"{sublayer} {text!r}: expected dense, none, linear, a fraction to remove, or sizes"
            f" such as {example}"
        )
    return sizes


def part_of(part: str, layer: Layer) -> Layer:
    """Return the layer with one sublayer alone."""
    return layer.without("mlp" if part == "attention" else "attention")


def joined(attention: Layer, mlp: Layer) -> Layer:
    """Return the layer with the attention of one variant and the MLP of another, of one dense
    layer."""
    return attention.with_part("mlp", mlp.of("mlp"))


def generated(part: str, dense: Layer, devices: int = 1) -> Iterator[Layer]:
    """Yield the usual variants of a sublayer: as it is, aligned widths that ``devices`` can share,
    and none. Attention keeps its query heads and halves its KV heads, as far as the devices can
    share them. An MLP has widths of :data:`WIDTHS`, routed experts have these shares of their
    number."""
    yield dense
    sublayer = dense.of(part)
    if sublayer is None:
        return
    if isinstance(sublayer, Attention):
        groups = sublayer.kv_heads // 2
        while groups and groups % devices == 0 and sublayer.heads % groups == 0:
            yield dense.with_part(part, replace(sublayer, kv_heads=groups))
            groups //= 2
    elif isinstance(sublayer, Mlp):
        for inner in _generated_sizes(sublayer.inner, ALIGNMENT * devices, devices):
            yield dense.with_part(part, replace(sublayer, inner=inner))
    elif isinstance(sublayer, Experts):
        for experts in _generated_sizes(sublayer.experts, devices, devices):
            yield dense.with_part(part, with_experts(sublayer, experts))
    yield dense.without(part)


def _generated_sizes(size: int, step: int, least: int) -> list[int]:
    step = step if size >= 8 * step else least
    return sorted({round(share * size / step) * step for share in WIDTHS} - {0, size}, reverse=True)
