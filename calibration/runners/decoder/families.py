"""Every pruning family applied to a decoder's weights, or switched on in its execution.

Widths, ranks and counts are rounded as in ``simulator.pruning``, so that what runs here has the shapes that are
predicted there. Here what is removed is chosen by the size of the weights, which makes no difference to the time; the
functions that remove it serve :mod:`calibration.runners.quality_methods` as well, which chooses by published criteria.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from calibration.devices.protocol import Unsupported
from calibration.devices.sparse import sparse_weight
from calibration.runners.decoder.model import Attention, Blocks, Decoder, Layer, Mlp, Projection, Tensor
from calibration.runners.decoder.routed import BlockAttention, CacheCut, TokenDropping, TokenRouting, best
from calibration.runners.decoder.run import Rule
from calibration.runners.decoder.widths import GroupRouting
from simulator.errors import InputError, unknown
from simulator.predict.scenario import one_of
from simulator.pruning import _edits

ALIGN = 16
"""Widths and ranks are rounded up to a multiple of this unless told otherwise, as the simulator's families do."""

DYNAMIC: Mapping[str, Callable[..., Rule]] = {
    rule.family: rule for rule in (TokenRouting, GroupRouting, BlockAttention, TokenDropping, CacheCut)
}
"""Families that decide while the decoder runs."""


def prune_decoder(decoder: Decoder, family: str, sparsity: float, **options: Any) -> Decoder:
    """The decoder with a fraction in [0, 1) removed by a family; families compose, but at most one may be dynamic.

    ``options`` are those of the family's function here, or the fields of its rule. An InputError for an unknown family
    or option, or a combination that cannot run; Unsupported where the device has no kernel (2:4 needs a CUDA GPU).
    """
    known = {**STATIC, **DYNAMIC}
    if family not in known:
        raise unknown("pruning family", family, known)
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity {sparsity:g}: expected a fraction in [0, 1), such as 0.25")
    if sparsity == 0.0:
        return decoder
    names = [name for name in signature(known[family]).parameters if name not in ("decoder", "sparsity", "keep")]
    if bad := sorted(set(options) - set(names)):
        raise InputError(f"family {family} has no option {bad[0]!r} here; it has {', '.join(names) or 'none'}")
    with torch.no_grad():
        if family in STATIC:
            return STATIC[family](decoder, sparsity, **options)
        if decoder.rule is not None:
            only = f"only one dynamic family can run at a time, not {family} too"
            raise InputError(f"decoder: {decoder.rule.family} is on already; {only}")
        return _routed(decoder, DYNAMIC[family](1.0 - sparsity, **options))


def whole_share(share: float, of: int) -> int:
    """``share`` of ``of`` rounded to the nearest whole, halves up."""
    return int(_edits.whole_share(share, of))


def aligned(width: int, keep: float, align: int = ALIGN) -> int:
    """``keep`` of ``width`` rounded up to a multiple of ``align``, and no more than ``width``."""
    return int(_edits.aligned(np.array(width), np.array(keep), align))


def rank_left(sparsity: float, n: int, k: int, align: int = ALIGN) -> int:
    """Rank of a weight (n, k) of which two factors have the share of parameters that is left."""
    exact = math.floor((1.0 - sparsity) * n * k / (n + k) + 1e-9)
    return min(max(math.ceil(exact / align), 1) * align, n, k)


def depth(decoder: Decoder, sparsity: float, *, unit: str = "layer") -> Decoder:
    """``round(s L)`` layers (or one kind of sublayer in as many layers) vanish: the deepest but the last."""
    one_of("option unit", unit, ("layer", "both", "attention", "mlp"))
    many = len(decoder.layers)
    gone = whole_share(sparsity, many)
    end = many - 1 if gone < many else many
    removed = range(end - gone, end)
    if unit in ("layer", "both"):
        return without_layers(decoder, removed)
    kind = Attention if unit == "attention" else Mlp
    return decoder.changed(lambda i, part: None if i in removed and isinstance(part, kind) else part)


