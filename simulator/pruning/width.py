"""Width pruning: KV groups with their query heads, and MLP channels, vanish (LLM-Pruner, FLAP, Sheared LLaMA)."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.columns import Array
from simulator.errors import InputError
from simulator.pruning._common import (
    QKV,
    SUBLAYERS,
    Choice,
    Family,
    aligned,
    attention_rows,
    covering,
    has_role,
    parameters_of,
    projections,
    removed,
    resized,
    whole,
    whole_share,
)
from simulator.workload import Workload


def width(w: Workload, choice: Choice, *, ideal: bool, align: int, inner: Any) -> tuple[Workload, float]:
    """``round((1-s) G)`` KV groups stay, at least one; the inner width becomes ``(1-s)`` of itself rounded up to ``align``.

    On tensor-parallel devices both hold for each device's share, so that devices stay balanced. ``inner`` sets the inner width (of the
    whole model) itself, for a pruned checkpoint at hand; ``align=1`` gives the odd widths of channel pruners.
    Realised: parameters of the projections removed / parameters of the projections.
    """
    align = whole("align", align)
    out = _mlp(_attention(w, choice.rows), choice.rows, align, inner)
    return out, removed(parameters_of(w), parameters_of(out))


def _attention(w: Workload, s: Array) -> Workload:
    attention = attention_rows(w)
    groups = covering(w, attention, w.kv_heads)
    shrink = (s > 0) & (groups > 0)
    kept = np.where(shrink, np.maximum(whole_share(1.0 - s, groups), 1), np.maximum(groups, 1))
    groups = np.maximum(groups, 1)
    wide = has_role(w, "rotary", "qk_norm", "cache_write")
    n = np.where((projections(w, *QKV) & (w.stage != 1)) | wide, w.n * kept // groups, w.n)
    k = np.where(projections(w, "o") & (w.stage != 2), w.k * kept // groups, w.k)
    share = np.where(wide, kept / groups, 1.0)
    return resized(
        w,
        n,
        k,
        heads=np.where(attention, w.heads * kept // groups, w.heads),
        kv_heads=np.where(attention, kept, w.kv_heads),
        read_bytes=w.read_bytes * share,
        write_bytes=w.write_bytes * share,
    )


def _mlp(w: Workload, s: Array, align: int, inner: Any) -> Workload:
    width = covering(w, projections(w, "down") & (w.stage != 2), w.k)
    kept = np.where((s > 0) & (width > 0), aligned(width, 1.0 - s, align), width)
    if inner is not None:
        devices = w.meta.devices if w.meta.parallel == "tensor" else 1
        wanted = whole("inner", inner)
        if wanted % devices or (width[width > 0] * devices < wanted).any():
            most = int(width.max(initial=0)) * devices
            raise InputError(
                f"option inner: expected a multiple of {devices} up to the inner width {most}, got {wanted}"
            )
        kept = np.where((s > 0) & (width > 0), wanted // devices, width)
    divisor = np.maximum(width, 1)
    wide = has_role(w, "activation") & (width > 0)
    n = np.where((projections(w, "gate", "up", "gate_up") & (w.stage != 1)) | wide, w.n * kept // divisor, w.n)
    k = np.where(projections(w, "down") & (w.stage != 2), kept, w.k)
    share = np.where(wide, kept / divisor, 1.0)
    return resized(w, n, k, read_bytes=w.read_bytes * share, write_bytes=w.write_bytes * share)


FAMILY = Family(
    name="width",
    axis="static N -> K",
    dynamic=False,
    order=2,
    function=width,
    summary="KV groups with their query heads, and MLP channels, vanish; the cache shrinks with them",
    cost="alignment and tile effects of the narrower shapes",
    realised="parameters of the projections removed / parameters of the projections, after rounding groups and inner width",
    options={"align": 16, "inner": None},
    targets=SUBLAYERS,
)
