"""Every pruning family applied to a decoder's weights, or switched on in its execution.

Widths, ranks and counts are rounded as in ``simulator.pruning``, so that what runs here has the shapes that are predicted there. What
is removed is chosen by the size of the weights; it makes no difference to the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from calibration.devices.protocol import Unsupported
from calibration.execute.decoder.model import Attention, Blocks, Decoder, Dynamic, Layer, Mlp, Projection, Tensor
from simulator.errors import InputError, unknown

DYNAMIC: tuple[str, ...] = ("dynamic_depth", "dynamic_width", "sparse_attention", "token", "kv_cache")


def prune_decoder(decoder: Decoder, family: str, sparsity: float, **options: Any) -> Decoder:
    """The decoder pruned by a family; families compose, but at most one of them may be dynamic.

    Parameters
    ----------
    decoder : Decoder
    family : str
        A family of ``simulator.pruning.FAMILIES``.
    sparsity : float, [0, 1)
        Fraction removed.
    **options
        depth: ``unit`` (layer, attention, mlp). width, width_cross, low_rank: ``align``. width_cross: ``residual_projections``.
        Dynamic families: fields of :class:`Dynamic`.

    Raises
    ------
    InputError
        Unknown family or option, sparsity out of range, or a combination that cannot run.
    Unsupported
        The device has no kernel for it (2:4 needs a CUDA GPU).
    """
    if family not in STATIC and family not in DYNAMIC:
        raise unknown("pruning family", family, (*STATIC, *DYNAMIC))
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity {sparsity:g}: expected a fraction in [0, 1), such as 0.25")
    if sparsity == 0.0:
        return decoder
    with torch.no_grad():
        if family in STATIC:
            try:
                return STATIC[family](decoder, sparsity, **options)
            except TypeError as error:
                if "keyword argument" not in str(error):
                    raise
                raise InputError(f"family {family}: {str(error).split('() ')[-1]}") from None
        return _dynamic(decoder, family, sparsity, **options)


def whole_share(share: float, of: int) -> int:
    """``share`` of ``of`` rounded to the nearest whole, halves up.

    >>> whole_share(0.5, 3), whole_share(0.9, 3)
    (2, 3)
    """
    return math.floor(share * of + 0.5)


def aligned(width: int, keep: float, align: int) -> int:
    """``keep`` of ``width`` rounded up to a multiple of ``align``, and no more than ``width``.

    >>> aligned(1536, 0.7, 16), aligned(100, 0.99, 16)
    (1088, 100)
    """
    return min(max(math.ceil(keep * width / align - 1e-9) * align, align), width)


# -- static -----------------------------------------------------------------------------------------------------------------------


def depth(decoder: Decoder, sparsity: float, *, unit: str = "layer") -> Decoder:
    """``round(s L)`` layers (or one kind of sublayer in as many layers) vanish: the deepest but the last."""
    if unit not in ("layer", "both", "attention", "mlp"):
        raise unknown("option unit", unit, ("layer", "both", "attention", "mlp"))
    many = len(decoder.layers)
    gone = whole_share(sparsity, many)
    end = many - 1 if gone < many else many
    removed = set(range(end - gone, end))
    if unit in ("layer", "both"):
        return replace(decoder, layers=tuple(layer for i, layer in enumerate(decoder.layers) if i not in removed))
    none: Mapping[str, None] = {unit: None}
    return replace(
        decoder,
        layers=tuple(replace(layer, **none) if i in removed else layer for i, layer in enumerate(decoder.layers)),
    )


def width(decoder: Decoder, sparsity: float, *, align: int = 16) -> Decoder:
    """KV groups with their query heads, and MLP channels, are sliced out of the weights."""
    return replace(
        decoder,
        layers=tuple(
            Layer(
                layer.attention and _fewer_groups(layer.attention, sparsity),
                layer.mlp and _fewer_channels(layer.mlp, sparsity, align),
            )
            for layer in decoder.layers
        ),
    )


def _fewer_groups(a: Attention, sparsity: float) -> Attention:
    kept = max(whole_share(1.0 - sparsity, a.kv_heads), 1)
    group = a.heads // a.kv_heads
    head_dim = a.o.weight.shape[1] // a.heads
    sizes = a.o.weight.float().pow(2).sum(0).view(a.kv_heads, group * head_dim).sum(1)
    groups = sizes.topk(kept).indices.sort().values
    kv = (groups[:, None] * head_dim + torch.arange(head_dim, device=groups.device)).flatten()
    q = (groups[:, None] * group * head_dim + torch.arange(group * head_dim, device=groups.device)).flatten()
    return replace(
        a, q=_rows(a.q, q), k=_rows(a.k, kv), v=_rows(a.v, kv), o=_columns(a.o, q), heads=kept * group, kv_heads=kept
    )


def _fewer_channels(mlp: Mlp, sparsity: float, align: int) -> Mlp:
    inner = mlp.down.weight.shape[1]
    kept = aligned(inner, 1.0 - sparsity, align)
    index = mlp.down.weight.float().pow(2).sum(0).topk(kept).indices.sort().values
    return replace(mlp, gate=_rows(mlp.gate, index), up=_rows(mlp.up, index), down=_columns(mlp.down, index))


def _rows(p: Projection, index: Tensor) -> Projection:
    return Projection(
        (p.weight.index_select(0, index).contiguous(),), None if p.bias is None else p.bias.index_select(0, index)
    )


def _columns(p: Projection, index: Tensor) -> Projection:
    return Projection((p.weight.index_select(1, index).contiguous(),), p.bias)


def width_cross(decoder: Decoder, sparsity: float, *, align: int = 16, residual_projections: bool = False) -> Decoder:
    """The hidden size is sliced everywhere. Norms keep the scale they had over the whole width, as if the features removed were zero."""
    before = decoder.hidden
    kept = aligned(before, 1.0 - sparsity, align)
    index = decoder.embedding.float().pow(2).sum(0).topk(kept).indices.sort().values
    scale = math.sqrt(before / kept)  # a mean over fewer features is larger by its square

    def norm(weight: Tensor) -> Tensor:
        return weight.index_select(0, index) * scale

    def out(p: Projection) -> Projection:
        return _rows(p, index)

    turn = torch.eye(kept, dtype=decoder.embedding.dtype, device=index.device) if residual_projections else None
    layers = []
    for layer in decoder.layers:
        a, m = layer.attention, layer.mlp
        if a is not None:
            a = replace(
                a,
                norm=norm(a.norm),
                q=_columns(a.q, index),
                k=_columns(a.k, index),
                v=_columns(a.v, index),
                o=out(a.o),
                turn=turn,
            )
        if m is not None:
            m = replace(
                m,
                norm=norm(m.norm),
                gate=_columns(m.gate, index),
                up=_columns(m.up, index),
                down=out(m.down),
                turn=turn,
            )
        layers.append(Layer(a, m))
    embedding = decoder.embedding.index_select(1, index).contiguous()
    head = embedding if decoder.head is decoder.embedding else decoder.head.index_select(1, index).contiguous()
    return replace(
        decoder,
        embedding=embedding,
        head=head,
        final_norm=norm(decoder.final_norm),
        layers=tuple(layers),
        epsilon=decoder.epsilon * before / kept,
    )


def low_rank(decoder: Decoder, sparsity: float, *, align: int = 16) -> Decoder:
    """Each projection W becomes (W Q)(Q^T) with Q an orthonormal basis of a sample of its row space (randomised range finder)."""
    generator = torch.Generator().manual_seed(0)

    def factorise(p: Projection) -> Projection:
        weight = p.weight.float()
        n, k = weight.shape
        exact = math.floor((1.0 - sparsity) * n * k / (n + k) + 1e-9)
        rank = min(max(math.ceil(exact / align), 1) * align, n, k)
        sample = torch.randn(n, rank, generator=generator).to(weight.device)
        basis = torch.linalg.qr(weight.t() @ sample).Q
        return Projection(tuple(f.to(p.weight.dtype).contiguous() for f in (basis.t(), weight @ basis)), p.bias)

    return _each_projection(decoder, factorise)


def two_of_four(weight: Tensor) -> Tensor:
    """The weight with the two smallest of every four neighbours in a row set to zero.

    >>> two_of_four(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """
    n, k = weight.shape
    if k % 4:
        raise InputError(f"semi_structured: needs input features in fours, got {k}")
    fours = weight.view(n, k // 4, 4)
    small = fours.abs().topk(2, dim=-1, largest=False).indices
    return fours.scatter(-1, small, 0.0).view(n, k)


def semi_structured(decoder: Decoder, sparsity: float) -> Decoder:
    """2:4 zeros in every projection, run by the sparse tensor cores; refused on a device that has none."""
    if sparsity != 0.5:
        raise InputError(f"semi_structured at sparsity {sparsity:g}: 2:4 removes exactly 0.5")
    if not decoder.place.startswith("cuda"):
        raise Unsupported(f"semi_structured (2:4) needs sparse tensor cores; device {decoder.place!r} has none")
    return _each_projection(
        decoder, lambda p: Projection((torch.sparse.to_sparse_semi_structured(two_of_four(p.weight)),), p.bias)
    )


def unstructured(decoder: Decoder, sparsity: float) -> Decoder:
    """The smallest weights of every projection set to zero; dense kernels compute them all the same."""

    def zero(p: Projection) -> Projection:
        weight = p.weight
        count = whole_share(sparsity, weight.numel())
        small = weight.abs().flatten().float().topk(count, largest=False).indices
        return Projection((weight.flatten().scatter(0, small, 0.0).view_as(weight),), p.bias)

    return _each_projection(decoder, zero)


def _each_projection(decoder: Decoder, change: Callable[[Projection], Projection]) -> Decoder:
    layers = []
    for layer in decoder.layers:
        a, m = layer.attention, layer.mlp
        a = a and replace(a, q=change(a.q), k=change(a.k), v=change(a.v), o=change(a.o))
        m = m and replace(m, gate=change(m.gate), up=change(m.up), down=change(m.down))
        layers.append(Layer(a, m))
    return replace(decoder, layers=tuple(layers))


STATIC: Mapping[str, Callable[..., Decoder]] = {
    "depth": depth,
    "width": width,
    "width_cross": width_cross,
    "semi_structured": semi_structured,
    "low_rank": low_rank,
    "unstructured": unstructured,
}
"""Families that change the weights."""


# -- dynamic ----------------------------------------------------------------------------------------------------------------------


def _dynamic(decoder: Decoder, family: str, sparsity: float, **options: Any) -> Decoder:
    """Switch a dynamic family on, with routers where it has some."""
    if decoder.dynamic.family:
        raise InputError(
            f"decoder: {decoder.dynamic.family} is on already; only one dynamic family can run at a time, not {family} too"
        )
    names = {
        "dynamic_width": ("channel_groups",),
        "sparse_attention": ("block",),
        "token": ("start",),
        "kv_cache": ("observed",),
    }
    if bad := sorted(set(options) - {*names.get(family, ()), "seed"}):
        raise InputError(
            f"family {family} has no option {bad[0]!r} here; it has {', '.join((*names.get(family, ()), 'seed'))}"
        )
    dynamic = Dynamic(family, 1.0 - sparsity, **options)
    if family in ("dynamic_depth", "dynamic_width"):
        decoder = replace(decoder, layers=tuple(_with_routers(layer, decoder, dynamic) for layer in decoder.layers))
    return replace(decoder, dynamic=dynamic)


def _with_routers(layer: Layer, decoder: Decoder, dynamic: Dynamic) -> Layer:
    generator = torch.Generator().manual_seed(dynamic.seed)

    def router(outputs: int) -> Tensor:
        weight = torch.randn(outputs, decoder.hidden, generator=generator) / math.sqrt(decoder.hidden)
        return weight.to(device=decoder.place, dtype=decoder.embedding.dtype)

    a, m = layer.attention, layer.mlp
    wide = dynamic.family == "dynamic_width"
    a = a and replace(a, router=router(a.kv_heads if wide else 2), blocks=_head_blocks(a) if wide else None)
    if m is not None and wide:
        blocks = _channel_blocks(m, dynamic.channel_groups)
        m = replace(m, router=router(blocks.groups), blocks=blocks)
    elif m is not None:
        m = replace(m, router=router(2))
    return Layer(a, m)


def _head_blocks(a: Attention) -> Blocks:
    """Query and output weights by KV group: the rows of q lie in this order already."""
    width = a.q.weight.shape[0]
    return Blocks(
        a.q.weight, a.o.weight.t().contiguous(), tuple(width * g // a.kv_heads for g in range(a.kv_heads + 1))
    )


def _channel_blocks(m: Mlp, groups: int) -> Blocks:
    """Gate, up and down weights by groups of channels, as equal as whole channels allow, and no more groups than channels."""
    channels = m.down.weight.shape[1]
    groups = min(groups, channels)
    edges = tuple(channels * g // groups for g in range(groups + 1))
    pieces = [weight[start:stop] for start, stop in pairwise(edges) for weight in (m.gate.weight, m.up.weight)]
    return Blocks(torch.cat(pieces), m.down.weight.t().contiguous(), edges)