def without_layers(decoder: Decoder, gone: Collection[int]) -> Decoder:
    """The decoder without some whole layers."""
    return replace(decoder, layers=tuple(layer for i, layer in enumerate(decoder.layers) if i not in gone))


def width(decoder: Decoder, sparsity: float, *, align: int = ALIGN) -> Decoder:
    """KV groups with their query heads, and MLP channels, are sliced out of the weights."""
    return narrowed(decoder, sparsity, lambda i, role, p: p.weight.float().pow(2).sum(0), align)


def narrowed(
    decoder: Decoder, sparsity: float, saliency: Callable[[int, str, Projection], Tensor], align: int = ALIGN
) -> Decoder:
    """KV groups and MLP channels sliced out by the saliency of the inputs of o and down, given (layer, role,
    projection)."""

    def change(number: int, part: Any) -> Any:
        size = saliency(number, part.roles[-1], getattr(part, part.roles[-1]))
        if isinstance(part, Mlp):
            index = best(size, aligned(len(size), 1.0 - sparsity, align))
            return replace(part, gate=part.gate.rows(index), up=part.up.rows(index), down=part.down.columns(index))
        kept, share = max(whole_share(1.0 - sparsity, part.kv_heads), 1), part.heads // part.kv_heads
        groups = best(size.view(part.kv_heads, -1).sum(1), kept)
        kv, q = (
            (groups[:, None] * features + torch.arange(features, device=groups.device)).flatten()
            for features in (decoder.head_dim, share * decoder.head_dim)
        )
        sliced = {"q": part.q.rows(q), "k": part.k.rows(kv), "v": part.v.rows(kv), "o": part.o.columns(q)}
        return replace(part, **sliced, heads=kept * share, kv_heads=kept)

    return decoder.changed(change)


def width_cross(
    decoder: Decoder, sparsity: float, *, align: int = ALIGN, residual_projections: bool = False
) -> Decoder:
    """The hidden size is sliced everywhere. Norms keep the scale they had over the whole width, as if the features
    removed were zero."""
    before = decoder.hidden
    kept = aligned(before, 1.0 - sparsity, align)
    index = best(decoder.embedding.float().pow(2).sum(0), kept)
    scale = math.sqrt(before / kept)  # a mean over fewer features is larger by its square
    turn = torch.eye(kept, dtype=decoder.embedding.dtype, device=index.device) if residual_projections else None

    def change(number: int, part: Any) -> Any:
        *readers, writer = part.roles
        sliced = {role: getattr(part, role).columns(index) for role in readers}
        sliced[writer] = getattr(part, writer).rows(index)
        return replace(part, norm=part.norm.index_select(0, index) * scale, turn=turn, **sliced)

    embedding = decoder.embedding.index_select(1, index).contiguous()
    return replace(
        decoder.changed(change),
        embedding=embedding,
        head=embedding if decoder.head is decoder.embedding else decoder.head.index_select(1, index).contiguous(),
        final_norm=decoder.final_norm.index_select(0, index) * scale,
        epsilon=decoder.epsilon * before / kept,
    )


def low_rank(decoder: Decoder, sparsity: float, *, align: int = ALIGN) -> Decoder:
    """Each W becomes (W Q)(Q^T), Q an orthonormal basis of a sample of its row space (randomised range finder)."""
    generator = torch.Generator().manual_seed(0)

    def factorise(number: int, role: str, p: Projection) -> Projection:
        weight = p.weight.float()
        n, k = weight.shape
        sample = torch.randn(n, rank_left(sparsity, n, k, align), generator=generator)
        basis = torch.linalg.qr(weight.t() @ sample.to(weight.device)).Q
        return Projection(tuple(f.to(p.weight.dtype).contiguous() for f in (basis.t(), weight @ basis)), p.bias)

    return each_projection(decoder, factorise)


