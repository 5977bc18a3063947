"""Prune a decoder by any family: change its weights, or set the rule of its passes.

Widths, ranks and counts are rounded as in ``simulator.pruning``, so shapes equal the predicted shapes. The size of the
weights selects what is removed, which does not affect the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
"""Widths and ranks are rounded up to a multiple of this by default, as in the simulator's families."""

DYNAMIC: Mapping[str, Callable[..., Rule]] = {
    rule.family: rule for rule in (TokenRouting, GroupRouting, BlockAttention, TokenDropping, CacheCut)
}
"""Families that decide during a pass."""


def prune_decoder(decoder: Decoder, family: str, sparsity: float, **options: Any) -> Decoder:
    """Remove a fraction in [0, 1) of a decoder by a family; families compose, with at most one dynamic family.

    ``options`` are parameters of the family's function, or fields of its rule. InputError: unknown family or option, or
    a combination that cannot run. Unsupported: the device has no kernel (2:4 needs a CUDA GPU).
    """
    known = {**STATIC, **DYNAMIC}
    if family not in known:
        raise unknown("pruning family", family, known)
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity: expected a fraction in [0, 1), such as 0.25, got {sparsity:g}")
    if sparsity == 0.0:
        return decoder
    names = [name for name in signature(known[family]).parameters if name not in ("decoder", "sparsity", "keep")]
    if bad := sorted(set(options) - set(names)):
        raise InputError(f"family {family} has no option {bad[0]!r} here; it has {', '.join(names) or 'none'}")
    with torch.no_grad():
        if family in STATIC:
            return STATIC[family](decoder, sparsity, **options)
        if decoder.rule is not None:
            raise InputError(f"decoder: expected one dynamic family, got {decoder.rule.family} and {family}")
        return _routed(decoder, DYNAMIC[family](1.0 - sparsity, **options))


def whole_share(share: float, of: int) -> int:
    """Return ``share`` of ``of`` rounded to the nearest whole number, halves up."""
    return int(_edits.whole_share(share, of))


def aligned(width: int, keep: float, align: int = ALIGN) -> int:
    """Return ``keep`` of ``width`` rounded up to a multiple of ``align``, at most ``width``."""
    return int(_edits.aligned(np.array(width), np.array(keep), align))


def rank_left(sparsity: float, n: int, k: int, align: int = ALIGN) -> int:
    """Return the rank at which two factors of a weight (n, k) have the remaining share of its parameters."""
    exact = math.floor((1.0 - sparsity) * n * k / (n + k) + 1e-9)
    return min(max(math.ceil(exact / align), 1) * align, n, k)


def depth(decoder: Decoder, sparsity: float, *, unit: str = "layer") -> Decoder:
    """Remove ``round(s L)`` layers, or one kind of sublayer in as many layers: the deepest except the last."""
    one_of("option unit", unit, ("layer", "both", "attention", "mlp"))
    layers = len(decoder.layers)
    count = whole_share(sparsity, layers)
    end = layers - 1 if count < layers else layers
    removed = range(end - count, end)
    if unit in ("layer", "both"):
        return replace(decoder, layers=tuple(layer for i, layer in enumerate(decoder.layers) if i not in removed))
    kind = Attention if unit == "attention" else Mlp
    return decoder.changed(lambda i, part: None if i in removed and isinstance(part, kind) else part)


def width(decoder: Decoder, sparsity: float, *, align: int = ALIGN) -> Decoder:
    """Remove KV groups with their query heads, and MLP channels, from the weights."""

    def change(number: int, part: Any) -> Any:
        size = getattr(part, part.roles[-1]).weight.float().pow(2).sum(0)
        if isinstance(part, Mlp):
            index = best(size, aligned(len(size), 1.0 - sparsity, align))
            return replace(part, gate=part.gate.rows(index), up=part.up.rows(index), down=part.down.columns(index))
        kept, share = max(whole_share(1.0 - sparsity, part.kv_heads), 1), part.heads // part.kv_heads
        groups = best(size.view(part.kv_heads, -1).sum(1), kept)
        kv, q = (
            (groups[:, None] * features + torch.arange(features, device=groups.device)).flatten()
            for features in (decoder.head_dim, share * decoder.head_dim)
        )
        return replace(
            part,
            q=part.q.rows(q),
            k=part.k.rows(kv),
            v=part.v.rows(kv),
            o=part.o.columns(q),
            heads=kept * share,
            kv_heads=kept,
        )

    return decoder.changed(change)


