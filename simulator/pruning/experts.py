"""Expert pruning: remove or merge routed experts (REAP, NAEE, HC-SMoE), or use fewer per token."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arguments import flag
from simulator.arrays import Array
from simulator.codes import Kind
from simulator.errors import InputError
from simulator.pruning._family import SCORE_BYTES, Choice, Family, Pruned, one_of
from simulator.pruning._rows import covering, insert, overheads, removed, resized, whole_share
from simulator.workload import Workload


def experts(
    w: Workload, choice: Choice, *, ideal: bool, fewer: str = "experts", merged: bool = False
) -> Pruned:
    """Keep ``round((1-s) E)`` routed experts per layer, at least as many as a token uses; the
    router shrinks.

    With ``merged``, each group of experts becomes one; the router keeps its E outputs, and a table
    maps the choices of a token to groups (``select``). With ``fewer`` "active" all experts stay,
    and a token uses ``round((1-s) A)`` of them, at least one; with "average" that number is a mean
    over tokens. Numbers are counted over all devices. The skew falls with the square root of the
    share of experts that stay."""
    one_of("fewer", fewer, ("experts", "active", "average"))
    if flag("option merged", merged) and fewer != "experts":
        raise InputError(f"option merged: expected fewer=experts with it, got {fewer}")
    routed = w.kind == Kind.EXPERTS
    pruned = routed & (choice.rows > 0)
    if not pruned.any():
        expected, got = ("layers", "layers of ") if routed.any() else ("a model", "")
        got += w.meta.model
        raise InputError(
            f"family experts: expected {expected} with routed experts, got {got} without them"
        )
    devices = w.meta.devices if w.meta.parallel == "expert" else 1
    before: Array = (w.experts if fewer == "experts" else w.active) * devices
    least = np.ceil(w.active * devices) if fewer == "experts" else 1.0
    left = (
        (1.0 - choice.rows) * before
        if fewer == "average"
        else whole_share(1.0 - choice.rows, before)
    )
    kept = np.where(pruned, np.maximum(left, least), before)
    realised = removed(*(float(values @ (w.count * routed)) for values in (before, kept)))
    if fewer == "experts":
        if (uneven := routed & (kept % devices > 0)).any():
            expected = f"expected a multiple of {devices} devices"
            raise InputError(
                f"experts at sparsity {choice.asked:g}: {expected}, got {kept[uneven][0]:g} experts"
            )
        routes = (
            w.is_role("router") & ~w.overhead & (covering(w, routed, w.experts) > 0) & (not merged)
        )
        out = resized(w, np.where(routes, covering(w, routed, kept), w.n).astype(np.int64), w.k)
        params = np.where(routed, w.params * (kept / np.maximum(before, 1)), out.params)
        out = rebalanced(
            out.replace(experts=np.where(routed, kept / devices, w.experts), params=params), before
        )
    else:
        out = w.replace(active=kept / devices)
    # a kernel changes which experts each token uses
    if (merged or fewer == "average") and not ideal:
        at = np.flatnonzero(pruned)
        active = np.round(w.active[at] * devices).astype(np.int64)
        indices = w.m[at] * active * SCORE_BYTES
        select = overheads(
            w, at, "select", m=w.m[at], n=active, read_bytes=indices, write_bytes=indices
        )
        out = insert(out, [(at - 0.5, select)])
    return out, realised


def rebalanced(w: Workload, before: Any) -> Workload:
    """Return the workload of a model that had more routed experts ``before``. The experts that stay
    have similar loads: 64 of Qwen3-30B's 128 have a skew of 0.57, all have 0.84 (EXPERT_SKEW). The
    loads of merged experts add up, so their spread falls with the square root of a group's size."""
    kept = w.experts * (w.meta.devices if w.meta.parallel == "expert" else 1)
    fewer = (w.kind == Kind.EXPERTS) & (kept < before)
    if not fewer.any():
        return w
    return w.replace(skew=w.skew * np.sqrt(np.where(fewer, kept / np.maximum(before, 1), 1.0)))


FAMILY = Family(
    function=experts,
    axis="static or dynamic N of experts",
    loading="checkpoint",
    parts={"": ("experts",)},
    order=12,
    needs="experts",
    summary=(
        "removes or merges (merged=True) routed experts, or activates fewer per token (fewer=active"
        " or average)"
    ),
)