def semi_structured(decoder: Decoder, sparsity: float) -> Decoder:
    """2:4 zeros in every projection, run by the sparse tensor cores; refused on a device that has none."""
    if sparsity != 0.5:
        raise InputError(f"semi_structured at sparsity {sparsity:g}: 2:4 removes exactly 0.5")
    if not decoder.place.startswith("cuda"):
        raise Unsupported(f"semi_structured (2:4) needs sparse tensor cores; device {decoder.place!r} has none")
    algorithms: dict[tuple[int, int], Any] = {}  # searched once for each shape of weights

    def pack(number: int, role: str, p: Projection) -> Projection:
        found = algorithms.setdefault(tuple(p.weight.shape), {})
        return Projection((sparse_weight(two_of_four(p.weight), found),), p.bias)

    return each_projection(decoder, pack)


def unstructured(decoder: Decoder, sparsity: float) -> Decoder:
    """The smallest weights of every projection set to zero; dense kernels compute them all the same."""

    def zero(number: int, role: str, p: Projection) -> Projection:
        flat = p.weight.flatten()
        small = flat.abs().float().topk(whole_share(sparsity, len(flat)), largest=False).indices
        return Projection((flat.scatter(0, small, 0.0).view_as(p.weight),), p.bias)

    return each_projection(decoder, zero)


def two_of_four(weight: Tensor, saliency: Tensor | None = None) -> Tensor:
    """The weight with two of every four neighbours in a row zeroed: the smallest, or those of least saliency.

    >>> two_of_four(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """
    if weight.shape[1] % 4:
        raise InputError(f"semi_structured: needs input features in fours, got {weight.shape[1]}")
    fours = (weight.abs() if saliency is None else saliency).view(len(weight), -1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(2, dim=-1).indices, True)
    return weight.where(keep.view_as(weight), 0.0)


def each_projection(decoder: Decoder, change: Callable[[int, str, Projection], Projection]) -> Decoder:
    """The decoder with a function of (layer, role, projection) in place of every projection."""
    return decoder.changed(
        lambda i, part: replace(part, **{role: change(i, role, getattr(part, role)) for role in part.roles})
    )


STATIC: Mapping[str, Callable[..., Decoder]] = {
    function.__name__: function for function in (depth, width, width_cross, semi_structured, low_rank, unstructured)
}
"""Families that change the weights."""


def _routed(decoder: Decoder, rule: Any) -> Decoder:
    """A decoder under a rule, with random routers where it needs some."""

    def router(outputs: int, generator: torch.Generator) -> Tensor:
        weight = torch.randn(outputs, decoder.hidden, generator=generator) / math.sqrt(decoder.hidden)
        return weight.to(device=decoder.place, dtype=decoder.embedding.dtype)

    def routed(layer: Layer) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(rule.seed)
        for part in (layer.attention, layer.mlp):
            if part is None or isinstance(rule, TokenRouting):
                yield part and replace(part, router=router(2, generator))
                continue
            blocks = _head_blocks(part) if isinstance(part, Attention) else _channel_blocks(part, rule.channel_groups)
            yield replace(part, router=router(blocks.groups, generator), blocks=blocks)

    if isinstance(rule, TokenRouting | GroupRouting):
        decoder = replace(decoder, layers=tuple(Layer(*routed(layer)) for layer in decoder.layers))
    return replace(decoder, rule=rule)


def _head_blocks(a: Attention) -> Blocks:
    """Query and output weights by KV group: the rows of q lie in this order already."""
    return Blocks(a.q.weight, a.o.weight.t().contiguous(), a.kv_heads)


def _channel_blocks(m: Mlp, groups: int) -> Blocks:
    """Gate, up and down weights by groups of channels: no more than asked for, and the last filled up with zeros."""
    channels = m.down.weight.shape[1]
    width = -(-channels // groups)
    groups = -(-channels // width)
    gate, up, outer = (
        F.pad(weight, (0, 0, 0, groups * width - channels)).view(groups, width, -1)
        for weight in (m.gate.weight, m.up.weight, m.down.weight.t())
    )
    return Blocks(torch.cat((gate, up), 1).flatten(0, 1).contiguous(), outer.flatten(0, 1).contiguous(), groups)
