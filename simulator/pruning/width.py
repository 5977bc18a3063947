"""Width pruning: remove KV groups with their query heads, and MLP channels (LLM-Pruner, FLAP, Sheared LLaMA).

In a gated delta net, a group is a key head with its value heads: projections, convolution and state shrink. It has no
query heads or KV heads alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, Kind
from simulator.errors import InputError
from simulator.pruning import _rows
from simulator.pruning._family import NESTED, SUBLAYERS, Choice, Family, Pruned, whole
from simulator.pruning.width_cross import width_cross
from simulator.workload import Workload

HEADS: tuple[str, ...] = ("q", "q_b", "kv_b", "absorb_k", "absorb_v", "delta_in", "delta_ba")
"""Projections whose outputs belong to query heads, or to the heads of a gated delta net."""
OUTPUTS: tuple[str, ...] = ("gated_norm", "output_gate", "quantize_heads")
"""Elementwise operators on the outputs of query heads."""
PARTS: tuple[str, ...] = (*SUBLAYERS, *NESTED)


def width(w: Workload, choice: Choice, *, ideal: bool, align: int = 16, inner: Any = None) -> Pruned:
    """Keep ``round((1-s) G)`` KV groups, at least one, and ``1-s`` of the inner width, rounded up to ``align``.

    Parts are ``attention`` (KV groups with their query heads), ``mlp``, ``heads`` (query heads alone; the cache stays),
    ``kv`` (KV heads alone) and ``hidden`` (hidden size of all layers). Tensor-parallel devices prune their own shares.
    ``inner`` sets the inner width of the whole model, for an existing pruned checkpoint."""
    align, mlp = whole("align", align), choice.of("mlp")
    attended = _attention(w, choice.of("attention"), choice.of("heads"), choice.of("kv"))
    out = _experts(_mlp(attended, mlp, align, inner), mlp, align)
    if (hidden := float(choice.of("hidden").max(initial=0.0))) > 0:
        out, _ = width_cross(out, Choice(choice.of("hidden"), hidden), ideal=ideal, align=align)
    return out, _rows.parameters_removed(w, out)


def _attention(w: Workload, both: Array, alone: Array, kv: Array) -> Workload:
    """Remove shares of KV groups with their query heads, of query heads alone, and of KV heads alone."""
    delta = w.kind == Kind.DELTA_NET
    attention = w.is_attention | delta
    nets = _rows.covering(w, attention, delta.astype(np.int64)) > 0
    alone, kv = np.where(nets, 0.0, alone), np.where(nets, 0.0, kv)
    latent = w.latent > 0  # one vector for all heads
    heads, groups = (_rows.covering(w, attention, x) for x in (w.heads, np.where(latent, w.heads, w.kv_heads)))
    one_vector = _rows.covering(w, attention, latent.astype(np.int64)) > 0
    if (one_vector & (kv > 0)).any():
        raise InputError("sparsity of kv: latent attention has one vector for all heads; expected attention or heads")

    def left(many: Array, share: Array) -> Array:
        return np.where((share > 0) & (many > 0), np.maximum(_rows.whole_share(1.0 - share, many), 1), many)

    grouped = left(groups, both)
    some_heads = left(heads * grouped // np.maximum(groups, 1), alone)
    some_groups = np.where(one_vector, some_heads, left(grouped, kv))
    heads, groups = np.maximum(heads, 1), np.maximum(groups, 1)
    queries, fused = _rows.writers(w, *HEADS) | w.is_role(*OUTPUTS) | delta, _rows.writers(w, "qkv")
    keys = groups * _rows.covering(w, attention, w.head_dim)  # features of all keys
    n = np.where(
        queries, w.n * some_heads // heads, np.where(_rows.writers(w, "k", "v"), w.n * some_groups // groups, w.n)
    )
    # what is no key and no value of a fused projection are queries, and gates of the outputs if there are any
    made = (w.n - 2 * keys) * some_heads // heads + 2 * keys * some_groups // groups
    n = np.where(fused, made, n)
    rotated, cached = w.is_role("rotary", "qk_norm"), w.is_role("cache_write") & ~one_vector
    n = np.where(rotated, w.n * (some_heads + some_groups) // (heads + groups), n)
    n = np.where(cached, w.n * some_groups // groups, n)
    share = np.where(
        rotated, (some_heads + some_groups) / (heads + groups), np.where(cached, some_groups / groups, 1.0)
    )
    share = np.where(w.is_role(*OUTPUTS), some_heads / heads, share)
    params = np.where(delta, w.params * (some_heads / heads), w.params)
    return _rows.resized(
        w.replace(params=params),
        n,
        np.where(_rows.readers(w, "o"), w.k * some_heads // heads, w.k),
        heads=np.where(attention, some_heads, w.heads),
        kv_heads=np.where(attention & ~(latent & (w.kv_heads == 1)), some_groups, w.kv_heads),
        **_copied(w, _rows.moved(w, share), (heads, groups), (some_heads, some_groups)),
    )


def _copied(
    w: Workload, bytes_: dict[str, Array], before: tuple[Array, Array], after: tuple[Array, Array]
) -> dict[str, Array]:
    """Return bytes in which a copied cache is repeated as often as query heads now share a KV head.

    ``before`` and ``after`` are query heads and KV heads; see ``cache_write`` of :mod:`simulator.models.forward`."""
    rows = np.flatnonzero(w.is_role("cache_write") & (w.kv_len > 0))
    if not len(rows):
        return bytes_
    was, now = (
        np.where(heads[rows] > groups[rows], heads[rows] // np.maximum(groups[rows], 1), 0)
        for heads, groups in (before, after)
    )
    each = np.maximum(w.m[rows] * w.n[rows] * DTYPE_BYTES[w.dtype[rows]], 1.0)
    # of all positions: read to copy them, and read again to repeat them
    positions = (w.read_bytes[rows] / each - 1.0) / (1 + was + (was > 0))
    read, write = bytes_["read_bytes"].copy(), bytes_["write_bytes"].copy()
    read[rows] *= (1.0 + positions * (1 + now + (now > 0))) / (1.0 + positions * (1 + was + (was > 0)))
    write[rows] *= (1 + now) / (1 + was)
    return {"read_bytes": read, "write_bytes": write}


def _mlp(w: Workload, s: Array, align: int, inner: Any) -> Workload:
    width = _rows.covering(w, _rows.readers(w, "down"), w.k)
    shrink = (s > 0) & (width > 0)
    kept = np.where(shrink, _rows.aligned(width, 1.0 - s, align), width)
    if inner is not None:
        devices = w.meta.devices if w.meta.parallel in ("tensor", "expert") else 1
        wanted = whole("inner", inner)
        if wanted % devices or (width[width > 0] * devices < wanted).any():
            expected = f"expected a multiple of {devices} up to the inner width {int(width.max(initial=0)) * devices}"
            raise InputError(f"option inner: {expected}, got {wanted}")
        kept = np.where(shrink, wanted // devices, width)
    return _rows.with_inner(w, kept)


def _experts(w: Workload, s: Array, align: int) -> Workload:
    """Make each routed expert narrower; keep all experts."""
    return _rows.with_expert_width(w, np.where(s > 0, _rows.aligned(w.n, 1.0 - s, align), w.n))


FAMILY = Family(
    function=width,
    axis="static N -> K",
    loading="config",
    parts={
        "": ("KV heads", "inner width", "expert width"),
        "attention": ("KV heads",),
        "heads": ("heads",),
        "kv": ("KV heads",),
        "mlp": ("inner width", "expert width"),
        "hidden": ("hidden size",),
    },
    narrows=True,
    order=2,
    summary="removes KV groups with their query heads, and MLP channels; the cache shrinks too",
    cost="alignment and tile effects of the narrower shapes",
    realised="parameters of the projections removed / parameters of the projections, after rounding groups and widths",
    targets=PARTS,
)
