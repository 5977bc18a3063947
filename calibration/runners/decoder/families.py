"""Prune a decoder by any family: change its weights, or set the rule of its passes.

Widths, ranks and counts are rounded as in ``simulator.pruning``, so shapes equal the predicted shapes. The smallest
weights are removed, which does not affect the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from calibration.devices.operators import sparse_weight
from calibration.devices.protocol import Unsupported
from calibration.runners.decoder.model import Attention, Blocks, Decoder, Layer, Mlp, Projection, Rule, Tensor
from calibration.runners.decoder.rules import BlockAttention, CacheCut, GroupRouting, TokenDropping, TokenRouting, best
from simulator.arrays import FloatArray
from simulator.errors import InputError, unknown
from simulator.pruning import FAMILIES, _rows, listed_layers
from simulator.pruning._family import GROUPS, SUBLAYERS
from simulator.pruning._steps import PruningStep

ALIGN = 16  # default multiple to which widths and ranks are rounded up, as in the simulator's families

# Families that decide during a pass
DYNAMIC: Mapping[str, Callable[..., Rule]] = {
    rule.family: rule for rule in (TokenRouting, GroupRouting, BlockAttention, TokenDropping, CacheCut)
}


@dataclass(frozen=True)
class Removed:
    """Removed fractions by layer."""

    table: Mapping[str, FloatArray]  # part (attention, mlp, heads) or projection (q, down) -> fraction of every layer
    by_part: bool = False  # whether parts were named; else attention and mlp have the same fractions
    layers: tuple[int, ...] | None = None  # candidates for the removal of whole layers; None: all

    def of(self, layer: int, *names: str) -> float:
        """Return the fraction of the first name that the table has, else 0."""
        return next((float(self.table[name][layer]) for name in names if name in self.table), 0.0)

    def of_projection(self, layer: int, role: str) -> float:
        groups = [name for name in ("qkv", *SUBLAYERS) if role in GROUPS[name]]
        return self.of(layer, role, *groups)


def prune_decoder(
    decoder: Decoder, family: str, sparsity: Any = None, *, layers: Sequence[int] | None = None, **options: Any
) -> Decoder:
    """Prune a decoder by a family, with the arguments of :func:`simulator.prune` or fields of the family's rule."""
    options = _different(family, options)
    if sparsity is None and layers is None:
        sparsity = FAMILIES[family].default
    removed = _removed(family, sparsity, layers, len(decoder.layers))
    if not any(fractions.any() for fractions in removed.table.values()):
        return decoder
    with torch.no_grad():
        if family in STATIC:
            return STATIC[family](decoder, removed, **options)
        return _routed(decoder, DYNAMIC[family](1.0 - sparsity, **options))


def prune_by_steps(decoder: Decoder, steps: Sequence[PruningStep]) -> Decoder:
    for step in steps:
        decoder = prune_decoder(decoder, step.name, step.argument, layers=step.layers, **dict(step.options))
    return decoder


def check_steps(steps: Sequence[PruningStep]) -> None:
    dynamic = ""
    for step in steps:
        if dynamic and step.name != "depth":
            raise InputError(f"{step}: this decoder runs one dynamic family, and it is the last; got {dynamic} before")
        dynamic = step.name if step.name in DYNAMIC else dynamic
        try:
            check_family(step.name, step.argument, step.layers, dict(step.options))
        except InputError as error:
            raise InputError(f"{step}: {error}" if len(steps) > 1 else str(error)) from None


def check_family(family: str, sparsity: Any, layers: Sequence[int] | None, options: Mapping[str, Any]) -> None:
    known = {**STATIC, **DYNAMIC}
    if family not in known:
        raise unknown("pruning family", family, known)
    names = [name for name in signature(known[family]).parameters if name not in ("decoder", "removed", "keep")]
    if bad := sorted(set(_different(family, options)) - set(names)):
        raise InputError(f"family {family} has no option {bad[0]!r} here; it has {', '.join(names) or 'none'}")
    if family in DYNAMIC and (layers is not None or isinstance(sparsity, Mapping) or np.ndim(sparsity)):
        raise InputError(
            f"family {family}: this decoder runs it equally in all layers and parts; expected one fraction"
        )