def width_cross(decoder: Decoder, sparsity: float, *, align: int = ALIGN) -> Decoder:
    """Reduce the hidden size everywhere. Norms keep their scale, as if the removed features were zero."""
    before = decoder.hidden
    kept = aligned(before, 1.0 - sparsity, align)
    index = best(decoder.embedding.float().pow(2).sum(0), kept)
    scale = math.sqrt(before / kept)  # a mean over fewer features is larger by its square

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


def low_rank(decoder: Decoder, sparsity: float, *, align: int = ALIGN) -> Decoder:
    """Replace each W by (W Q)(Q^T), Q an orthonormal basis of a sample of its row space (randomised range finder)."""
    generator = torch.Generator().manual_seed(0)

    def factorise(number: int, role: str, p: Projection) -> Projection:
        weight = p.weight.float()
        n, k = weight.shape
        sample = torch.randn(n, rank_left(sparsity, n, k, align), generator=generator)
        basis = torch.linalg.qr(weight.t() @ sample.to(weight.device)).Q
        return Projection(tuple(f.to(p.weight.dtype).contiguous() for f in (basis.t(), weight @ basis)), p.bias)

    return each_projection(decoder, factorise)


def semi_structured(decoder: Decoder, sparsity: float) -> Decoder:
    """Make every projection 2:4 sparse, for sparse tensor cores; Unsupported on a device without them."""
    if sparsity != 0.5:
        raise InputError(f"semi_structured (2:4): expected sparsity 0.5, got {sparsity:g}")
    if not decoder.device.startswith("cuda"):
        raise Unsupported(f"semi_structured (2:4) needs sparse tensor cores; device {decoder.device!r} has none")
    algorithms: dict[tuple[int, int], Any] = {}  # one search per shape of weights

    def pack(number: int, role: str, p: Projection) -> Projection:
        found = algorithms.setdefault(tuple(p.weight.shape), {})
        return Projection((sparse_weight(two_of_four(p.weight), found),), p.bias)

    return each_projection(decoder, pack)


def unstructured(decoder: Decoder, sparsity: float) -> Decoder:
    """Set the smallest weights of every projection to zero; dense kernels still compute them."""

    def zero(number: int, role: str, p: Projection) -> Projection:
        flat = p.weight.flatten()
        small = flat.abs().float().topk(whole_share(sparsity, len(flat)), largest=False).indices
        return Projection((flat.scatter(0, small, 0.0).view_as(p.weight),), p.bias)

    return each_projection(decoder, zero)


def two_of_four(weight: Tensor) -> Tensor:
    """Set the smallest two of every four neighbours in a row of a weight to zero.

    >>> two_of_four(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """
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


STATIC: Mapping[str, Callable[..., Decoder]] = {
    function.__name__: function for function in (depth, width, width_cross, semi_structured, low_rank, unstructured)
}
"""Families that change the weights."""


def _routed(decoder: Decoder, rule: Any) -> Decoder:
    """Set the rule of a decoder, with random routers if the rule needs them."""

    def router(outputs: int, generator: torch.Generator) -> Tensor:
        weight = torch.randn(outputs, decoder.hidden, generator=generator) / math.sqrt(decoder.hidden)
        return weight.to(device=decoder.device, dtype=decoder.embedding.dtype)

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
    """Return query and output weights by KV group; the rows of q have this order already."""
    return Blocks(a.q.weight, a.o.weight.t().contiguous(), a.kv_heads)


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
