"""Width pruning: remove KV groups with their query heads, and MLP channels (LLM-Pruner, FLAP, Sheared LLaMA).

In a gated delta net, a group is a key head with its value heads: projections, convolution and state shrink.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.errors import InputError
from simulator.pruning._edits import aligned, moved, resized, whole_share
from simulator.pruning._family import QKV, SUBLAYERS, Choice, Family, Pruned, whole
from simulator.pruning._rows import covering, parameters_removed, readers, writers
from simulator.workload import Kind, Workload

HEADS: tuple[str, ...] = (*QKV, "q_b", "kv_b", "absorb_k", "absorb_v", "delta_in", "delta_ba")
"""Projections whose outputs belong to heads."""


def width(w: Workload, choice: Choice, *, ideal: bool, align: int = 16, inner: Any = None) -> Pruned:
    """Keep ``round((1-s) G)`` KV groups, at least one, and ``1-s`` of the inner width, rounded up to ``align``.

    On tensor-parallel devices both apply to the share of each device, so devices stay balanced. ``inner`` sets the
    inner width of the whole model, for an existing pruned checkpoint. ``align=1`` gives the odd widths of channel
    pruners.
    """
    align = whole("align", align)
    out = _experts(_mlp(_attention(w, choice.rows), choice.rows, align, inner), choice.rows, align)
    return out, parameters_removed(w, out)


def _attention(w: Workload, s: Array) -> Workload:
    delta = w.kind == Kind.DELTA_NET
    attention = w.is_attention | delta
    latent = w.latent > 0  # one vector for all heads
    groups = covering(w, attention, np.where(latent, w.heads, w.kv_heads))
    shrink = (s > 0) & (groups > 0)
    groups = np.maximum(groups, 1)
    kept = np.where(shrink, np.maximum(whole_share(1.0 - s, groups), 1), groups)
    wide = w.is_role("rotary", "qk_norm", "cache_write", "gated_norm", "output_gate")
    wide &= ~(w.is_role("cache_write") & (covering(w, attention, w.latent) > 0))
    n, k, heads = (size * kept // groups for size in (w.n, w.k, w.heads))
    w = w.replace(params=np.where(delta, w.params * (kept / groups), w.params))
    return resized(
        w,
        np.where(writers(w, *HEADS) | wide | delta, n, w.n),
        np.where(readers(w, "o"), k, w.k),
        heads=np.where(attention, heads, w.heads),
        kv_heads=np.where(attention & ~(latent & (w.kv_heads == 1)), kept, w.kv_heads),
        **moved(w, np.where(wide, kept / groups, 1.0)),
    )


def _mlp(w: Workload, s: Array, align: int, inner: Any) -> Workload:
    down = readers(w, "down")
    width = covering(w, down, w.k)
    shrink, divisor = (s > 0) & (width > 0), np.maximum(width, 1)
    kept = np.where(shrink, aligned(width, 1.0 - s, align), width)
    if inner is not None:
        devices = w.meta.devices if w.meta.parallel in ("tensor", "expert") else 1
        wanted = whole("inner", inner)
        if wanted % devices or (width[width > 0] * devices < wanted).any():
            expected = f"expected a multiple of {devices} up to the inner width {int(width.max(initial=0)) * devices}"
            raise InputError(f"option inner: {expected}, got {wanted}")
        kept = np.where(shrink, wanted // devices, width)
    wide = w.is_role("activation", "product") & (width > 0)
    n = np.where(writers(w, "gate", "up", "gate_up") | wide, w.n * kept // divisor, w.n)
    return resized(w, n, np.where(down, kept, w.k), **moved(w, np.where(wide, kept / divisor, 1.0)))


def _experts(w: Workload, s: Array, align: int) -> Workload:
    """Make each routed expert narrower; keep all experts."""
    narrower = (w.kind == Kind.EXPERTS) & (s > 0)
    n = np.where(narrower, aligned(w.n, 1.0 - s, align), w.n)
    return w.replace(n=n, params=np.where(narrower, w.params * (n / np.maximum(w.n, 1)), w.params))


FAMILY = Family(
    function=width,
    axis="static N -> K",
    order=2,
    summary="removes KV groups with their query heads, and MLP channels; the cache shrinks too",
    cost="alignment and tile effects of the narrower shapes",
    realised="parameters of the projections removed / parameters of the projections, after rounding groups and widths",
    targets=SUBLAYERS,
)