def _different(family: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without those that a family lacks here and that have the simulator's defaults."""
    own, usual = signature({**STATIC, **DYNAMIC}[family]).parameters, FAMILIES[family].options
    dropped = {name for name, value in usual.items() if name not in own and options.get(name) == value}
    dropped |= {"kernel"} if family in DYNAMIC else set()
    return {name: value for name, value in options.items() if name not in dropped}


def _removed(family: str, sparsity: Any, layers: Sequence[int] | None, many: int) -> Removed:
    """Return the fractions of every layer; ``layers`` are pruned, or a fraction of these layers is removed."""
    by_part, listed = isinstance(sparsity, Mapping), None if layers is None else listed_layers(layers, many)
    from_list = FAMILIES[family].layers == "some"
    if sparsity is None and from_list and listed is not None:
        return Removed(dict.fromkeys(SUBLAYERS, np.ones(many)), layers=tuple(listed.tolist()))
    table = {}
    for name, fractions in (sparsity if by_part else dict.fromkeys(SUBLAYERS, sparsity)).items():
        table[name] = np.broadcast_to(np.asarray(fractions, dtype=np.float64), many).copy()
        if listed is not None and not from_list:
            table[name][~np.isin(np.arange(many), listed)] = 0.0
    return Removed(table, by_part, tuple(listed.tolist()) if from_list and listed is not None else None)


def whole_share(share: float, of: int) -> int:
    return int(_rows.whole_share(share, of))


def aligned(width: int, keep: float, align: int = ALIGN) -> int:
    return int(_rows.aligned(np.array(width), np.array(keep), align))


def depth(decoder: Decoder, removed: Removed, *, unit: str = "layer", early_exit: bool = False) -> Decoder:
    """Remove layers or sublayers: the deepest ones, except the last one unless tokens exit early."""
    kinds = [("attention", "mlp")] if unit == "layer" and not removed.by_part else [("attention",), ("mlp",)]
    layers = list(decoder.layers)
    for kind in kinds if unit in ("layer", "both") else [(unit,)]:
        fraction = max(removed.of(0, part) for part in kind)
        there = [i for i, layer in enumerate(layers) if any(getattr(layer, part) is not None for part in kind)]
        some = there if removed.layers is None else [i for i in there if i in removed.layers]
        count = whole_share(fraction, len(some))
        spared = not early_exit and 0 < count < len(some) and some[-1] == there[-1]
        for i in some[len(some) - spared - count : len(some) - spared]:
            layers[i] = replace(layers[i], **dict.fromkeys(kind))
    stays = [layer.attention is not None or layer.mlp is not None for layer in layers]
    rule = decoder.rule
    if isinstance(rule, TokenDropping):
        rule = replace(rule, start=sum(stays[: rule.start]))
    return replace(decoder, layers=tuple(layer for layer, there in zip(layers, stays) if there), rule=rule)


def width(decoder: Decoder, removed: Removed, *, align: int = ALIGN, inner: int | None = None) -> Decoder:
    """Remove heads, MLP channels and hidden features. ``inner`` is the width of all MLPs that are pruned."""

    def change(number: int, part: Any) -> Any:
        size = getattr(part, part.roles[-1]).weight.float().pow(2).sum(0)
        if isinstance(part, Mlp):
            share = removed.of(number, "mlp")
            if not share:
                return part
            return part.channels(best(size, aligned(len(size), 1.0 - share, align) if inner is None else inner))
        shares = [removed.of(number, name) for name in ("attention", "heads", "kv")]
        return _fewer_heads(part, decoder.head_dim, size, *shares) if any(shares) else part

    narrower = decoder.changed(change)
    hidden = removed.of(0, "hidden")
    return _fewer_features(narrower, hidden, align) if hidden else narrower


def _fewer_heads(a: Attention, head_dim: int, size: Tensor, both: float, alone: float, kv: float) -> Attention:
    """Remove shares of KV groups, of query heads alone, and of KV heads alone; ``size`` is the size of each feature."""

    def left(many: int, share: float) -> int:
        return max(whole_share(1.0 - share, many), 1) if share else many

    ratio, groups = a.heads // a.kv_heads, left(a.kv_heads, both)
    heads = left(ratio * groups, alone)
    kv_heads = left(groups, kv)
    if heads % kv_heads:
        raise InputError(f"{heads} query heads on {kv_heads} KV heads: expected a multiple of {kv_heads}")
    by_head = size.view(a.kv_heads, ratio, -1).sum(2)
    kept = best(by_head.sum(1), groups)
    number = kept[:, None] * ratio + torch.arange(ratio, device=kept.device)
    if kv_heads == groups:  # each group loses the same number of query heads and keeps its KV head
        queries = number.gather(1, best(by_head[kept], heads // groups)).flatten()
        keys = kept
    else:
        queries = number.flatten()[best(by_head[kept].flatten(), heads)]
        keys = kept[best(by_head[kept].sum(1), kv_heads)]
    q, k = (
        (which[:, None] * head_dim + torch.arange(head_dim, device=which.device)).flatten() for which in (queries, keys)
    )
    return replace(a, q=a.q.rows(q), k=a.k.rows(k), v=a.v.rows(k), o=a.o.columns(q), heads=heads, kv_heads=kv_heads)


def width_cross(decoder: Decoder, removed: Removed, *, align: int = ALIGN) -> Decoder:
    """Reduce the hidden size. Norms have the scale that they would have with removed features of zero."""
    return _fewer_features(decoder, removed.of(0, "mlp"), align)


def _fewer_features(decoder: Decoder, sparsity: float, align: int) -> Decoder:
    before = decoder.hidden
    kept = aligned(before, 1.0 - sparsity, align)
    index = best(decoder.embedding.float().pow(2).sum(0), kept)
    scale = math.sqrt(before / kept)  # the mean square over fewer features is larger by the square of this

    def change(number: int, part: Any) -> Any:
        *readers, writer = part.roles
        sliced = {role: getattr(part, role).columns(index) for role in readers}
        sliced[writer] = getattr(part, writer).rows(index)
        return replace(part, norm=part.norm.index_select(0, index) * scale, **sliced)

    embedding = decoder.embedding.index_select(1, index).contiguous()
    return replace(
        decoder.changed(change),
        embedding=embedding,
        head=embedding if decoder.head is decoder.embedding else decoder.head.index_select(1, index).contiguous(),
        final_norm=decoder.final_norm.index_select(0, index) * scale,
        epsilon=decoder.epsilon * before / kept,
    )


def low_rank(decoder: Decoder, removed: Removed, *, align: int = ALIGN) -> Decoder:
    """Replace each W by (W Q)(Q^T), Q an orthonormal basis of a sample of W's row space (randomised range finder)."""
    generator = torch.Generator().manual_seed(0)

    def factorise(p: Projection, sparsity: float) -> Projection:
        weight = p.weight.float()
        n, k = weight.shape
        exact = math.floor((1.0 - sparsity) * n * k / (n + k) + 1e-9)  # two factors have the rest of the parameters
        rank = min(max(math.ceil(exact / align), 1) * align, n, k)
        sample = torch.randn(n, rank, generator=generator)
        basis = torch.linalg.qr(weight.t() @ sample.to(weight.device)).Q
        return Projection(tuple(f.to(p.weight.dtype).contiguous() for f in (basis.t(), weight @ basis)), p.bias)

    return _each_pruned(decoder, removed, factorise)


def semi_structured(decoder: Decoder, removed: Removed) -> Decoder:
    """Make projections 2:4 sparse; Unsupported on a device without sparse tensor cores."""
    if not decoder.device.startswith("cuda"):
        raise Unsupported(f"semi_structured (2:4) needs sparse tensor cores; device {decoder.device!r} has none")
    algorithms: dict[tuple[int, int], Any] = {}  # one search per shape of weights

    def pack(p: Projection, sparsity: float) -> Projection:
        found = algorithms.setdefault(tuple(p.weight.shape), {})
        return Projection((sparse_weight(two_of_four(p.weight), found),), p.bias)

    return _each_pruned(decoder, removed, pack)


def unstructured(decoder: Decoder, removed: Removed) -> Decoder:
    """Set the smallest weights of projections to zero; dense kernels compute all weights."""

    def zero(p: Projection, sparsity: float) -> Projection:
        flat = p.weight.flatten()
        small = flat.abs().float().topk(whole_share(sparsity, len(flat)), largest=False).indices
        return Projection((flat.scatter(0, small, 0.0).view_as(p.weight),), p.bias)

    return _each_pruned(decoder, removed, zero)


def two_of_four(weight: Tensor) -> Tensor:
    if weight.shape[1] % 4:
        raise InputError(f"semi_structured: input features: expected a multiple of 4, got {weight.shape[1]}")
    fours = weight.abs().view(len(weight), -1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(2, dim=-1).indices, True)
    return weight.where(keep.view_as(weight), 0.0)


def each_projection(decoder: Decoder, change: Callable[[int, str, Projection], Projection]) -> Decoder:
    """Apply a function of (layer, role, projection) to every projection of a decoder."""
    return decoder.changed(
        lambda i, part: replace(part, **{role: change(i, role, getattr(part, role)) for role in part.roles})
    )


def _each_pruned(decoder: Decoder, removed: Removed, change: Callable[[Projection, float], Projection]) -> Decoder:
    def changed(number: int, role: str, p: Projection) -> Projection:
        sparsity = removed.of_projection(number, role)
        return change(p, sparsity) if sparsity else p

    return each_projection(decoder, changed)


# Families that change the weights
STATIC: Mapping[str, Callable[..., Decoder]] = {
    function.__name__: function for function in (depth, width, width_cross, semi_structured, low_rank, unstructured)
}


def _routed(decoder: Decoder, rule: Any) -> Decoder:
    """Set the rule of a decoder, with random routers if the rule needs routers."""

    def router(outputs: int, generator: torch.Generator) -> Tensor:
        weight = torch.randn(outputs, decoder.hidden, generator=generator) / math.sqrt(decoder.hidden)
        return weight.to(device=decoder.device, dtype=decoder.embedding.dtype)

    def routed(layer: Layer) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(rule.seed)
        for part in (layer.attention, layer.mlp):
            if part is None or isinstance(rule, TokenRouting):
                yield part and replace(part, router=router(2, generator))
                continue
            if isinstance(part, Attention):  # by KV group; the rows of q are already in this order
                blocks = Blocks(part.q.weight, part.o.weight.t().contiguous(), part.kv_heads)
            else:
                blocks = _channel_blocks(part, rule.channel_groups)
            yield replace(part, router=router(blocks.groups, generator), blocks=blocks)

    if isinstance(rule, TokenRouting | GroupRouting):
        decoder = replace(decoder, layers=tuple(Layer(*routed(layer)) for layer in decoder.layers))
    return replace(decoder, rule=rule)


def _channel_blocks(m: Mlp, groups: int) -> Blocks:
    """Return gate, up and down weights in at most ``groups`` groups of channels; zeros fill the last group."""
    channels = m.down.weight.shape[1]
    width = -(-channels // groups)
    groups = -(-channels // width)
    gate, up, outer = (
        F.pad(weight, (0, 0, 0, groups * width - channels)).view(groups, width, -1)
        for weight in (m.gate.weight, m.up.weight, m.down.weight.t())
    )
    return Blocks(torch.cat((gate, up), 1).flatten(0, 1).contiguous(), outer.flatten(0, 1).contiguous(), groups)
