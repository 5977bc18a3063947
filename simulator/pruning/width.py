"""Width pruning: remove KV groups with their query heads, and MLP channels (LLM-Pruner, FLAP,
Sheared LLaMA).

In a gated delta net, a group is a key head with its value heads: projections, convolution and state
shrink. It has no query heads or KV heads alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, EXPERTS, Kind
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.pruning import _rows
from simulator.pruning._family import NESTED, SUBLAYERS, Choice, Family, Pruned, whole
from simulator.pruning.width_cross import width_cross
from simulator.workload import Workload

# projections whose outputs belong to query heads, or to the heads of a gated delta net
HEADS: tuple[str, ...] = ("q", "q_b", "kv_b", "absorb_k", "absorb_v", "delta_in", "delta_ba")
# elementwise operators on the outputs of query heads
OUTPUTS: tuple[str, ...] = ("gated_norm", "output_gate", "quantize_heads")
_DELTA_NET = int(Kind.DELTA_NET)


def width(
    w: Workload, choice: Choice, *, ideal: bool, align: int = 16, inner: Any = None
) -> Pruned:
    """Keep ``round((1-s) G)`` KV groups, at least one, and ``1-s`` of the inner width, rounded up
    to ``align``.

    Parts are ``attention`` (KV groups with their query heads), ``mlp``, ``heads`` (query heads
    alone; the cache stays), ``kv`` (KV heads alone) and ``hidden`` (hidden size of all layers).
    Tensor-parallel devices prune their own shares. ``inner`` sets the inner width of the whole
    model, for an existing pruned checkpoint."""
    align, mlp = whole("align", align), choice.of("mlp")
    attended = _attention(w, choice.of("attention"), choice.of("heads"), choice.of("kv"))
    out = _mlp(attended, mlp, align, inner)
    if np.count_nonzero(out.kind == EXPERTS):
        out = _rows.with_expert_width(
            out, np.where(mlp > 0, _rows.aligned(out.n, 1.0 - mlp, align), out.n)
        )
    if (hidden := float(choice.of("hidden").max(initial=0.0))) > 0:
        out, _ = width_cross(out, Choice(choice.of("hidden"), hidden), ideal=ideal, align=align)
    return out, _rows.parameters_removed(w, out)


def _attention(w: Workload, both: Array, alone: Array, kv: Array) -> Workload:
    """Remove shares of KV groups with their query heads, of query heads alone, and of KV heads
    alone."""
    delta = w.kind == _DELTA_NET
    attention, latent = w.is_attention | delta, w.latent > 0  # latent: one vector for all heads
    at, covered = _rows.coverage(w, attention)
    nets, one_vector = covered & delta[at], covered & latent[at]
    alone, kv = np.where(nets, 0.0, alone), np.where(nets, 0.0, kv)
    heads = np.where(covered, w.heads[at], 0)
    groups = np.where(one_vector, heads, np.where(covered, w.kv_heads[at], 0))
    if np.count_nonzero(one_vector & (kv > 0)):
        raise InputError(
            "sparsity of kv: latent attention has one vector for all heads; expected attention or"
            " heads"
        )

    def left(many: Array, share: Array) -> Array:
        return np.where(
            (share > 0) & (many > 0), np.maximum(_rows.whole_share(1.0 - share, many), 1), many
        )

    grouped = left(groups, both)
    some_heads = left(heads * grouped // np.maximum(groups, 1), alone)
    some_groups = np.where(one_vector, some_heads, left(grouped, kv))
    heads, groups = np.maximum(heads, 1), np.maximum(groups, 1)
    queries, outputs = _rows.writers(w, *HEADS) | delta, w.is_role(*OUTPUTS)
    stored, cached = _rows.writers(w, "k", "v"), w.is_role("cache_write") & ~one_vector
    rotated = w.is_role("rotary", "qk_norm")
    keys = groups * np.where(covered, w.head_dim[at], 0)  # features of all keys
    # the other outputs of a fused projection are queries, and gates of the attention's outputs if
    # there are any
    fused = (w.n - 2 * keys) * some_heads // heads + 2 * keys * some_groups // groups
    every, left_over = heads + groups, some_heads + some_groups
    n = np.where(queries | outputs, w.n * some_heads // heads, w.n)
    n = np.where(stored | cached, w.n * some_groups // groups, n)
    n = np.where(rotated, w.n * left_over // every, n)
    n = np.where(_rows.writers(w, "qkv"), fused, n)
    share = np.where(cached, some_groups / groups, np.where(rotated, left_over / every, 1.0))
    share = np.where(outputs, some_heads / heads, share)
    read, written = _repeated(w, (heads, groups), (some_heads, some_groups))
    return _rows.resized(
        w.replace(params=np.where(delta, w.params * (some_heads / heads), w.params)),
        n,
        np.where(_rows.readers(w, "o"), w.k * some_heads // heads, w.k),
        heads=np.where(attention, some_heads, w.heads),
        kv_heads=np.where(attention & ~(latent & (w.kv_heads == 1)), some_groups, w.kv_heads),
        read_bytes=w.read_bytes * share * read,
        write_bytes=w.write_bytes * share * written,
    )


def _repeated(
    w: Workload, before: tuple[Array, Array], after: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Return factors of read and written bytes of a copied cache (see ``cache_write`` in
    :mod:`simulator.models.lower`) from query heads and KV heads."""
    copied = w.is_role("cache_write") & (w.kv_len > 0)
    if not np.count_nonzero(copied) or load_engine(w.meta.engine).cache != "copied":
        return np.ones(len(w)), np.ones(len(w))
    was, now = (
        np.where(copied & (heads > groups), heads // np.maximum(groups, 1), 0)
        for heads, groups in (before, after)
    )
    # each cached position is read to copy it, and read again to repeat it
    reads, reads_now = 1 + was + (was > 0), 1 + now + (now > 0)
    each = np.maximum(w.m * w.n * DTYPE_BYTES[w.dtype], 1.0)
    positions = np.where(copied, (w.read_bytes / each - 1.0) / reads, 0.0)
    return (1.0 + positions * reads_now) / (1.0 + positions * reads), (1 + now) / (1 + was)


def _mlp(w: Workload, s: Array, align: int, inner: Any) -> Workload:
    width = _rows.covering(w, _rows.readers(w, "down"), w.k)
    shrink = (s > 0) & (width > 0)
    kept = np.where(shrink, _rows.aligned(width, 1.0 - s, align), width)
    if inner is not None:
        devices = w.meta.devices if w.meta.parallel in ("tensor", "expert") else 1
        wanted = whole("inner", inner)
        if wanted % devices or (width[width > 0] * devices < wanted).any():
            expected = (
                f"expected a multiple of {devices} up to the inner width"
                f" {int(width.max(initial=0)) * devices}"
            )
            raise InputError(f"option inner: {expected}, got {wanted}")
        kept = np.where(shrink, wanted // devices, width)
    return _rows.with_inner(w, kept)


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
    targets=(*SUBLAYERS, *NESTED),
)
